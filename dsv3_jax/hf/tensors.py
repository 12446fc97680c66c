"""One stored tensor, wherever it lies, as a stream of pieces in the dtype that is asked for.

A leaf is a stack of Hugging Face tensors that are only reshaped, so a tensor is a flat run of elements: whoever
copies one never holds more than a few pieces of it, however large it is.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv3_jax.errors import DataError
from dsv3_jax.hf import fp8
from dsv3_jax.hf.safetensors import DTYPE_NAMES, DTYPES, PIECE_BYTES, TensorInfo, read_array, read_range
from dsv3_jax.quantization.formats import Parts, dequantize, parse_format

FLOATS = ("F32", "BF16", "F16")
FP8 = "F8_E4M3"
SCALES = (*FLOATS, "F8_E8M0")
"""Types of scales; E8M0 holds powers of two."""


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
      scale: where its scales lie, if it is quantised.
      fmt: then the name of its format (`quantization.formats`); `file` holds the codes.
      zero: where its zero points lie, if it has any.
      sha256: of its bytes in `file` where that is recorded, else ""; whoever reads all of it hears of a difference.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int = 0
    scale: TensorInfo | None = None
    fmt: str = ""
    zero: TensorInfo | None = None
    sha256: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def keep_dtype(self) -> str:
        """The type of its values when they are not cast: its own; bfloat16 for what is quantised."""
        return "BF16" if self.scale is not None else self.dtype

    @property
    def parts(self) -> dict[str, TensorInfo]:
        """Codes, scales and zero points of a quantised tensor as they lie in files."""
        assert self.scale is not None, self.name
        shape = parse_format(self.fmt).code_shape(self.shape)
        nbytes = math.prod(shape) * DTYPES[self.dtype].itemsize
        codes = TensorInfo(self.name, self.file, self.dtype, shape, self.offset, nbytes, self.sha256)
        return {"codes": codes, "scales": self.scale} | ({} if self.zero is None else {"zeros": self.zero})

    def pieces(self, dtype: str) -> Iterator[np.ndarray]:
        """The elements in order, as flat arrays of `dtype`; each is valid until the next one is asked for.

        Raises DataError when the file ends early, or after the last one when its bytes are not those recorded.
        """
        if self.scale is not None:
            yield from self._dequantized(dtype)
            return
        source = DTYPES[self.dtype]
        nbytes = self.size * source.itemsize
        seen = _Seen(self.file, self.sha256)
        for piece in read_range(self.file, self.offset, nbytes, what=f"tensor {self.name!r}"):
            seen.add(piece)
            yield cast(np.frombuffer(piece, source), dtype)
        seen.end()

    def _dequantized(self, dtype: str) -> Iterator[np.ndarray]:
        """Some whole rows of blocks at a time: about a piece in float32."""
        fmt, (rows, columns) = parse_format(self.fmt), self.shape
        height = fmt.coding(columns).block_rows
        step = max(1, PIECE_BYTES // 4 // max(columns, 1) // height) * height
        seen = {name: _Seen(info.file, info.sha256) for name, info in self.parts.items()}
        for first in range(0, rows, step):
            stop = min(rows, first + step)
            parts = {
                name: _rows_of(info, first, stop, 1 if name == "codes" else height, seen[name])
                for name, info in self.parts.items()
            }
            if fmt.kind == "fp8":
                parts["scales"] = parts["scales"].astype(np.float32)
                block = (height, fmt.coding(columns).block_columns)
                values = fp8.dequantize(parts["codes"], parts["scales"], block, DTYPES[dtype])
            else:
                values = cast(dequantize(Parts(**parts), fmt, columns), dtype)
            yield values.reshape(-1)
        for part in seen.values():
            part.end()

    def part_pieces(self, part: str) -> Iterator[np.ndarray]:
        """The bytes of "codes", "scales" or "zeros" as they are stored."""
        info = self.parts[part]
        seen = _Seen(info.file, info.sha256)
        for piece in read_range(info.file, info.offset, info.nbytes, what=f"tensor {info.name!r}"):
            seen.add(piece)
            yield _checked(info, np.frombuffer(piece, DTYPES[info.dtype]))
        seen.end()

    def read(self, dtype: str) -> np.ndarray:
        """The whole tensor in `dtype` and its own shape."""
        out = np.empty(self.size, DTYPES[dtype])
        self.read_into(out)
        return out.reshape(self.shape)

    def read_into(self, out: np.ndarray) -> None:
        """Fills the flat, contiguous `out` with the elements, in its dtype."""
        fill(out, self.pieces(DTYPE_NAMES[out.dtype]))


def fill(out: np.ndarray, pieces: Iterator[np.ndarray]) -> None:
    """Fills the flat, contiguous `out` with flat arrays that are together as long as it is."""
    position = 0
    for piece in pieces:
        out[position : position + piece.size] = piece
        position += piece.size
    assert position == out.size, (position, out.size)


class _Seen:
    """SHA-256 of a tensor's bytes as they pass, against the recorded one ("" compares nothing)."""

    def __init__(self, file: Path, sha256: str):
        self._file, self._sha256, self._digest = file, sha256, hashlib.sha256()

    def add(self, piece: memoryview | np.ndarray) -> None:
        if self._sha256:
            self._digest.update(piece)

    def end(self) -> None:
        """Raises DataError."""
        if self._sha256 and self._digest.hexdigest() != self._sha256:
            raise DataError(f"{self._file}: SHA-256 differs from the recorded one: the content has changed")


def _rows_of(info: TensorInfo, first: int, stop: int, height: int, seen: _Seen) -> np.ndarray:
    """The rows of a part that belong to rows [first, stop) of the matrix, of which it has one in `height`."""
    begin, end = first // height, -(-stop // height)
    dtype = DTYPES[info.dtype]
    offset = info.offset + begin * info.shape[1] * dtype.itemsize
    part = read_array(info.file, offset, dtype, (end - begin, info.shape[1]), what=repr(info.name))
    seen.add(part.reshape(-1).view(np.uint8))
    return _checked(info, part)


def _checked(info: TensorInfo, part: np.ndarray) -> np.ndarray:
    """`part`, unless it holds scales or codes that no rounding makes. Raises DataError."""
    if info.dtype == FP8 and part.size and (part.view(np.uint8) & 0x7F).max() == 0x7F:
        raise DataError(f"{info.name}: a code is NaN: the file is damaged")
    if info.dtype in SCALES:
        values = part.astype(np.float32)
        if not (np.isfinite(values) & (values >= 0)).all():
            raise DataError(f"{info.name}: a scale is negative or not finite: the file is damaged")
    return part


def differing_part(a: StoredTensor, b: StoredTensor) -> str | None:
    """The first of "codes", "scales", "zeros" whose stored bytes differ between two tensors of one format, or None."""
    for name, info in a.parts.items():
        other = b.parts[name]
        if (info.dtype, info.shape) != (other.dtype, other.shape):
            return name
        if any(
            x.tobytes() != y.tobytes() for x, y in zip(a.part_pieces(name), b.part_pieces(name), strict=True)
        ):
            return name
    return None


def same_bytes(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors have the same type, shape and bytes (quantised: the same dequantised values)."""
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
