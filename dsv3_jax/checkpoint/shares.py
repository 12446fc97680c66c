"""Any source straight into its shards: each process reads what its devices hold, a leaf at a time.

`Source.load` fills whole leaves on the host first. Here the host holds, beside a few tensors, one leaf's part of the
devices that have the same layers and experts; so a mesh takes a base that no host could hold. Quantised leaves come in
their codes, rounded on the way where that is asked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from dsv3_jax.checkpoint.source import Source
from dsv3_jax.hf.rules import HFEntry, flatten_paths, unflatten_paths
from dsv3_jax.hf.safetensors import DTYPE_NAMES
from dsv3_jax.hf.tensors import fill
from dsv3_jax.quantization.formats import as_stored, parse_format
from dsv3_jax.quantization.leaf import Quantized
from dsv3_jax.quantization.streamed import quantized_pieces

Region = tuple[tuple[int, int], ...]


def load_shares(
    source: Source, abstract: Mapping[str, Any], formats: Mapping[str, str], *, threads: int = 4
) -> dict[str, Any]:
    """The leaves of `abstract` on their devices; what `Source.load` gives, cut.

    Args:
      abstract: {"params", "router"} of `jax.ShapeDtypeStruct` with shardings (of any number of processes), `Quantized`
        leaves of them where `formats` has one. Leaves of the source that it lacks are not read.
      formats: quantisation format of each quantised leaf, codes as they are stored or rounded to nearest now.
    Raises:
      DataError: a file that is not whole, a weight that cannot be rounded.
    """
    entries: dict[str, list[HFEntry]] = {}
    for entry in source.entries:
        entries.setdefault(entry.path, []).append(entry)
    leaves: dict[str, Any] = {}
    with ThreadPoolExecutor(threads) as pool:
        for path, leaf in flatten_paths(abstract).items():
            if path not in formats:
                leaves[path] = _place(source, entries[path], leaf, None, "", pool)
                continue
            assert isinstance(leaf, Quantized), path
            parts = {
                name: _place(source, entries[path], part, formats[path], name, pool)
                for name in ("codes", "scales", "zeros")
                if (part := getattr(leaf, name)) is not None
            }
            leaves[path] = Quantized(
                parts["codes"], parts["scales"], parts.get("zeros"), leaf.coding, leaf.block_shape
            )
    return {"params": {}, "router": {}, **unflatten_paths(leaves)}


def _place(
    source: Source,
    entries: Sequence[HFEntry],
    leaf: jax.ShapeDtypeStruct,
    fmt: str | None,
    part: str,
    pool: ThreadPoolExecutor,
) -> jax.Array:
    """One array on its devices, read for the devices of the same layers and experts together, one set after another."""
    counts = len(entries[0].index)
    sharding: Any = leaf.sharding
    sets: dict[Region, dict[jax.Device, Region]] = {}
    for device, slices in sharding.addressable_devices_indices_map(leaf.shape).items():
        region = tuple(s.indices(size)[:2] for s, size in zip(slices, leaf.shape, strict=True))
        sets.setdefault(region[:counts], {})[device] = region
    arrays: dict[jax.Device, jax.Array] = {}
    for which, devices in sets.items():
        blocks = {
            region: _apart([stop - start for start, stop in region], leaf.dtype)
            for region in devices.values()
        }
        inside = [
            entry
            for entry in entries
            if all(start <= i < stop for i, (start, stop) in zip(entry.index, which, strict=True))
        ]
        assert len(inside) == math.prod(stop - start for start, stop in which), (entries[0].path, which)
        read = functools.partial(_read, source, fmt, part, leaf, blocks)
        list(pool.map(read, inside))
        for device, region in devices.items():
            arrays[device] = jax.device_put(blocks[region], device)
        jax.block_until_ready(
            [arrays[device] for device in devices]
        )  # copied: the blocks are free from here on
        del blocks, read
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, list(arrays.values()))


def _apart(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An empty array whose memory no device takes for its own: it begins 16 bytes past a multiple of 64.

    Several devices may be given one block, and on the CPU JAX takes an aligned one as it is, `may_alias` or not.
    """
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + 80, np.uint8)
    start = -raw.ctypes.data % 64 + 16
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _read(
    source: Source,
    fmt: str | None,
    part: str,
    leaf: jax.ShapeDtypeStruct,
    blocks: Mapping[Region, np.ndarray],
    entry: HFEntry,
) -> None:
    """One tensor into every block that holds a part of it; straight into it where the block holds all of it."""
    counts = len(entry.index)
    matrix = leaf.shape[counts:]
    whole: np.ndarray | None = None
    for region, block in blocks.items():
        at = tuple(i - start for i, (start, _) in zip(entry.index, region, strict=False))
        if whole is None:
            all_of_it = block[at].shape == matrix
            whole = block[at] if all_of_it else np.empty(matrix, leaf.dtype)
            fill(whole.reshape(-1), _pieces(source, entry, fmt, part, leaf.dtype))
            if all_of_it:
                continue
        block[at] = whole[tuple(slice(start, stop) for start, stop in region[counts:])]


def _pieces(source: Source, entry: HFEntry, fmt: str | None, part: str, dtype: Any) -> Iterator[np.ndarray]:
    """The tensor, or a part of its codes, as flat pieces of `dtype`."""
    tensor = source.tensors[entry.name]
    if fmt is None:
        yield from tensor.pieces(DTYPE_NAMES[np.dtype(dtype)])
        return
    stored = source.formats.get(entry.path) == as_stored(fmt)
    for piece in tensor.part_pieces(part) if stored else quantized_pieces(tensor, parse_format(fmt), part):
        # Codes are bytes whatever they are called; powers of two (E8M0) become float32, as in `quantized_leaf`.
        yield piece.view(dtype) if part == "codes" else piece.astype(dtype, copy=False)
