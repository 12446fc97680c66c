"""Adapters on disk. Our own form is a checkpoint folder whose weights are pairs, with lora.json beside them; PEFT's is
`dsv3_jax.finetune.peft`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax.checkpoint import layout
from dsv3_jax.checkpoint.manifest import problems_of, read_manifest
from dsv3_jax.checkpoint.native import abstract_of, latest_step, step_folder
from dsv3_jax.checkpoint.placement import load_tree
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.finetune import peft
from dsv3_jax.finetune.base import FrozenBase, fingerprint
from dsv3_jax.finetune.lora import Lora, abstract_pairs
from dsv3_jax.hf.rules import flatten_paths
from dsv3_jax.hf.safetensors import parse_json

_MODULE = "params/mtp/"


def adapter_record(base: FrozenBase) -> dict[str, Any]:
    """The content of a run's lora.json."""
    return record_of(base.lora, base.record)


def record_of(lora: Lora, base: Mapping[str, Any]) -> dict[str, Any]:
    """The content of lora.json: what the pairs are, and path and SHA-256 of their base."""
    return {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "rslora": lora.rslora,
        "paths": list(lora.paths),
        "base": dict(base),
    }


def read_record(folder: Path) -> tuple[Lora, dict[str, Any]]:
    """The pairs' description and the record of their base. Raises DataError for a file that is not one of ours."""
    file = folder / layout.LORA
    if not file.is_file():
        raise DataError(f"{folder}: no {layout.LORA}: not an adapter")
    document = parse_json(file.read_bytes(), str(file))
    try:
        lora = Lora(
            int(document["rank"]),
            float(document["alpha"]),
            bool(document["rslora"]),
            tuple(map(str, document["paths"])),
        )
        return lora, dict(document["base"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: not the description of an adapter ({error!r})") from None


def check_base(folder: Path, base: FrozenBase) -> None:
    """Raises ConfigError when an adapter's folder belongs to another base or has other pairs."""
    lora, record = read_record(folder)
    if record.get("sha256") != base.sha256:
        other = f"{record.get('path')} (SHA-256 {str(record.get('sha256'))[:12]}...)"
        raise ConfigError(
            f"{folder} was trained on the weights of {other}; "
            f"lora.base {base.source.folder} has others ({base.sha256[:12]}...)"
        )
    if lora != base.lora:
        raise ConfigError(f"{folder} has pairs of {lora}, the run's config asks for {base.lora}")


def whole(folder: Path) -> None:
    """Raises DataError when a folder of ours is not as its manifest says, every byte of it but the optimiser's."""
    read_manifest(folder)
    problems = problems_of(folder) or problems_of(folder, hashes=True, only=_is_read)
    if problems:
        raise DataError("\n  ".join([f"{folder}: not a whole adapter", *problems[:20]]))


def _is_read(name: str) -> bool:
    return not name.startswith(f"{layout.OPTIMIZER}/")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Pairs in memory, from wherever they are.

    Attributes:
      lora: what they are.
      pairs: {"params": ...} of float32 host arrays.
      base: path and SHA-256 of the weights they were trained on, as far as the adapter says.
      folder: where they were read.
      notes: one line each for the user.
    """

    lora: Lora
    pairs: dict[str, Any]
    base: dict[str, Any]
    folder: Path
    notes: list[str]

    def check_model(self, abstract: Mapping[str, Any], base: Path, quantize: str | None = None) -> list[str]:
        """Notes on using the pairs with the weights at `base`, rounded to the format `quantize` if one is given.

        Raises ConfigError naming the first pair that does not fit the model.
        """
        leaves, found = flatten_paths(abstract), flatten_paths(self.pairs)
        missing = [path for path in self.lora.paths if path not in leaves]
        if missing:
            more = ""
            if all(path.startswith(_MODULE) for path in missing):
                more = " (its multi-token module: decoding can do without, this cannot)"
            raise ConfigError(f"{self.folder}: a pair for {missing[0]}, which the model {base} has not{more}")
        for path, leaf in flatten_paths(abstract_pairs(self.lora, abstract)).items():
            if path not in found or found[path].shape != leaf.shape:
                have = list(found[path].shape) if path in found else "missing"
                raise ConfigError(
                    f"{self.folder}: {path} is {have}; the model {base} needs {list(leaf.shape)}"
                )
        known = self.base.get("sha256")
        if known and known != fingerprint(base):
            where = self.base.get("path")
            return [f"the adapter was trained on other weights ({where}) than those of {base}"]
        rounded_to = self.base.get("rounded_to", "none")
        if rounded_to not in ("none", quantize):
            here = "not" if quantize is None else f"rounded to {quantize}"
            return [f"the adapter was trained on these weights rounded to {rounded_to}; here they are {here}"]
        return []

    @property
    def sha256(self) -> str:
        """Of the pairs and what they are."""
        digest = hashlib.sha256(repr(self.lora).encode())
        for path, leaf in flatten_paths(self.pairs).items():
            digest.update(path.encode() + np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()

    def without_module(self) -> Adapter:
        """Without the multi-token module's pairs, for a model that leaves the module out."""
        paths = tuple(path for path in self.lora.paths if not path.startswith(_MODULE))
        params = {name: tree for name, tree in self.pairs["params"].items() if name != "mtp"}
        lora = dataclasses.replace(self.lora, paths=paths)
        return dataclasses.replace(self, lora=lora, pairs={"params": params})

    def for_decoding(self, abstract: Mapping[str, Any], base: Path) -> tuple[Adapter, list[str]]:
        """The pairs that decoding with the model at `base` uses, and a note where some need a module that it has not.

        Pairs of the multi-token module change nothing that the main model gives.

        Raises ConfigError when no other pair is left.
        """
        own = [path for path in self.lora.paths if path.startswith(_MODULE)]
        if not own or any(path.startswith(_MODULE) for path in flatten_paths(abstract)):
            return self, []
        if len(own) == len(self.lora.paths):
            raise ConfigError(
                f"{self.folder}: all pairs are of the multi-token module, which the model {base} has not"
            )
        note = f"{base} has no multi-token module: the adapter's pairs for {len(own)} of its weights are left out"
        return self.without_module(), [note]


def open_adapter(folder: Path | str, cfg: ModelConfig, abstract: Mapping[str, Any]) -> Adapter:
    """An adapter of any kind: a LoRA run (its newest valid step), an adapter folder of ours, or PEFT's.

    Args:
      cfg, abstract: the model that it is for, multi-token module included: PEFT's names are read by it.
    Raises:
      ConfigError: no adapter, or one of a kind that is not supported.
      DataError: an adapter that is not whole.
    """
    folder = Path(folder)
    if (folder / peft.CONFIG).is_file():
        lora, pairs, base, notes = peft.read(folder, cfg, abstract)
        return Adapter(lora, pairs, base, folder, notes)
    folder, notes = _resolve(folder)
    whole(folder)
    lora, base = read_record(folder)
    shapes = abstract_of(read_manifest(folder))
    pairs = {
        "params": jax.device_get(
            load_tree(folder / layout.WEIGHTS, {"params": shapes["params"], "router": {}})
        )["params"]
    }
    return Adapter(lora, pairs, base, folder, notes)


def base_of(folder: Path | str) -> Path:
    """Where an adapter's base was when it was trained. Raises ConfigError when the adapter does not say."""
    folder = Path(folder)
    if (folder / peft.CONFIG).is_file():
        document = parse_json((folder / peft.CONFIG).read_bytes(), str(folder / peft.CONFIG))
        path = document.get("base_model_name_or_path") if isinstance(document, dict) else None
    else:
        path = read_record(_resolve(folder)[0])[1].get("path")
    if not isinstance(path, str):
        raise ConfigError(f"{folder} does not say which model it belongs to: name its base")
    return Path(path)


def _resolve(folder: Path) -> tuple[Path, list[str]]:
    """The folder with lora.json: itself, or a run's newest valid step; and notes for the user."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    notes: list[str] = []
    if layout.kind_of(folder) == "run":
        step, bad = latest_step(folder)
        notes = [f"step {number} is not used: {problems[0]}" for number, problems in bad.items()]
        if step is None:
            raise DataError("\n  ".join([f"{folder}: the run has no valid checkpoint", *notes]))
        folder = step_folder(folder, step)
    if not (folder / layout.LORA).is_file():
        raise ConfigError(
            f"{folder} is no adapter: neither {layout.LORA} (a LoRA run or its step) nor {peft.CONFIG} (PEFT)"
        )
    return folder, notes
