"""Rounding matrices to 8 and 4 bits, in numpy: what the converters write and every kernel is held against.

A format is how a matrix [rows, columns] = [out, in] is coded (`kernels.quantized_matmul.coding` has the formulas):

    fp8         e4m3 codes, a scale per 128 x 128 block, max |w| / 448: as DeepSeek releases V3
    int8        a scale per row, max |w| / 127;  int8:G with groups of G columns
    int4:G      groups of G columns (32, 64 or 128), symmetric: scale max |w| / 7, codes -8 .. 7 around a zero point 8
    int4a:G     the same with a zero point of its own for each group

"+act8" after fp8 or int8 says that products round their activations as well; what is stored is the same.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

import ml_dtypes
import numpy as np

from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.hf.fp8 import E4M3_VALUES
from dsv3_jax.kernels.quantized_matmul.coding import SYMMETRIC_ZERO, Coding, Kind

FP8_BLOCK = 128
FP8_MAX = 448.0
GROUP_SIZES = (32, 64, 128)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


class Parts(NamedTuple):
    """A quantised matrix: codes [..., rows, columns or columns / 2], float32 scales, uint8 zero points or None."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> Parts:
        """The same change to each of them."""
        zeros = None if self.zeros is None else change(self.zeros)
        return Parts(change(self.codes), change(self.scales), zeros)


@dataclasses.dataclass(frozen=True)
class Format:
    """How a matrix is quantised.

    Attributes:
      kind: fp8, int8 or int4.
      group: columns that share a scale; 0 is the whole row (int8) or 128 (fp8).
      asymmetric: int4 with zero points.
      activations: "int8" or "fp8", the weights' own, for 8 x 8 products.
      rows: rows that share a scale (fp8); 0 is 128.
    """

    kind: Kind
    group: int = 0
    asymmetric: bool = False
    activations: Literal["none", "int8", "fp8"] = "none"
    rows: int = 0

    def __str__(self) -> str:
        act8 = "" if self.activations == "none" else "+act8"
        if self.kind == "fp8":
            return f"fp8:{self.rows}x{self.group}{act8}" if self.rows else f"fp8{act8}"
        group = f":{self.group}" if self.group else ""
        return f"{self.kind}{'a' if self.asymmetric else ''}{group}{act8}"

    def coding(self, columns: int) -> Coding:
        """The static description for matrices of that many columns."""
        if self.kind == "fp8":
            return Coding("fp8", self.rows or FP8_BLOCK, self.group or FP8_BLOCK, self.activations)
        return Coding(self.kind, 1, self.group or columns, self.activations)

    def code_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored codes of matrices [..., rows, columns]."""
        return (*shape[:-1], self.coding(shape[-1]).code_columns(shape[-1]))

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shapes and dtypes of what is stored for matrices [..., rows, columns], by name (scales as float32)."""
        scales = (*shape[:-2], *self.coding(shape[-1]).scale_shape(shape[-2], shape[-1]))
        codes = {"fp8": E4M3, "int8": np.dtype(np.int8), "int4": np.dtype(np.uint8)}[self.kind]
        parts = {"codes": (self.code_shape(shape), codes), "scales": (scales, np.dtype(np.float32))}
        return parts | ({"zeros": (scales, np.dtype(np.uint8))} if self.asymmetric else {})

    def fitting(self, columns: int) -> Format | None:
        """This format, or with the largest smaller group that divides the columns; None where nothing fits."""
        if self.kind == "fp8" or not self.group or columns % self.group == 0:
            return self
        group = math.gcd(columns, self.group)
        return dataclasses.replace(self, group=group) if group >= 16 else None


def parse_format(text: str) -> Format:
    """The inverse of `str`: "fp8", "int8:128", "int4:64", "int4a:128", "int8+act8", "fp8+act8". Raises ConfigError."""
    if match := re.fullmatch(r"fp8:([1-9]\d*)x([1-9]\d*)(\+act8)?", text):
        block = fp8_format((int(match[1]), int(match[2])))
        return dataclasses.replace(block, activations="fp8") if match[3] else block
    body, plus, extra = text.partition("+")
    name, _, size = body.partition(":")
    known = {"fp8": ("fp8", False), "int8": ("int8", False), "int4": ("int4", False), "int4a": ("int4", True)}
    bad = ConfigError(
        f"quantisation format {text!r}; expected fp8, int8, int8:GROUP, int4:GROUP or int4a:GROUP "
        "(fp8 and int8 also with +act8)"
    )
    wrong_extra = plus and (extra != "act8" or name not in ("fp8", "int8"))
    if name not in known or wrong_extra or (size and not size.isdigit()):
        raise bad
    kind, asymmetric = known[name]
    group = int(size) if size else 128 if kind == "int4" else 0
    if (kind == "fp8" and group) or (kind == "int4" and (group < 16 or group % 2)):
        raise bad
    return Format(kind, group, asymmetric, kind if plus else "none")  # type: ignore[arg-type]


def as_stored(text: str) -> str:
    """The name of what is stored for a format: how activations are rounded is no part of it."""
    return text.removesuffix("+act8")


def fp8_format(block: tuple[int, int]) -> Format:
    """The format of FP8 weights with scales for blocks of that many rows and columns."""
    return Format("fp8") if block == (FP8_BLOCK, FP8_BLOCK) else Format("fp8", block[1], rows=block[0])


def quantize(matrix: np.ndarray, fmt: Format) -> Parts:
    """Round to nearest. `matrix`: finite floats [..., rows, columns].

    Raises DataError for values that are not finite.
    """
    if not np.isfinite(matrix).all():
        raise DataError("a weight that is not finite cannot be quantised")
    matrix = matrix.astype(np.float32, copy=False)
    coding = fmt.coding(matrix.shape[-1])
    if fmt.kind == "fp8":
        return _fp8(matrix, coding)
    scales, zeros = grid(matrix, fmt)
    codes = to_codes(matrix, scales, zeros, fmt)
    return Parts(codes if fmt.kind == "int8" else pack_int4(codes, coding.block_columns), scales, zeros)


def grid(matrix: np.ndarray, fmt: Format) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales and zero points of int8 or int4 for each group of columns: [..., rows, groups]."""
    groups = _groups(matrix, fmt.coding(matrix.shape[-1]).block_columns)
    if fmt.asymmetric:
        low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
        scales = _nonzero((high - low) / np.float32(15))
        return scales, np.clip(np.rint(-low / scales), 0, 15).astype(np.uint8)
    most = np.float32(127 if fmt.kind == "int8" else 7)
    return _nonzero(np.abs(groups).max(-1) / most), None


def to_codes(matrix: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, fmt: Format) -> np.ndarray:
    """Nearest codes on a grid: int8, or uint8 0 .. 15 not yet packed; like `matrix`."""
    size = fmt.coding(matrix.shape[-1]).block_columns
    groups = np.rint(_groups(matrix, size) / scales[..., None])
    if fmt.kind == "int8":
        codes = np.clip(groups, -127, 127).astype(np.int8)
    else:
        zero = SYMMETRIC_ZERO if zeros is None else zeros[..., None].astype(np.float32)
        codes = np.clip(groups + zero, 0, 15).astype(np.uint8)
    return codes.reshape(*matrix.shape[:-1], -1)[..., : matrix.shape[-1]]


def dequantize(parts: Parts, fmt: Format, columns: int) -> np.ndarray:
    """float32 [..., rows, columns]."""
    coding = fmt.coding(columns)
    codes, scales, zeros = parts
    if fmt.kind == "fp8":
        values = E4M3_VALUES[codes.view(np.uint8)]
        scales = np.repeat(scales.astype(np.float32), coding.block_rows, axis=-2)[..., : codes.shape[-2], :]
    elif fmt.kind == "int8":
        values = codes.astype(np.float32)
    else:
        values = unpack_int4(codes, coding.block_columns).astype(np.float32)
        zero = SYMMETRIC_ZERO if zeros is None else _repeat(zeros, coding, columns).astype(np.float32)
        values -= zero
    return values * _repeat(scales.astype(np.float32), coding, columns)


def pack_int4(codes: np.ndarray, group: int) -> np.ndarray:
    """Codes 0 .. 15 [..., columns], whole groups -> uint8 [..., columns / 2]."""
    pairs = codes.reshape(*codes.shape[:-1], -1, 2, group // 2)
    return (pairs[..., 0, :] | (pairs[..., 1, :] << 4)).reshape(*codes.shape[:-1], -1)


def unpack_int4(packed: np.ndarray, group: int) -> np.ndarray:
    """The inverse of `pack_int4`."""
    pairs = packed.reshape(*packed.shape[:-1], -1, group // 2)
    return np.concatenate([pairs & 0xF, pairs >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _fp8(matrix: np.ndarray, coding: Coding) -> Parts:
    rows, columns = matrix.shape[-2:]
    down, across = coding.scale_shape(rows, columns)
    height, width = coding.block_rows, coding.block_columns
    pad = [(0, 0)] * (matrix.ndim - 2) + [(0, down * height - rows), (0, across * width - columns)]
    blocks = np.pad(matrix, pad).reshape(*matrix.shape[:-2], down, height, across, width)
    scales = _nonzero(np.abs(blocks).max(axis=(-3, -1)) / np.float32(FP8_MAX))
    scaled = np.clip(blocks / scales[..., :, None, :, None], -FP8_MAX, FP8_MAX)
    codes = scaled.reshape(*matrix.shape[:-2], down * height, across * width)[..., :rows, :columns].astype(
        E4M3
    )
    return Parts(np.ascontiguousarray(codes), scales)


def _groups(matrix: np.ndarray, size: int) -> np.ndarray:
    """[..., columns] -> [..., groups, size], the last one filled up with zeros."""
    missing = -matrix.shape[-1] % size
    if missing:
        matrix = np.pad(matrix, [(0, 0)] * (matrix.ndim - 1) + [(0, missing)])
    return matrix.reshape(*matrix.shape[:-1], -1, size)


def _nonzero(scales: np.ndarray) -> np.ndarray:
    """1 for a block of zeros: its codes are 0 whatever the scale."""
    return np.where(scales > 0, scales, np.float32(1)).astype(np.float32)


def _repeat(blocks: np.ndarray, coding: Coding, columns: int) -> np.ndarray:
    return np.repeat(blocks, coding.block_columns, axis=-1)[..., :columns]
