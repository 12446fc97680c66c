"""The frozen weights under a set of pairs: opened, compared with the model, loaded as they are stored."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax.checkpoint import layout
from dsv3_jax.checkpoint.quantized import E8M0, scale_dtypes, stored_arrays
from dsv3_jax.checkpoint.shares import load_shares
from dsv3_jax.checkpoint.source import Source, open_source
from dsv3_jax.config import LoraConfig, ModelConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.finetune.lora import Lora
from dsv3_jax.finetune.targets import chosen_targets
from dsv3_jax.hf.rules import flatten_paths, unflatten_paths
from dsv3_jax.hf.safetensors import DTYPES
from dsv3_jax.model import abstract_variables
from dsv3_jax.quantization.choose import choose_formats
from dsv3_jax.quantization.formats import as_stored, parse_format
from dsv3_jax.quantization.leaf import Quantized

_FREE = ("dtype", "initializer_range", "num_nextn_predict_layers", "bos_token_id", "eos_token_id")
_SAMPLE = 65536


@dataclasses.dataclass(frozen=True)
class FrozenBase:
    """Weights that are not trained.

    Attributes:
      lora: the pairs that go with them.
      source: where they are.
      formats: quantisation format of each leaf that is quantised in memory.
      rounded_to: the format that weights are rounded to while they are loaded; "none" if they stay as stored.
      abstract: {"params", "router"} as they will be in memory: shapes, `Quantized` leaves among them.
      sha256: what changes when the weights do, see `fingerprint`.
      notes: one line each for the user.
    """

    lora: Lora
    source: Source
    formats: dict[str, str]
    rounded_to: str
    abstract: dict[str, Any]
    sha256: str
    notes: list[str]

    def load(self, placed: Any) -> dict[str, Any]:
        """{"params", "router"} on their devices, in their stored types; never wider, biases of routers float32.

        Args:
          placed: `abstract` with shardings.
        """
        return load_shares(self.source, placed, self.formats)

    @property
    def record(self) -> dict[str, Any]:
        """What an adapter says about its base."""
        return {
            "path": str(self.source.folder.absolute()),
            "sha256": self.sha256,
            "rounded_to": self.rounded_to,
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory."""
        return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(self.abstract))


def open_base(lora: LoraConfig, cfg: ModelConfig) -> FrozenBase:
    """Open the base of a LoRA run and choose its targets; no weights are read.

    Raises:
      ConfigError: no checkpoint, another model than `cfg`, a target that matches nothing, an unknown format.
      DataError: a checkpoint that is not whole.
    """
    assert lora.base is not None
    source = open_source(lora.base, abstract_variables)
    _compare(source, cfg)
    formats, notes = dict(source.formats), list(source.notes)
    if lora.base_quantize != "none":
        columns = {entry.path: entry.hf_shape[-1] for entry in source.entries}
        formats, more = choose_formats(columns, formats, parse_format(lora.base_quantize))
        notes += more
    want = flatten_paths(abstract_variables(cfg))
    formats = {path: fmt for path, fmt in formats.items() if path in want}
    stored = {path: fmt for path, fmt in source.formats.items() if path in want}
    paths = tuple(chosen_targets(want, lora.targets))
    return FrozenBase(
        lora=Lora(lora.rank, lora.alpha, lora.rslora, paths),
        source=source,
        formats=formats,
        rounded_to="none" if formats == stored else lora.base_quantize,
        abstract=_abstract(source, formats, set(want)),
        sha256=fingerprint(source.folder),
        notes=notes,
    )


def _compare(source: Source, cfg: ModelConfig) -> None:
    """A frozen model is what it is: every key of the config must be the base's, and every weight there."""
    for field in dataclasses.fields(ModelConfig):
        have, want = getattr(source.cfg, field.name), getattr(cfg, field.name)
        if have != want and field.name not in _FREE:
            raise ConfigError(
                f"lora.base {source.folder} has model.{field.name} = {have!r}, the run's config {want!r}"
            )
    have, want = flatten_paths(source.abstract), flatten_paths(abstract_variables(cfg))
    for path, leaf in want.items():
        if path not in have or have[path].shape != leaf.shape:
            found = list(have[path].shape) if path in have else "nothing"
            more = "; model.num_nextn_predict_layers 0 leaves the module out" if "/mtp/" in path else ""
            raise ConfigError(
                f"lora.base {source.folder}: {path}: {found}, expected {list(leaf.shape)}{more}"
            )


def _abstract(source: Source, formats: dict[str, str], want: set[str]) -> dict[str, Any]:
    abstract = flatten_paths(source.abstract)
    stored_as = {path: as_stored(fmt) for path, fmt in formats.items()}
    kept = {path: fmt for path, fmt in stored_as.items() if source.formats.get(path) == fmt}
    wanted = {
        path: "F32" if path.startswith("router/") else source.leaf_dtypes.get(path, "BF16")
        for path in abstract
    }
    scales = scale_dtypes(source.entries, source.tensors, kept)
    stored = stored_arrays(source.entries, abstract, wanted, formats, scales)
    first = {entry.path: entry for entry in reversed(source.entries)}
    leaves: dict[str, Any] = {}
    for path in want:
        if path not in formats:
            leaves[path] = jax.ShapeDtypeStruct(stored[path].shape, stored[path].dtype)
            continue
        fmt, entry = parse_format(formats[path]), first[path]
        dtypes = {}
        if fmt.kind == "fp8":  # as `quantized_leaf` has them
            dtypes["codes"] = np.dtype(np.uint8)
        if scales.get(path) == E8M0:
            dtypes["scales"] = DTYPES["F32"]
        codes, scale, zeros = (
            jax.ShapeDtypeStruct(array.shape, dtypes.get(name, array.dtype)) if array else None
            for name in ("codes", "scales", "zeros")
            for array in (stored.get(f"{path}/{name}"),)
        )
        block = tuple(entry.block_shape)
        leaves[path] = Quantized(codes, scale, zeros, fmt.coding(entry.hf_shape[1]), block)  # type: ignore[arg-type]
    tree = unflatten_paths({path: leaves[path] for path in abstract if path in want})
    return {"params": {}, "router": {}, **tree}


def fingerprint(folder: Path) -> str:
    """SHA-256 that changes with the weights: of a native checkpoint's manifest (which has every file's), of a Hugging
    Face folder's config and, of each weight file, name, size, first, middle and last 64 KiB. The place does not count.
    """
    manifest = folder / layout.MANIFEST
    if manifest.is_file():
        return hashlib.sha256(manifest.read_bytes()).hexdigest()
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as data:
            for start in (0, max(size - _SAMPLE, 0) // 2, max(size - _SAMPLE, 0)):
                data.seek(start)
                digest.update(data.read(_SAMPLE))
    return digest.hexdigest()
