"""Trees of arrays on disk: Orbax checkpoints whose leaves are written and read chunk by chunk.

Orbax itself saves a skeleton (every leaf one element of the right dtype), which gives all of its metadata; then
each leaf's zarr array is replaced by one of the real shape, whose chunks are plain files of the elements. Any
leaf, however large, is thus written in bounded memory, and plain `orbax.checkpoint.v1.load` opens the result,
sharded too: Orbax's metadata holds no shapes. (Its own save chooses chunk shapes by size, never exactly ours.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.checkpoint.atomic import start_flush
from dsv3_jax.checkpoint.layout import (
    ORBAX_ITEM,
    chunk_name,
    default_chunk,
    leaf_folder,
    read_zarr_metadata,
    zarr_metadata,
)
from dsv3_jax.errors import DataError
from dsv3_jax.hf.rules import unflatten_paths
from dsv3_jax.hf.safetensors import PIECE_BYTES, read_array
from dsv3_jax.parallel.helpers import helpers_keep_running

Record = dict[str, Any]  # {"size", "sha256"} of a file


# Given to the kernel at once. For a larger write it looks for larger runs of free memory, which cost up to three times
# the CPU time a byte (measured on a virtual machine, 32 KiB against 256 KiB and 1 MiB). A file that several threads
# write into gets whole pieces: each write takes the file's lock.
_WRITE_BYTES = 1 << 15


class _OnlyNews(logging.Filter):
    """Drops Orbax's two lines that are about the layouts OCDBT and zarr 2, which are not used here."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "Skipping merge of OCDBT" not in text and "TensorStore data files not found" not in text


@contextlib.contextmanager
def _orbax() -> Iterator[Any]:
    """Orbax's v1 module inside the context that writes this layout."""
    import jax
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    if (
        jax.distributed.is_initialized()
    ):  # each process for itself: what they do together is decided by the caller
        own = jax.process_index()
        context.multiprocessing.primary_host, context.multiprocessing.active_processes = own, {own}
        context.multiprocessing.barrier_sync_key_prefix = f"process{own}"
    saving = context.array.saving
    saving.use_ocdbt = False
    saving.use_zarr3 = True
    saving.use_compression = False
    saving.array_metadata_store = None
    saving.enable_write_sharding_file = True  # lets a plain load, without a tree of shapes, place the arrays
    logger, only_news = logging.getLogger("absl"), _OnlyNews()
    logger.addFilter(only_news)
    try:
        with context, _alone():
            yield ocp
    finally:
        logger.removeFilter(only_news)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Orbax compares a save's path among all processes, even where only one of them saves: not here."""
    import jax

    if not jax.distributed.is_initialized():
        yield
        return
    from orbax.checkpoint.experimental.v1._src.saving import execution

    compare = execution._check_directory_consistency
    execution._check_directory_consistency = lambda directory: None
    try:
        yield
    finally:
        execution._check_directory_consistency = compare


def tree_paths(tree: Any) -> dict[str, Any]:
    """Leaves by path, e.g. "params/moe/x" or "0/mu/embed_VD" for an optimiser state."""
    import jax

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def write_skeleton(item: Path, tree: Any, chunks: Mapping[str, tuple[int, ...]]) -> None:
    """An Orbax checkpoint at `item` with the tree, shapes and dtypes of `tree`, and no data yet.

    Args:
      tree: pytree of anything with shape and dtype.
      chunks: chunk shape by leaf path.
    """
    import jax

    if jax.process_count() > 1:
        _save_elements_alone(item, tree)
    else:
        save_elements(item, tree)
    for path, leaf in tree_paths(tree).items():
        folder = leaf_folder(item, path)
        if not (folder / "zarr.json").is_file():
            raise AssertionError(f"Orbax saved no {folder.name}: its naming of leaves has changed")
        (folder / "c").unlink()  # the one element
        text = zarr_metadata(tuple(leaf.shape), chunks[path], np.dtype(leaf.dtype))
        (folder / "zarr.json").write_text(text, encoding="utf-8")


def save_elements(item: Path, tree: Any) -> None:
    """An Orbax checkpoint of `tree` in which every leaf is one element, 0."""
    import jax
    import jax.numpy as jnp

    with _orbax() as ocp:
        ocp.save(item, jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), tree))


def _save_elements_alone(item: Path, tree: Any) -> None:
    """`save_elements` in a process of its own, on the CPU.

    Among several processes Orbax's save is a collective of all their devices, which has no place beside a step.
    """
    import jax

    dtypes = {path: np.dtype(leaf.dtype).name for path, leaf in tree_paths(tree).items()}
    empty: dict[str, Any] = {
        name: {} for name, branch in tree.items() if branch == {}
    }  # a model without router state
    rebuilt = unflatten_paths(dtypes) | empty
    if str(jax.tree.structure(tree)) != str(jax.tree.structure(rebuilt)):
        raise TypeError("several processes save trees of nested dictionaries only")
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    package = Path(__file__).resolve().parents[2]
    with helpers_keep_running():
        done = subprocess.run(
            [sys.executable, "-m", "dsv3_jax.checkpoint.skeleton", str(item)],
            input=json.dumps({"dtypes": dtypes, "empty": empty}),
            env={**kept, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{package}:{kept.get('PYTHONPATH', '')}"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"{item}: Orbax could not make the skeleton:\n{done.stderr[-2000:]}")


def skeleton_is_whole(item: Path, leaves: Mapping[str, Any], chunks: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether `item` has a skeleton of exactly these leaves (after a power failure its files may be empty)."""
    files = (item / "_CHECKPOINT_METADATA", item / ORBAX_ITEM / "_METADATA", item / ORBAX_ITEM / "_sharding")
    if not all(file.is_file() and file.stat().st_size > 0 for file in files):
        return False
    for path, leaf in leaves.items():
        try:
            found = read_zarr_metadata(leaf_folder(item, path))
        except DataError:
            return False
        if found != (tuple(leaf.shape), chunks[path], np.dtype(leaf.dtype)):
            return False
    return True


def write_file(file: Path, pieces: Iterator[np.ndarray], offset: int = 0) -> Record:
    """Writes flat arrays one after the other at `offset` of a file, without keeping them.

    Returns the number of bytes and their SHA-256. The file is made if it does not exist, never shortened.
    """
    digest, position = hashlib.sha256(), offset
    at_once = _WRITE_BYTES if offset == 0 else PIECE_BYTES
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        for piece in pieces:
            data = piece.reshape(-1).view(np.uint8).data
            digest.update(data)
            while len(data):
                count = os.pwrite(fd, data[:at_once], position)
                position += count
                data = data[count:]
        start_flush(fd, offset, position - offset)
    finally:
        os.close(fd)
    return {"size": position - offset, "sha256": digest.hexdigest()}


class LeafWriter:
    """Writes the chunks of one leaf of a skeleton; thread-safe, as every chunk is its own file."""

    def __init__(self, item: Path, path: str, chunk: tuple[int, ...]):
        self.folder = leaf_folder(item, path)
        self.chunk = chunk

    def file(self, index: tuple[int, ...]) -> Path:
        """The file of chunk `index` (leading indices; the rest are 0)."""
        return self.folder / chunk_name((*index, *(0,) * (len(self.chunk) - len(index))))

    def write(self, index: tuple[int, ...], pieces: Iterator[np.ndarray]) -> Record:
        """Write one chunk from flat arrays of the leaf's dtype; returns its size and SHA-256."""
        return write_file(self.file(index), pieces)


class Leaf:
    """A leaf opened for reading: `leaf[index]` is the array of one chunk, without its leading unit axes."""

    def __init__(self, item: Path, path: str):
        self.folder = leaf_folder(item, path)
        self.shape, self.chunk, self.dtype = read_zarr_metadata(self.folder)

    def file(self, index: tuple[int, ...]) -> Path:
        """The file of the chunk at leading indices `index`. Raises DataError when it is missing."""
        if (
            self.chunk[: len(index)] != (1,) * len(index)
            or self.chunk[len(index) :] != self.shape[len(index) :]
        ):
            raise DataError(f"{self.folder}: chunks {self.chunk} of {self.shape} do not end at index {index}")
        file = self.folder / chunk_name((*index, *(0,) * (len(self.shape) - len(index))))
        size = math.prod(self.chunk) * self.dtype.itemsize
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "no such file"
            raise DataError(f"{file}: {found}, {size} bytes expected")
        return file

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        return read_array(self.file(index), 0, self.dtype, self.shape[len(index) :])


def open_leaf(item: Path | str, path: str) -> Leaf:
    """The leaf `path` of the Orbax item at `item`, for reading slice by slice."""
    return Leaf(Path(item), path)


def pieces_of(block: np.ndarray) -> Iterator[np.ndarray]:
    """A block's elements in order, as flat arrays of a few MiB."""
    flat = np.ascontiguousarray(block).reshape(-1)
    step = max(1, PIECE_BYTES // flat.itemsize)
    for start in range(0, flat.size, step):
        yield flat[start : start + step]


def chunk_shapes_of(tree: Any, chunks: Mapping[str, tuple[int, ...]] | None) -> dict[str, tuple[int, ...]]:
    """The chunk shape of every leaf: as given, else at most 64 MiB split along leading axes."""
    return {
        path: (chunks or {}).get(path) or default_chunk(tuple(leaf.shape), np.dtype(leaf.dtype).itemsize)
        for path, leaf in tree_paths(tree).items()
    }
