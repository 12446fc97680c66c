"""Saving native checkpoints: a snapshot on the host first, then the folder, from any number of processes.

The snapshot is all that a training step waits for. The rest (hashing, writing, flushing, renaming) touches neither
devices nor the state and may run in another thread. With several processes each writes its own chunks into one
shared folder; the first makes the folder, adds the manifest and renames it when all have written. A failure in one
is a failure in all, and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.checkpoint import layout
from dsv3_jax.checkpoint.atomic import atomic_folder, check_free, fsync_files, fsync_tree, make_parent
from dsv3_jax.checkpoint.manifest import Manifest, problems_of, read_manifest, write_manifest
from dsv3_jax.checkpoint.native import (
    chunk_shapes,
    copy_files,
    default_aliases,
    plain_files,
    tree_record,
    write_model_config,
)
from dsv3_jax.checkpoint.snapshot import LeafSnapshot, take_snapshot, write_snapshot
from dsv3_jax.checkpoint.store import chunk_shapes_of, tree_paths, write_skeleton
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import DataError, StorageError
from dsv3_jax.hf.rules import hf_entries
from dsv3_jax.hf.safetensors import DTYPE_NAMES, parse_json
from dsv3_jax.parallel.processes import Processes, processes

_RECORDS = "records-{}.json"  # beside the folder while it is built


def save_checkpoint(
    dst: Path | str, cfg: ModelConfig, variables: Mapping[str, Any], *, force: bool = False, **content: Any
) -> Manifest:
    """Save a checkpoint folder at once: `snapshot_checkpoint` (which has the arguments), then `commit`."""
    return snapshot_checkpoint(cfg, variables, copy=False, **content).commit(dst, force=force)


def snapshot_checkpoint(
    cfg: ModelConfig,
    variables: Mapping[str, Any],
    *,
    step: int | None = None,
    optimizer: Any = None,
    train_state: Mapping[str, Any] | None = None,
    tokenizer_dir: Path | str | None = None,
    hf_dir: Path | str | None = None,
    hf_dtypes: Mapping[str, Mapping[str, str]] | None = None,
    aliases: Mapping[str, str] | None = None,
    adapter: Mapping[str, Any] | None = None,
    copy: bool = True,
) -> CheckpointSnapshot:
    """Everything that a checkpoint will hold. With several processes all call it at the same point.

    Args:
      variables: {"params", "router"} of numpy or jax arrays.
      optimizer: any pytree of arrays.
      train_state: what else training needs, as JSON.
      tokenizer_dir, hf_dir: folders whose plain files travel along (tokenizer; config.json, generation_config.json).
      hf_dtypes: what an export gives back (`Manifest.hf_dtypes`); by default the dtypes in `variables`.
      aliases: names an export writes as copies; by default those of a released checkpoint.
      adapter: content of lora.json, where `variables` holds pairs.
      copy: whether the arrays may be overwritten before the snapshot is committed.
    """
    tree = {"params": variables["params"], "router": variables.get("router") or {}}
    trees = {layout.WEIGHTS: tree} | ({} if optimizer is None else {layout.OPTIMIZER: optimizer})
    flat = tree_paths(tree)
    given = {layout.WEIGHTS: chunk_shapes(hf_entries(cfg, tree))} if adapter is None else {}
    if adapter is not None:
        aliases = {}
    kind = "adapter" if adapter is not None else "weights" if optimizer is None else "training"
    chunks = {name: chunk_shapes_of(part, given.get(name)) for name, part in trees.items()}
    if hf_dtypes is None:
        leaves = {path: DTYPE_NAMES[np.dtype(leaf.dtype)] for path, leaf in flat.items()}
        hf_dtypes = {"leaves": leaves, "tensors": {}}
    return CheckpointSnapshot(
        cfg=cfg,
        step=step,
        shapes={name: _shapes(part) for name, part in trees.items()},
        chunks=chunks,
        parts={name: take_snapshot(part, chunks[name], copy=copy) for name, part in trees.items()},
        nbytes=sum(leaf.nbytes for part in trees.values() for leaf in tree_paths(part).values()),
        texts={
            name: json.dumps(dict(content), indent=1)
            for name, content in ((layout.TRAIN_STATE, train_state), (layout.LORA, adapter))
            if content is not None
        },
        files={
            layout.TOKENIZER: plain_files(tokenizer_dir),
            layout.HF: plain_files(hf_dir),
        },
        manifest={
            "kind": kind,
            "step": step,
            "tree": tree_record(flat),
            "hf_dtypes": hf_dtypes,
            "aliases": default_aliases(cfg, tree) if aliases is None else aliases,
        },
    )


def _shapes(tree: Any) -> Any:
    import jax

    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@dataclass(frozen=True)
class CheckpointSnapshot:
    """A checkpoint in memory, independent of the arrays it was taken from; it can be committed once.

    Attributes:
      shapes, chunks, parts: by item ("weights", "optimizer"): tree of shapes, chunk shapes, this process's chunks.
      nbytes: of all arrays.
      texts: files to write, by name.
      files: plain files to bring along, by folder.
      manifest: what the manifest says beside files and checksums.
    """

    cfg: ModelConfig
    step: int | None
    shapes: dict[str, Any]
    chunks: dict[str, dict[str, tuple[int, ...]]]
    parts: dict[str, dict[str, LeafSnapshot]]
    nbytes: int
    texts: dict[str, str]
    files: dict[str, list[Path]]
    manifest: dict[str, Any]

    def commit(self, dst: Path | str, *, force: bool = False) -> Manifest:
        """Write the folder `dst`: complete, or not there at all. Every process calls it.

        The checksums are those of the bytes as they went to the disk; sizes are compared once more after the flush.

        Raises:
          ConfigError: `dst` exists and `force` is not set, or is no checkpoint.
          StorageError, OSError: the disk is full or failing; nothing is left behind and an old `dst` is untouched.
        """
        dst, group = Path(dst), processes()
        with contextlib.ExitStack() as stack:

            def begin() -> str | None:
                if not group.first:
                    return None
                make_parent(dst)
                check_free(dst.parent, self.nbytes, f"checkpoint {dst.name}")
                folder = stack.enter_context(atomic_folder(dst, force=force))
                self._begin(folder)
                return str(folder)

            folder = Path(str(group.together("checkpoint/begin", begin)[0]))
            group.together("checkpoint/write", lambda: self._write(folder, group))

            def finish() -> None:
                if group.first:
                    self._finish(folder, group)
                    stack.close()  # flush, rename

            group.together("checkpoint/finish", finish)
        return read_manifest(dst)

    def _begin(self, folder: Path) -> None:
        write_model_config(folder, self.cfg)
        for name, files in self.files.items():
            copy_files(files, folder / name)
        for name, text in self.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        for name, shapes in self.shapes.items():
            write_skeleton(folder / name, shapes, self.chunks[name])

    def _write(self, folder: Path, group: Processes) -> None:
        records: dict[str, Any] = {}
        for name, parts in self.parts.items():
            found = write_snapshot(folder / name, parts)
            records |= {f"{name}/{file}": record for file, record in found.items()}
        if not group.first:  # the first flushes all that it wrote when it renames
            fsync_files([folder / name for name in records])
        (folder.parent / _RECORDS.format(group.index)).write_text(json.dumps(records), encoding="utf-8")

    def _finish(self, folder: Path, group: Processes) -> None:
        hashed: dict[str, Any] = {}
        for index in range(group.count):
            file = folder.parent / _RECORDS.format(index)
            hashed |= parse_json(file.read_bytes(), str(file))
        expected = sum(
            int(np.prod([s // c for s, c in zip(leaf.shape, chunks[path], strict=True)], dtype=np.int64))
            for name, chunks in self.chunks.items()
            for path, leaf in tree_paths(self.shapes[name]).items()
        )
        if len(hashed) != expected:
            raise DataError(f"{folder}: {len(hashed)} of {expected} chunks were written")
        write_manifest(folder, hashed=hashed, **self.manifest)
        fsync_tree(folder)
        problems = problems_of(folder)
        if problems:
            raise StorageError("\n  ".join([f"{folder}: not as written", *problems[:5]]))
