"""Weights from wherever they are: a native checkpoint, the newest step of a run, or a Hugging Face folder.

`open_source` looks only at configs, manifests and headers. Reading is tensor by tensor, in Hugging Face's
granularity, so `load` and the converters share one path for all three kinds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.checkpoint import layout
from dsv3_jax.checkpoint.manifest import problems_of, read_manifest
from dsv3_jax.checkpoint.native import latest_step, read_model_config, step_folder
from dsv3_jax.checkpoint.quantized import E8M0, QuantizedLeaf, leaf_of, scale_dtypes, stored_arrays
from dsv3_jax.checkpoint.store import open_leaf
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.hf.config import load_hf_config
from dsv3_jax.hf.plan import choose_dtypes, is_router, plan_folder
from dsv3_jax.hf.rules import HFEntry, flatten_paths, hf_entries, unflatten_paths
from dsv3_jax.hf.safetensors import DTYPE_NAMES, DTYPES, SafetensorsFolder, parse_json
from dsv3_jax.hf.tensors import StoredTensor, fill
from dsv3_jax.quantization.formats import as_stored, parse_format
from dsv3_jax.quantization.leaf import quantized_leaf
from dsv3_jax.quantization.streamed import quantized_pieces

AbstractFn = Callable[[ModelConfig], Mapping[str, Any]]

_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_WEIGHT_FORMATS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".h5", ".msgpack", ".npz", ".npy",
    ".pkl", ".pickle", ".tar", ".zip",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """An opened checkpoint of any kind.

    Attributes:
      kind: "native" (a run folder opens as its newest valid step) or "hf".
      folder: the folder the weights are in.
      cfg: the model, multi-token module as it is in the weights.
      abstract: the tree of shapes, {"params", "router"}.
      entries: every Hugging Face tensor that is a slice of a leaf.
      tensors: where each of them lies, by name.
      leaf_dtypes: safetensors dtype of every leaf in memory when no other is asked for.
      formats: quantisation format of every leaf that is stored quantised.
      export_dtypes: safetensors dtype that an export gives each tensor back in.
      aliases: names that an export writes as copies of another.
      hf_config: config.json as it came, or None for a model that was made here.
      tokenizer_dir: folder with the tokenizer's files, or None.
      generation_config: generation_config.json, or None.
      files: small files that travel along, tokenizer excluded.
      notes: one line each for the user.
      step: training step, if known.
    """

    kind: str
    folder: Path
    cfg: ModelConfig
    abstract: dict[str, Any]
    entries: list[HFEntry]
    tensors: dict[str, StoredTensor]
    leaf_dtypes: dict[str, str]
    export_dtypes: dict[str, str]
    aliases: dict[str, str]
    hf_config: dict[str, Any] | None
    tokenizer_dir: Path | None
    generation_config: dict[str, Any] | None
    formats: dict[str, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    step: int | None = None

    def load(
        self, dtype: Any = None, *, formats: Mapping[str, str] | None = None, threads: int = 4
    ) -> dict[str, Any]:
        """All weights, {"params", "router"}, as numpy arrays; each tensor is read straight into its leaf.

        Args:
          dtype: of all weights ("float32", "bfloat16" or a numpy dtype); None keeps the stored one (bfloat16 for
            what is dequantised). Router biases are float32 always.
          formats: quantisation format of the leaves that come as `Quantized`, codes as they are stored (pass
            `self.formats`) or rounded to nearest now; other leaves are dequantised.
        """
        asked = None if dtype is None else _NAMES.get(str(dtype)) or DTYPE_NAMES[np.dtype(dtype)]
        formats = formats or {}
        abstract = flatten_paths(self.abstract)
        wanted = {path: "F32" if is_router(path) else asked or self.leaf_dtypes[path] for path in abstract}
        scales = scale_dtypes(
            self.entries,
            self.tensors,
            {p: as_stored(f) for p, f in formats.items() if self.formats.get(p) == as_stored(f)},
        )
        arrays: dict[str, np.ndarray] = {
            path: np.empty(stored.shape, stored.dtype)
            for path, stored in stored_arrays(self.entries, abstract, wanted, formats, scales).items()
        }

        def read(entry: HFEntry) -> None:
            tensor, fmt = self.tensors[entry.name], formats.get(entry.path)
            if fmt is None:
                tensor.read_into(arrays[entry.path][entry.index].reshape(-1))
                return
            for part in parse_format(fmt).part_shapes(entry.hf_shape):
                stored = self.formats.get(entry.path) == as_stored(fmt)
                pieces = (
                    tensor.part_pieces(part) if stored else quantized_pieces(tensor, parse_format(fmt), part)
                )
                block = arrays[f"{entry.path}/{part}"][entry.index].reshape(-1)
                fill(block, (piece.view(block.dtype) for piece in pieces))

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, self.entries))
        first = {entry.path: entry for entry in reversed(self.entries)}
        leaves: dict[str, Any] = {path: array for path, array in arrays.items() if path in abstract}
        for path, fmt in formats.items():
            parts = [arrays.get(f"{path}/{part}") for part in ("codes", "scales", "zeros")]
            if scales.get(path) == E8M0:
                parts[1] = parts[1].view(DTYPES[E8M0])  # type: ignore[union-attr]
            coding = parse_format(fmt).coding(first[path].hf_shape[1])
            leaves[path] = quantized_leaf(parts, coding, first[path].block_shape)
        return {"params": {}, "router": {}, **unflatten_paths(leaves)}

    def count_parameters(self) -> int:
        """Number of weights, aliases not counted."""
        return sum(math.prod(entry.hf_shape) for entry in self.entries)


def resolve(folder: Path | str) -> tuple[str, Path, list[str]]:
    """The kind of a folder ("native" or "hf"), the folder that holds the weights, and notes for the user.

    Raises:
      ConfigError: it does not exist or is no checkpoint of any kind.
      DataError: a run without a valid step.
    """
    folder = Path(folder)
    kind = layout.kind_of(folder)
    if kind is None:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder")
        raise ConfigError(
            f"{folder} is no checkpoint: neither {layout.MANIFEST} (native) nor {layout.CHECKPOINTS}/ (training run) "
            "nor config.json with safetensors (Hugging Face)"
        )
    if kind != "run":
        return kind, folder, []
    step, bad = latest_step(folder)
    notes = [f"step {number} is not used: {problems[0]}" for number, problems in bad.items()]
    if step is None:
        raise DataError("\n  ".join([f"{folder}: the run has no valid checkpoint", *notes]))
    return "native", step_folder(folder, step), notes


def open_source(folder: Path | str, abstract: AbstractFn) -> Source:
    """Open a checkpoint of any kind; reads configs, manifest and headers, no weights.

    Args:
      folder: a native checkpoint, a training run (its newest valid step), or a Hugging Face folder.
      abstract: `dsv3_jax.model.abstract_variables`.
    Raises:
      ConfigError: no checkpoint, or a config that is not of this family.
      DataError: a checkpoint that is not whole; one report of everything that does not fit.
    """
    kind, folder, notes = resolve(folder)
    return _open_hf(folder, abstract, notes) if kind == "hf" else _open_native(folder, abstract, notes)


def _open_hf(folder: Path, abstract: AbstractFn, notes: list[str]) -> Source:
    cfg, raw = load_hf_config(folder)
    plan = plan_folder(SafetensorsFolder(folder), cfg, raw, abstract)
    dtypes = choose_dtypes(plan.entries, plan.tensors, "keep")
    tokenizer, files, skipped = travelling_files(folder)
    if skipped:
        notes = [*notes, f"not carried along: {', '.join(skipped)}"]
    return Source(
        kind="hf",
        folder=folder,
        cfg=plan.cfg,
        abstract=plan.abstract,
        entries=plan.entries,
        tensors=plan.tensors,
        leaf_dtypes=dtypes.leaves,
        formats=dtypes.formats,
        export_dtypes=dtypes.tensors,
        aliases=plan.aliases,
        hf_config=raw,
        tokenizer_dir=folder if tokenizer else None,
        generation_config=_json(folder / "generation_config.json"),
        files=files,
        notes=[*notes, *plan.notes, *dtypes.notes],
    )


def _open_native(folder: Path, abstract: AbstractFn, notes: list[str]) -> Source:
    manifest = read_manifest(folder)
    problems = problems_of(folder) or problems_of(folder, hashes=True, only=_is_small)
    if problems:
        raise DataError("\n  ".join([f"{folder}: {len(problems)} problem(s)", *problems[:50]]))
    if manifest.kind == "adapter":
        raise ConfigError(
            f"{folder} is an adapter, no model: give its base as the checkpoint and this as the adapter, or add the "
            "two up (python -m convert.merge)"
        )
    cfg = read_model_config(folder)
    tree = dict(abstract(cfg))
    entries = hf_entries(cfg, tree)
    item = folder / layout.WEIGHTS
    formats = manifest.quantization
    expected, stored = {entry.path for entry in entries}, {leaf_of(path) for path in manifest.tree}
    if expected != stored or not set(formats) <= expected:
        raise DataError(
            f"{folder}: leaves do not fit {layout.MODEL}: missing {sorted(expected - stored)}, "
            f"extra {sorted((stored | set(formats)) - expected)}"
        )
    leaves = {path: open_leaf(item, path) for path in expected - set(formats)}
    coded = {path: QuantizedLeaf(item, path, fmt) for path, fmt in formats.items()}

    def sha256(file: Path) -> str:
        return str(manifest.files[str(file.relative_to(folder))]["sha256"])

    tensors = {}
    for entry in entries:
        if entry.path in coded:
            tensors[entry.name] = coded[entry.path].tensor(entry, sha256)
            continue
        leaf = leaves[entry.path]
        file = leaf.file(entry.index)
        tensors[entry.name] = StoredTensor(
            entry.name, DTYPE_NAMES[leaf.dtype], entry.hf_shape, file, sha256=sha256(file)
        )
    run = folder.parent.parent if folder.parent.name == layout.CHECKPOINTS else folder
    tokenizers = [place / layout.TOKENIZER for place in (folder, run) if (place / layout.TOKENIZER).is_dir()]
    hf = folder / layout.HF
    files = sorted(path for path in hf.iterdir() if path.name != "config.json") if hf.is_dir() else []
    return Source(
        kind="native",
        folder=folder,
        cfg=cfg,
        abstract=tree,
        entries=entries,
        tensors=tensors,
        leaf_dtypes={path: DTYPE_NAMES[leaf.dtype] for path, leaf in leaves.items()}
        | dict.fromkeys(coded, "BF16"),
        formats=formats,
        export_dtypes={entry.name: manifest.export_dtype(entry.name, entry.path) for entry in entries},
        aliases=manifest.aliases,
        hf_config=_json(hf / "config.json"),
        tokenizer_dir=tokenizers[0] if tokenizers else None,
        generation_config=_json(hf / "generation_config.json"),
        files=files,
        notes=notes,
        step=manifest.step,
    )


def _is_small(name: str) -> bool:
    """Config, tokenizer and the like: read whole when a checkpoint is opened. Weights are compared as they are read."""
    return not name.startswith((f"{layout.WEIGHTS}/", f"{layout.OPTIMIZER}/"))


def travelling_files(folder: Path) -> tuple[list[Path], list[Path], list[str]]:
    """Files of a Hugging Face folder beside weights and config.json: tokenizer, others, and names left behind."""
    tokenizer, others, skipped = [], [], []
    for path in sorted(folder.iterdir()):
        if (
            path.name.startswith(".")
            or path.name.endswith(".safetensors.index.json")
            or path.name == "config.json"
        ):
            continue
        if path.is_dir() or path.suffix.lower() in _WEIGHT_FORMATS:
            if path.suffix != ".safetensors":
                skipped.append(path.name + ("/" if path.is_dir() else ""))
        elif path.name in layout.TOKENIZER_FILES:
            tokenizer.append(path)
        else:
            others.append(path)
    return tokenizer, others, skipped


def _json(file: Path) -> dict[str, Any] | None:
    """A JSON object that travels along, or None where the file is missing."""
    if not file.is_file():
        return None
    document = parse_json(file.read_bytes(), str(file))
    if not isinstance(document, dict):
        raise DataError(f"{file}: a JSON object expected, not {json.dumps(document)[:100]}")
    return document
