"""Trees on disk to arrays on devices: each process reads what its devices hold, every chunk once.

Orbax reads the same files, but a chunk (one Hugging Face tensor) once for each device that holds a part of it, and
with barriers between the processes.
"""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.checkpoint.layout import ORBAX_ITEM, chunk_grid, chunk_name, leaf_folder, read_zarr_metadata
from dsv3_jax.checkpoint.store import Leaf, tree_paths
from dsv3_jax.errors import DataError
from dsv3_jax.hf.safetensors import read_array


def load_tree(item: Path | str, abstract: Any, *, threads: int = 4) -> Any:
    """Restore a pytree of arrays.

    Args:
      item: a folder written by `save_tree` or a conversion.
      abstract: pytree of `jax.ShapeDtypeStruct`; a dtype other than the stored one is a cast, a sharding (of any
        number of processes) places the leaf, no sharding means this process's first device.
    Raises:
      DataError: a leaf or a chunk of it is missing, or has another shape.
    """
    import jax

    item = Path(item)
    _check(item, abstract)
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ThreadPoolExecutor(threads) as pool:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: _place(
                Leaf(item, jax.tree_util.keystr(path, simple=True, separator="/")),
                leaf.dtype,
                getattr(leaf, "sharding", None) or first,
                pool,
            ),
            abstract,
        )


def _check(item: Path, abstract: Any) -> None:
    wanted = tree_paths(abstract)
    problems = []
    for path, leaf in wanted.items():
        folder = leaf_folder(item, path)
        shape, chunk, _ = read_zarr_metadata(folder)
        lost = {chunk_name(index) for index in chunk_grid(shape, chunk)} - set(os.listdir(folder))
        if lost:
            problems.append(f"{path}: {len(lost)} chunk(s) missing, such as {folder / min(lost)}")
        if shape != tuple(leaf.shape):
            problems.append(f"{path}: shape {list(shape)} stored, {list(leaf.shape)} expected")
    stored = {folder.name for folder in (item / ORBAX_ITEM).iterdir() if folder.is_dir()}
    extra = stored - {path.replace("/", ".") for path in wanted}
    problems += [f"{name}: stored, but not expected" for name in sorted(extra)]
    if problems:
        raise DataError("\n  ".join([f"{item}: does not fit", *problems]))


def _place(leaf: Leaf, dtype: Any, sharding: Any, pool: ThreadPoolExecutor) -> Any:
    """One leaf on its devices; on the host there is no more than this process's part of it and some chunks."""
    import jax

    def bounds(slices: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
        return tuple(s.indices(size)[:2] for s, size in zip(slices, leaf.shape, strict=True))

    devices = {
        device: bounds(slices)
        for device, slices in sharding.addressable_devices_indices_map(leaf.shape).items()
    }
    blocks = {
        region: np.empty([stop - start for start, stop in region], dtype) for region in devices.values()
    }
    needed: dict[tuple[int, ...], list[tuple[tuple[int, int], ...]]] = {}
    for region in blocks:
        touched = [range(a // c, -(-b // c)) for (a, b), c in zip(region, leaf.chunk, strict=True)]
        for index in itertools.product(*touched):
            needed.setdefault(index, []).append(region)

    def read(index: tuple[int, ...]) -> None:
        chunk = read_array(leaf.folder / chunk_name(index), 0, leaf.dtype, leaf.chunk)
        for region in needed[index]:
            source, target = [], []
            for i, c, (a, b) in zip(index, leaf.chunk, region, strict=True):
                start, stop = max(i * c, a), min((i + 1) * c, b)
                source.append(slice(start - i * c, stop - i * c))
                target.append(slice(start - a, stop - a))
            blocks[region][tuple(target)] = chunk[tuple(source)]

    list(pool.map(read, needed))
    # No aliasing: several devices may hold one block, and the step overwrites its state in place.
    arrays = [jax.device_put(blocks[region], device, may_alias=False) for device, region in devices.items()]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)
