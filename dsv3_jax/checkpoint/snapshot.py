"""Host copies of a tree of arrays, cut into chunks: what one process writes of a checkpoint.

Leaves may be spread over devices and processes in any way. A chunk (one Hugging Face tensor) is written by one
process: one that holds all of its parts, taking turns where several do. Where no process holds a chunk whole, the
leaf is re-sharded on the devices, a slab at a time, so that cuts fall between chunks; what moves is an all-to-all.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.checkpoint.layout import chunk_grid
from dsv3_jax.checkpoint.store import (
    LeafWriter,
    Record,
    chunk_shapes_of,
    pieces_of,
    tree_paths,
    write_skeleton,
)
from dsv3_jax.parallel.processes import processes

Index = tuple[int, ...]
Slices = tuple[slice, ...]
SLAB_BYTES = 256 << 20  # of a re-sharded slab on one device


@dataclass
class LeafSnapshot:
    """The chunks of a leaf that this process writes.

    parts: by chunk index, the blocks that make it up and where in the chunk each of them lies.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    parts: dict[Index, list[tuple[Slices, np.ndarray]]] = field(default_factory=dict)

    def take(self, index: Index) -> np.ndarray:
        """One chunk; its memory is given up here once it is written."""
        parts = self.parts.pop(index)
        if len(parts) == 1 and parts[0][1].shape == self.chunk:
            return parts[0][1]
        block = np.empty(self.chunk, self.dtype)
        assert sum(part.size for _, part in parts) == block.size, (index, self.shape, self.chunk)
        for where, part in parts:
            block[where] = part
        return block


def take_snapshot(tree: Any, chunks: Mapping[str, tuple[int, ...]], *, copy: bool) -> dict[str, LeafSnapshot]:
    """The chunks of `tree` that this process writes, by leaf path. All processes call it at the same point.

    Args:
      chunks: chunk shape by leaf path.
      copy: whether the result must outlive the arrays (which the next step may overwrite in place).
    """
    import jax

    turn = itertools.count()
    snapshots: dict[str, LeafSnapshot] = {}
    local: list[tuple[LeafSnapshot, _Grid, dict[Index, int]]] = []
    spread: list[tuple[LeafSnapshot, Any]] = []
    for path, leaf in tree_paths(tree).items():
        snapshot = snapshots[path] = LeafSnapshot(tuple(leaf.shape), np.dtype(leaf.dtype), chunks[path])
        if not isinstance(leaf, jax.Array):
            _add_numpy(snapshot, leaf, copy)
            continue
        grid = _Grid(leaf)
        owners = _owners(snapshot, grid, turn)
        if owners is None:
            spread.append((snapshot, leaf))
        else:
            local.append((snapshot, grid, owners))
            for cell in grid.local().values():
                cell.copy_to_host_async()
    for snapshot, grid, owners in local:
        _add(snapshot, grid, owners, copy)
    programs = [_cut_program(snapshot, leaf) for snapshot, leaf in spread]
    if (
        programs
    ):  # compiled everywhere before it runs anywhere: collectives do not wait long for a late process
        processes().exchange("checkpoint/compiled", None)
    for (snapshot, leaf), program in zip(spread, programs, strict=True):
        _add_resharded(snapshot, leaf, *program, turn)
    return snapshots


def _add_numpy(snapshot: LeafSnapshot, leaf: Any, copy: bool) -> None:
    """A host array is the same in every process; the first one writes it."""
    import jax

    if jax.process_index() == 0:
        block = np.array(leaf) if copy else np.asarray(leaf)
        for index in chunk_grid(snapshot.shape, snapshot.chunk):
            region = _region(index, snapshot.chunk)
            snapshot.parts[index] = [(tuple(slice(0, size) for size in snapshot.chunk), block[region])]


def _owners(snapshot: LeafSnapshot, grid: _Grid, turn: Iterator[int]) -> dict[Index, int] | None:
    """Which process writes each chunk; None when no process holds all of some chunk."""
    owners: dict[Index, int] = {}
    for index in chunk_grid(snapshot.shape, snapshot.chunk):
        holders = grid.holders(_region(index, snapshot.chunk))
        if not holders:
            return None
        owners[index] = holders[next(turn) % len(holders)]
    return owners


def _region(index: Index, chunk: tuple[int, ...]) -> Slices:
    return tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunk, strict=True))


class _Grid:
    """The cells that a sharding cuts an array into, and which process holds which."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.cell = array.sharding.shard_shape(array.shape)
        self.processes: dict[Index, set[int]] = {}
        for device, slices in array.sharding.devices_indices_map(array.shape).items():
            self.processes.setdefault(self._cell_of(slices), set()).add(device.process_index)
        self._holders: dict[tuple[range, ...], list[int]] = {}

    def _cell_of(self, slices: Slices) -> Index:
        return tuple((s.start or 0) // size for s, size in zip(slices, self.cell, strict=True))

    def cells(self, region: Slices) -> tuple[range, ...]:
        """Range of cells along each axis that a region touches."""
        return tuple(
            range(s.start // size, (s.stop - 1) // size + 1)
            for s, size in zip(region, self.cell, strict=True)
        )

    def holders(self, region: Slices) -> list[int]:
        """The processes that hold all of a region."""
        cells = self.cells(region)
        if cells not in self._holders:
            found = [self.processes[cell] for cell in itertools.product(*cells)]
            self._holders[cells] = sorted(set.intersection(*found))
        return self._holders[cells]

    def local(self) -> dict[Index, Any]:
        """This process's cells, each once."""
        return {self._cell_of(shard.index): shard.data for shard in reversed(self.array.addressable_shards)}


def _host(data: Any, copy: bool) -> np.ndarray:
    """A device's array on the host. With `copy` never the device's own memory, which is what the CPU backend gives."""
    block = np.asarray(data)
    if copy and data.nbytes and block.ctypes.data == data.unsafe_buffer_pointer():
        return block.copy()
    return block


def _add(
    snapshot: LeafSnapshot, grid: _Grid, owners: Mapping[Index, int], copy: bool, first_row: int = 0
) -> None:
    """Adds this process's chunks, as far as they lie in the array of `grid` (rows from `first_row` on of the leaf)."""
    import jax

    me, rows = jax.process_index(), grid.array.shape[0] if grid.array.shape else 0
    mine: dict[Index, list[tuple[Index, Slices]]] = {}
    for index, owner in owners.items():
        if owner != me:
            continue
        region = _region(index, snapshot.chunk)
        if rows != (snapshot.shape[0] if snapshot.shape else 0):
            start, stop = (
                max(region[0].start - first_row, 0),
                min(region[0].stop - first_row, rows),
            )
            if start >= stop:
                continue
            region = (slice(start, stop), *region[1:])
        for cell in itertools.product(*grid.cells(region)):
            mine.setdefault(cell, []).append((index, region))
    local = grid.local()
    for cell, regions in mine.items():
        # Copied at once where all of it is needed; else only the parts.
        at_once = sum(math.prod(s.stop - s.start for s in region) for _, region in regions)
        whole = at_once >= math.prod(grid.cell)
        block = _host(local[cell], copy and whole)
        for index, region in regions:
            source, target = [], []
            for axis, (s, c, size) in enumerate(zip(region, cell, grid.cell, strict=True)):
                start, stop = max(s.start, c * size), min(s.stop, (c + 1) * size)
                source.append(slice(start - c * size, stop - c * size))
                begin = index[axis] * snapshot.chunk[axis] - (first_row if axis == 0 else 0)
                target.append(slice(start - begin, stop - begin))
            part = block[tuple(source)]
            part = np.array(part) if copy and not whole else part
            snapshot.parts.setdefault(index, []).append((tuple(target), part))


# --- leaves of which no process holds whole chunks -------------------------------------------------------------


def _add_resharded(snapshot: LeafSnapshot, leaf: Any, rows: int, cut: Any, turn: Iterator[int]) -> None:
    owners: dict[Index, int] = {}
    chunk = snapshot.chunk
    for first in range(0, snapshot.shape[0], rows):
        grid = _Grid(cut(leaf, np.int32(first)))
        touched = range(first // chunk[0], (first + rows - 1) // chunk[0] + 1)
        here = [(row, *rest) for row in touched for rest in chunk_grid(snapshot.shape[1:], chunk[1:])]
        for index in here:
            if index not in owners:
                region = list(_region(index, snapshot.chunk))
                start = max(region[0].start - first, 0)
                region[0] = slice(start, min(region[0].stop - first, rows))
                holders = grid.holders(tuple(region))
                assert holders, (snapshot.shape, chunk, rows)
                owners[index] = holders[next(turn) % len(holders)]
        # Not copied: the slab belongs to nobody else.
        _add(snapshot, grid, {index: owners[index] for index in here}, copy=False, first_row=first)


def _cut_program(snapshot: LeafSnapshot, leaf: Any) -> tuple[int, Any]:
    """Rows of a slab, and the compiled program (leaf, first row) -> slab whose cuts fall between chunks."""
    from jax.sharding import NamedSharding

    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"a leaf of {leaf.shape} is cut between processes by {sharding}: not a NamedSharding")
    rows, spec = _slab(snapshot, sharding)
    target = NamedSharding(sharding.mesh, spec)
    return rows, _compiled_cut(leaf.shape, leaf.dtype, sharding, rows, target)


@functools.cache
def _compiled_cut(shape: tuple[int, ...], dtype: Any, sharding: Any, rows: int, target: Any) -> Any:
    import jax

    cut = jax.jit(
        lambda leaf, first: jax.lax.dynamic_slice_in_dim(leaf, first, rows, axis=0), out_shardings=target
    )
    leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return cut.lower(leaf, jax.ShapeDtypeStruct((), np.int32)).compile()


def _slab(snapshot: LeafSnapshot, sharding: Any) -> tuple[int, Any]:
    """Rows (of axis 0) of a slab, and a partition of it that cuts no chunk: as large as `SLAB_BYTES` allows."""
    from jax.sharding import PartitionSpec

    shape, chunk, mesh = snapshot.shape, snapshot.chunk, sharding.mesh
    entries = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    axes = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries]
    candidates = [shape[0]]
    if not any(
        mesh.shape[axis] > 1 for axis in axes[0]
    ):  # rows on one device can be cut off without moving them
        candidates = [n for n in range(shape[0], 0, -1) if shape[0] % n == 0]
        candidates = [n for n in candidates if n % chunk[0] == 0 or chunk[0] % n == 0]
    for rows in candidates:
        slab = (rows, *shape[1:])
        kept = _between_chunks(slab, chunk, axes, mesh)
        parts = math.prod(mesh.shape[axis] for entry in kept for axis in entry)
        if math.prod(slab) * snapshot.dtype.itemsize / parts <= SLAB_BYTES:
            break
    return rows, PartitionSpec(*(entry or None for entry in kept))


def _between_chunks(
    shape: tuple[int, ...], chunk: tuple[int, ...], axes: list[tuple[str, ...]], mesh: Any
) -> list[tuple[str, ...]]:
    """Mesh axes by array axis, such that cuts fall between chunks; a mesh axis that fits nowhere cuts nothing."""
    kept: list[list[str]] = [[] for _ in shape]
    parts = [1] * len(shape)
    chunks = [max(size // c, 1) for size, c in zip(shape, chunk, strict=True)]
    homeless = []
    for at, names in enumerate(axes):
        for name in names:
            if chunks[at] % (parts[at] * mesh.shape[name]) == 0:
                kept[at].append(name)
                parts[at] *= mesh.shape[name]
            else:
                homeless.append(name)
    for name in homeless:
        for at in sorted(range(len(shape)), key=lambda at: -chunks[at] // parts[at]):
            if chunks[at] % (parts[at] * mesh.shape[name]) == 0:
                kept[at].append(name)
                parts[at] *= mesh.shape[name]
                break
    return [tuple(names) for names in kept]


# --- to the disk ------------------------------------------------------------------------------------------------


def write_snapshot(
    item: Path, snapshots: Mapping[str, LeafSnapshot], *, threads: int = 4
) -> dict[str, Record]:
    """Write this process's chunks into the skeleton at `item`; size and SHA-256 of each file, by path below `item`."""

    def write(job: tuple[LeafSnapshot, LeafWriter, Index]) -> tuple[str, Record]:
        snapshot, writer, index = job
        record = writer.write(index, pieces_of(snapshot.take(index)))
        return str(writer.file(index).relative_to(item)), record

    jobs = []
    for path, snapshot in snapshots.items():
        writer = LeafWriter(item, path, snapshot.chunk)
        jobs += [(snapshot, writer, index) for index in sorted(snapshot.parts)]
    with ThreadPoolExecutor(threads) as pool:
        return dict(pool.map(write, jobs))


def save_tree(
    item: Path | str, tree: Any, chunks: Mapping[str, tuple[int, ...]] | None = None, *, threads: int = 4
) -> dict[str, Record]:
    """Save a pytree of arrays of this process as an Orbax checkpoint with exact chunk shapes.

    Args:
      item: folder to make.
      tree: numpy or jax arrays.
      chunks: chunk shape by leaf path; other leaves are split along leading axes into at most 64 MiB.
    Returns:
      Size and SHA-256 of every chunk file, by path relative to `item`.
    Raises:
      OSError: as it comes from the disk.
    """
    item, shapes = Path(item), chunk_shapes_of(tree, chunks)
    write_skeleton(item, tree, shapes)
    return write_snapshot(item, take_snapshot(tree, shapes, copy=False), threads=threads)
