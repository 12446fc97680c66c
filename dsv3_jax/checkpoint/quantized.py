"""Quantised leaves on disk: where an array leaf is one zarr array, a quantised one is two or three beside each other.

`params/.../o_DHU` becomes `params/.../o_DHU/codes`, `/scales` and, with zero points, `/zeros`. Chunks are again one
Hugging Face tensor: its codes as a matrix [rows, columns] and its scales; the manifest names the format of the leaf.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.checkpoint import layout
from dsv3_jax.checkpoint.jobs import Conversion
from dsv3_jax.checkpoint.store import Leaf, open_leaf, skeleton_is_whole, write_skeleton
from dsv3_jax.errors import DataError
from dsv3_jax.hf.rules import HFEntry, unflatten_paths
from dsv3_jax.hf.safetensors import DTYPE_NAMES, DTYPES, TensorInfo
from dsv3_jax.hf.tensors import SCALES, StoredTensor
from dsv3_jax.quantization.formats import Format, parse_format

E8M0 = "F8_E8M0"  # powers of two: zarr has no such type, so their bytes are stored as uint8


@dataclasses.dataclass(frozen=True)
class Stored:
    """One zarr array of a checkpoint: shape, dtype, chunk shape."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]


def stored_arrays(
    entries: Iterable[HFEntry],
    leaves: Mapping[str, Any],
    dtypes: Mapping[str, str],
    formats: Mapping[str, str],
    scale_dtypes: Mapping[str, str] | None = None,
) -> dict[str, Stored]:
    """Every array of a checkpoint by path, parts of quantised leaves included.

    Args:
      entries: all Hugging Face tensors.
      leaves: leaf path -> anything with `.shape`.
      dtypes: safetensors dtype of each leaf that is not quantised.
      formats: format of each leaf that is.
      scale_dtypes: safetensors dtype of their scales, where it is not float32.
    """
    first: dict[str, HFEntry] = {}
    for entry in entries:
        first.setdefault(entry.path, entry)
    arrays: dict[str, Stored] = {}
    for path, entry in first.items():
        shape, ones = tuple(leaves[path].shape), (1,) * len(entry.index)
        if path not in formats:
            arrays[path] = Stored(shape, DTYPES[dtypes[path]], (*ones, *entry.block_shape))
            continue
        lead = shape[: len(entry.index)]
        for part, (matrix, dtype) in parse_format(formats[path]).part_shapes(entry.hf_shape).items():
            if part == "scales" and scale_dtypes and path in scale_dtypes:
                dtype = np.dtype(np.uint8) if scale_dtypes[path] == E8M0 else DTYPES[scale_dtypes[path]]
            arrays[f"{path}/{part}"] = Stored((*lead, *matrix), dtype, (*ones, *matrix))
    return arrays


def begin(conversion: Conversion, arrays: Mapping[str, Stored]) -> None:
    """The skeleton of a conversion's weights; one that an earlier run left whole stays."""
    chunks = {path: array.chunk for path, array in arrays.items()}
    item = conversion.out / layout.WEIGHTS
    if conversion.resumed and skeleton_is_whole(item, arrays, chunks):
        return
    conversion.restart()
    write_skeleton(item, {"params": {}, "router": {}, **unflatten_paths(arrays)}, chunks)


def scale_dtypes(
    entries: Iterable[HFEntry], tensors: Mapping[str, StoredTensor], formats: Mapping[str, str]
) -> dict[str, str]:
    """The safetensors dtype of the scales of every leaf in `formats`."""
    return {
        entry.path: scale.dtype
        for entry in entries
        if entry.path in formats and (scale := tensors[entry.name].scale) is not None
    }


_PARTS = ("codes", "scales", "zeros")


def leaf_of(path: str) -> str:
    """The leaf that an array of the tree belongs to: itself, or the leaf whose part it is."""
    parent, _, name = path.rpartition("/")
    return parent if name in _PARTS else path


class QuantizedLeaf:
    """The parts of one quantised leaf, opened for reading.

    Raises DataError when a part is missing or does not fit the format.
    """

    def __init__(self, item: Path, path: str, fmt: str):
        self.path, self.fmt = path, fmt
        self.format: Format = parse_format(fmt)
        names = _PARTS if self.format.asymmetric else _PARTS[:2]
        self.parts: dict[str, Leaf] = {name: open_leaf(item, f"{path}/{name}") for name in names}

    def tensor(self, entry: HFEntry, sha256: Callable[[Path], str] = lambda file: "") -> StoredTensor:
        """Where one Hugging Face tensor lies; `sha256` knows the recorded sums of files."""
        infos = {}
        for name, (shape, dtype) in self.format.part_shapes(entry.hf_shape).items():
            leaf = self.parts[name]
            kind = DTYPE_NAMES[leaf.dtype]
            if name == "scales" and leaf.dtype == np.uint8:
                kind = E8M0
            right = kind in SCALES if name == "scales" else leaf.dtype == dtype
            if leaf.shape[len(entry.index) :] != shape or not right:
                raise DataError(
                    f"{self.path}/{name}: {list(leaf.shape)} of {leaf.dtype.name} is not {self.fmt} of matrices "
                    f"{list(entry.hf_shape)}"
                )
            nbytes = math.prod(shape) * leaf.dtype.itemsize
            file = leaf.file(entry.index)
            infos[name] = TensorInfo(f"{entry.name} ({name})", file, kind, shape, 0, nbytes, sha256(file))
        codes = infos["codes"]
        return StoredTensor(
            entry.name,
            codes.dtype,
            entry.hf_shape,
            codes.file,
            0,
            infos["scales"],
            self.fmt,
            infos.get("zeros"),
            codes.sha256,
        )
