"""One stored tensor, wherever it lies, as a stream of pieces in the dtype that is asked for.

A leaf is a stack of Hugging Face tensors that are only reshaped, so a tensor is a flat run of elements: whoever
copies one never holds more than a few pieces of it, however large it is.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv3_jax.errors import DataError
from dsv3_jax.hf import fp8
from dsv3_jax.hf.safetensors import DTYPE_NAMES, DTYPES, PIECE_BYTES, TensorInfo, read_array, read_range

FLOATS = ("F32", "BF16", "F16")
FP8 = "F8_E4M3"


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """`values` in the dtype of a safetensors name; widening and narrowing back gives the same bits.

    float32 that came from bfloat16 has its low half empty: dropping it keeps even a NaN's payload, which a
    rounding cast would not.
    """
    target = DTYPES[dtype]
    if values.dtype == target:
        return values
    source = DTYPE_NAMES[values.dtype]
    if source == "F32" and dtype == "BF16" and sys.byteorder == "little":
        halves = values.view(np.uint16)
        if not halves[::2].any():
            return np.ascontiguousarray(halves[1::2]).view(target)
    with np.errstate(invalid="ignore"):  # a NaN passes on as a NaN
        return values.astype(target)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of floats in a file, row-major, without padding.

    Attributes:
      name: Hugging Face name.
      dtype: safetensors name of the type it is stored in.
      shape: Hugging Face shape.
      file, offset: where its bytes begin.
      scale: where its block scales lie, if it is FP8.
      block: the block of those scales, (rows, columns).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int = 0
    scale: TensorInfo | None = None
    block: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def keep_dtype(self) -> str:
        """The type it is kept in: its own; bfloat16 for FP8, which is dequantised."""
        return "BF16" if self.scale is not None else self.dtype

    def pieces(self, dtype: str) -> Iterator[np.ndarray]:
        """The elements in order, as flat arrays of `dtype`; each is valid until the next one is asked for.

        Raises DataError when the file ends early.
        """
        if self.scale is not None:
            yield from self._dequantized(dtype)
            return
        source = DTYPES[self.dtype]
        nbytes = self.size * source.itemsize
        for piece in read_range(self.file, self.offset, nbytes, what=f"tensor {self.name!r}"):
            yield cast(np.frombuffer(piece, source), dtype)

    def _dequantized(self, dtype: str) -> Iterator[np.ndarray]:
        assert self.scale is not None and self.block is not None
        rows, columns = self.shape
        scale = read_array(
            self.scale.file,
            self.scale.offset,
            DTYPES[self.scale.dtype],
            self.scale.shape,
            what=repr(self.scale.name),
        )
        # A quarter of a piece in codes is a piece in float32; at least one row of blocks.
        step = max(1, PIECE_BYTES // 4 // max(columns, 1) // self.block[0])
        for first in range(0, scale.shape[0], step):
            start = first * self.block[0]
            stop = min(rows, (first + step) * self.block[0])
            offset, shape = self.offset + start * columns, (stop - start, columns)
            codes = read_array(self.file, offset, DTYPES[self.dtype], shape, what=repr(self.name))
            values = fp8.dequantize(codes, scale[first : first + step], self.block, DTYPES[dtype])
            yield values.reshape(-1)

    def read(self, dtype: str) -> np.ndarray:
        """The whole tensor in `dtype` and its own shape."""
        out = np.empty(self.size, DTYPES[dtype])
        self.read_into(out)
        return out.reshape(self.shape)

    def read_into(self, out: np.ndarray) -> None:
        """Fills the flat, contiguous `out` with the elements, in its dtype."""
        position = 0
        for piece in self.pieces(DTYPE_NAMES[out.dtype]):
            out[position : position + piece.size] = piece
            position += piece.size
        assert position == out.size, (self.name, position, out.size)


def same_bytes(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors have the same type, shape and bytes (FP8: the same dequantised values)."""
    return (a.keep_dtype, a.shape) == (b.keep_dtype, b.shape) and first_difference(a, b, a.keep_dtype) is None


def first_difference(a: StoredTensor, b: StoredTensor, dtype: str) -> int | None:
    """Index of the first element whose bytes differ when both tensors (of one size) are read as `dtype`, or None."""
    assert a.size == b.size, (a.name, b.name)
    position = 0
    right, pieces = np.empty(0, DTYPES[dtype]), b.pieces(dtype)
    for left in a.pieces(dtype):
        while left.size:
            if not right.size:  # the two may come in pieces of different lengths
                right = next(pieces)
            count = min(left.size, right.size)
            differ = left[:count].view(np.uint8) != right[:count].view(np.uint8)
            if differ.any():
                return position + int(np.argmax(differ)) // left.itemsize
            position += count
            left, right = left[count:], right[count:]
    return None


def widest(dtypes: set[str], where: str) -> str:
    """The one dtype that holds every value of a stack: its own where all agree, else the common wider one.

    Raises DataError for dtypes that are not floating point.
    """
    for dtype in dtypes:
        if dtype not in FLOATS:
            raise DataError(f"{where}: dtype {dtype} is not one of {', '.join(FLOATS)}")
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return "F32"
