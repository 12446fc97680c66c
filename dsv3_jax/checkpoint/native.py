"""Parts and loading of native checkpoints, and finding the newest good step of a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.checkpoint import layout
from dsv3_jax.checkpoint.manifest import Manifest, problems_of, read_manifest
from dsv3_jax.checkpoint.placement import load_tree
from dsv3_jax.config import ModelConfig, dump_yaml, from_mapping, load_yaml, to_mapping
from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.hf.rules import HFEntry, hf_entries, unflatten_paths
from dsv3_jax.hf.safetensors import parse_json

AbstractFn = Callable[[ModelConfig], Mapping[str, Any]]


@dataclass(frozen=True)
class Loaded:
    """A restored checkpoint: config, variables, and what training left, if it was asked for."""

    cfg: ModelConfig
    variables: dict[str, Any]
    optimizer: Any
    train_state: dict[str, Any] | None
    manifest: Manifest


def chunk_shapes(entries: list[HFEntry]) -> dict[str, tuple[int, ...]]:
    """Chunk shape by leaf: one Hugging Face tensor, so that a conversion never holds more than one."""
    return {entry.path: (*(1,) * len(entry.index), *entry.block_shape) for entry in entries}


def tree_record(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The manifest's tree: shape and dtype by leaf path."""
    return {
        path: {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name} for path, leaf in flat.items()
    }


def write_model_config(folder: Path, cfg: ModelConfig) -> None:
    """Write model.yaml."""
    (folder / layout.MODEL).write_text(dump_yaml(to_mapping(cfg)), encoding="utf-8")


def read_model_config(folder: Path | str) -> ModelConfig:
    """The ModelConfig of a native checkpoint. Raises ConfigError for a bad file."""
    return from_mapping(ModelConfig, load_yaml(Path(folder) / layout.MODEL), "model")


def default_aliases(cfg: ModelConfig, abstract: Mapping[str, Any]) -> dict[str, str]:
    """The multi-token module's copies of embedding and head that a released checkpoint carries beside the main ones.

    A model made here shares them in memory; an export writes them again, as readers of released files expect.
    """
    if not cfg.num_nextn_predict_layers:
        return {}
    shapes = dict(abstract["params"])
    depth = (cfg.num_nextn_predict_layers,)
    mtp = dict(shapes["mtp"])
    main = {"embed_VD": "embed_VD"} | ({} if cfg.tie_word_embeddings else {"head_VD": "head_VD"})
    shared = {leaf: of for leaf, of in main.items() if leaf not in mtp}
    for leaf, of in shared.items():
        mtp[leaf] = np.broadcast_to(np.zeros((), np.int8), (*depth, *shapes[of].shape))
    entries = hf_entries(cfg, {"params": {**shapes, "mtp": mtp}})
    names = {entry.path: entry.name for entry in entries if not entry.index}
    return {
        entry.name: names[f"params/{shared[entry.path.rpartition('/')[2]]}"]
        for entry in entries
        if entry.path in {f"params/mtp/{leaf}" for leaf in shared}
    }


def copy_files(sources: list[Path], folder: Path) -> None:
    """Copy plain files into `folder`, which is made if there is anything to copy."""
    for source in sources:
        folder.mkdir(exist_ok=True)
        shutil.copyfile(source, folder / source.name)


def plain_files(folder: Path | str | None) -> list[Path]:
    """The plain files of a folder that travel as they are; [] for None. Raises ConfigError when it is no folder."""
    if folder is None:
        return []
    if not Path(folder).is_dir():
        raise ConfigError(f"{folder}: no such folder")
    return sorted(path for path in Path(folder).iterdir() if path.is_file())


def load_checkpoint(
    folder: Path | str,
    abstract: Mapping[str, Any] | AbstractFn | None = None,
    *,
    dtype: Any = None,
    sharding: Any = None,
    optimizer_abstract: Any = None,
) -> Loaded:
    """Restore a native checkpoint folder; several processes each read their part of it.

    Args:
      abstract: the tree that is expected, {"params", "router"} of ShapeDtypeStruct (with shardings, if wanted), or
        a function of the stored config that makes it; None takes shapes and dtypes from the manifest.
      dtype: cast of all weights; router biases stay as `abstract` has them (float32).
      sharding: one sharding for all leaves, or a tree of them like `abstract`.
      optimizer_abstract: pytree to restore the optimiser into; None leaves it on disk.
    Raises:
      DataError: no valid manifest, a missing file, or another tree or shape than expected.
    """
    import jax

    folder = Path(folder)
    manifest = read_manifest(folder)
    problems = problems_of(folder)
    if problems:
        raise DataError("\n  ".join([f"{folder}: not a whole checkpoint", *problems[:20]]))
    cfg = read_model_config(folder)
    if abstract is None:
        tree = abstract_of(manifest)
    else:
        tree = dict(abstract(cfg) if callable(abstract) else abstract)
    if dtype is not None:
        cast = jax.tree.map(lambda leaf: _struct(leaf, dtype=dtype), tree["params"])
        tree = {**tree, "params": cast}
    if sharding is not None:
        if isinstance(sharding, jax.sharding.Sharding):
            sharding = jax.tree.map(lambda _: sharding, tree)
        tree = jax.tree.map(lambda leaf, where: _struct(leaf, sharding=where), tree, sharding)
    variables = load_tree(folder / layout.WEIGHTS, tree)
    optimizer = None
    if optimizer_abstract is not None:
        if not (folder / layout.OPTIMIZER).is_dir():
            raise DataError(f"{folder}: holds no optimizer state ({manifest.kind!r} checkpoint)")
        optimizer = load_tree(folder / layout.OPTIMIZER, optimizer_abstract)
    state = folder / layout.TRAIN_STATE
    train_state = parse_json(state.read_bytes(), str(state)) if state.is_file() else None
    return Loaded(cfg, {"router": {}, **variables}, optimizer, train_state, manifest)


def _struct(leaf: Any, *, dtype: Any = None, sharding: Any = None) -> Any:
    import jax

    return jax.ShapeDtypeStruct(
        leaf.shape, dtype or leaf.dtype, sharding=sharding or getattr(leaf, "sharding", None)
    )


def abstract_of(manifest: Manifest) -> dict[str, Any]:
    """The tree of shapes that a manifest records."""
    import jax
    import jax.numpy as jnp

    flat = {
        path: jax.ShapeDtypeStruct(tuple(leaf["shape"]), jnp.dtype(leaf["dtype"]))
        for path, leaf in manifest.tree.items()
    }
    return {"params": {}, "router": {}, **unflatten_paths(flat)}


def steps_of(run: Path | str) -> list[int]:
    """Steps of a run folder that have a folder, valid or not, in ascending order."""
    folder = Path(run) / layout.CHECKPOINTS
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())


def step_folder(run: Path | str, step: int) -> Path:
    """`run`/checkpoints/`step`."""
    return Path(run) / layout.CHECKPOINTS / str(step)


def validate_step(folder: Path | str, *, hashes: bool = False, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with a step folder (see `problems_of`); [] when it is whole."""
    return problems_of(folder, hashes=hashes, share=share)


def latest_step(run: Path | str, *, hashes: bool = False) -> tuple[int | None, dict[int, list[str]]]:
    """The newest valid step of a run, and the problems of every newer one (to be set aside by its owner)."""
    bad: dict[int, list[str]] = {}
    for step in reversed(steps_of(run)):
        problems = validate_step(step_folder(run, step), hashes=hashes)
        if not problems:
            return step, bad
        bad[step] = problems
    return None, bad


def set_aside(folder: Path | str) -> Path:
    """Rename a bad step folder to `N.corrupt` (`N.corrupt.2`, ... if that exists); returns the new path."""
    folder = Path(folder)
    target, count = folder.with_name(f"{folder.name}.corrupt"), 1
    while target.exists():
        count += 1
        target = folder.with_name(f"{folder.name}.corrupt.{count}")
    folder.rename(target)
    return target
