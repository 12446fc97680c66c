"""Codes to 16-bit floats in the registers of a Hopper kernel, exactly, and the order of columns that this gives.

Codes come as lanes of 16 bits: two bytes, or four nibbles. One integer operation works on two lanes, and the place of a
code in its lane decides which piece it lands in: piece 0 are the low bytes, piece 1 the high ones (of int4: four
pieces, lowest nibble first). So a group of columns is multiplied piece by piece, and `ordered` lays the columns of
the activations the same way; a sum does not mind the order of its terms.

    int4   (lane & 0xF) | 128.0         is 128 + code: what 128 + the zero point leaves is exact
    int8   the low seven bits at 128.0, minus the sign bit at 128.0 (bfloat16 has seven bits of mantissa)
    e4m3   exponent and mantissa at the low end of the float's, times a power of two
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv3_jax.kernels import shim
from dsv3_jax.kernels.quantized_matmul.coding import SYMMETRIC_ZERO, Coding
from dsv3_jax.kernels.shim import plgpu

# Lanes of a slice: 128 bytes of codes a row where the columns are whole such slices, otherwise 64 or 32.
LINES = (64, 32, 16)
# The least summed axis of a WGMMA of 16-bit operands.
LEAST = 16


class Slices(NamedTuple):
    """How the summed axis is cut.

    Attributes:
      pieces: codes of a lane.
      line: lanes of a slice.
      group: columns that are multiplied before their sums are scaled.
      scaled: columns of a stored scale; 0 where a row has one for all of its columns.
    """

    pieces: int
    line: int
    group: int
    scaled: int

    @property
    def columns(self) -> int:
        """Of a slice."""
        return self.pieces * self.line

    @property
    def groups(self) -> int:
        """Of a slice."""
        return self.columns // self.group

    @property
    def lanes(self) -> int:
        """Of a group."""
        return self.group // self.pieces

    @property
    def width(self) -> int:
        """Columns of one WGMMA's operand: a piece, or as many as LEAST takes."""
        return max(self.lanes, LEAST)

    def scale_of(self, group: jax.Array) -> jax.Array:
        """Which stored scale a group has."""
        each = self.scaled // self.group
        return group if each == 1 else lax.div(group, jnp.int32(each))


def slices(coding: Coding, columns: int) -> Slices:
    """The cut for a matrix of that many columns that `why_not` takes."""
    pieces = 4 if coding.kind == "int4" else 2
    line = next(line for line in LINES if columns % (pieces * line) == 0)
    whole = _of_rows(coding, columns)
    group = pieces * line if whole else min(coding.block_columns, pieces * line)
    return Slices(pieces, line, group, 0 if whole else coding.block_columns)


def _of_rows(coding: Coding, columns: int) -> bool:
    """Whether each row has one scale, applied to its finished sums."""
    return coding.kind == "int8" and coding.block_rows == 1 and coding.block_columns >= columns


def why_not(coding: Coding, columns: int) -> str | None:
    """Why codes in this coding are not taken, or None."""
    size, kind = coding.block_columns, coding.kind
    pieces = 4 if kind == "int4" else 2
    if coding.activations != "none":
        return f"activations are quantised to {coding.activations}"
    if columns % (pieces * LINES[-1]):
        return f"the input width {columns} is not a multiple of {pieces * LINES[-1]}"
    if _of_rows(coding, columns):
        return None
    cut = slices(coding, columns)
    if size % cut.group or cut.columns % cut.group or cut.group < 32 or (kind == "int4" and size > cut.group):
        return f"{kind} groups of {size} columns, {columns} in all"
    if cut.lanes < LEAST and shim.VERSION < (0, 11):
        return f"{kind} groups of {size} columns need jax 0.11, which joins arrays in registers"
    return None


def ordered(x_NK: jax.Array, cut: Slices, kind: str) -> jax.Array:
    """Columns in the order of the pieces."""
    N, K = x_NK.shape
    if kind == "int4":  # low halves of a group's bytes are its first columns, high halves its last ones
        x = x_NK.reshape(N, -1, 2, cut.lanes, 2).transpose(0, 1, 4, 2, 3)
    else:
        x = x_NK.reshape(N, -1, cut.lanes, 2).transpose(0, 1, 3, 2)
    return x.reshape(N, K)


def as_lanes(codes: jax.Array) -> jax.Array:
    """Bytes [..., 2 n] as uint16 [..., n], the first in the low half; nothing moves."""
    pairs = lax.bitcast_convert_type(codes, jnp.uint8).reshape(*codes.shape[:-1], -1, 2)
    return lax.bitcast_convert_type(pairs, jnp.uint16)


def offset(zero: jax.Array | None, dtype: np.dtype) -> jax.Array:
    """What int4 takes away from the pieces' floats: one number, or one for each row of zero points."""
    if zero is None:
        return jnp.asarray(_base(dtype) + SYMMETRIC_ZERO, dtype)
    return (zero.astype(jnp.float32) + _base(dtype)).astype(dtype)


def unpack(lanes: jax.Array, kind: str, dtype: np.dtype, less: jax.Array) -> list[jax.Array]:
    """The pieces of lanes [rows, n], each [rows, n] in `dtype` (bfloat16 or float16), exact.

    Args:
      less: int4 only: `offset`, one number or [rows, n].
    """
    if kind == "int4":
        return [_float(shifted(lanes, -4 * i) & _bits(0x000F) | _one(dtype), dtype) - less for i in range(4)]
    if kind == "int8":
        return [_int8(shifted(lanes, -8 * i), dtype) for i in range(2)]
    mantissa = jnp.finfo(dtype).nmant - 3  # how far e4m3's three bits of mantissa are from its own
    mask = _bits(0x7F << mantissa)
    low = (shifted(lanes, 8) & _bits(0x8000)) | (shifted(lanes, mantissa) & mask)
    high = (lanes & _bits(0x8000)) | (shifted(lanes, mantissa - 8) & mask)
    return [_rescaled(low, dtype), _rescaled(high, dtype)]


def shifted(lanes: jax.Array, by: int) -> jax.Array:
    """Lanes shifted left (right: negative), two at once; the caller masks what comes in from outside."""
    if by == 0:
        return lanes
    if shim.interpreting():  # it knows no `inline_mgpu`; what comes in is made wrong on purpose
        inside = 0xFFFF << by & 0xFFFF if by > 0 else 0xFFFF >> -by
        return (lanes << _bits(by) if by > 0 else lanes >> _bits(-by)) | _bits(0xFFFF & ~inside)
    from jax.experimental.mosaic.gpu import fragmented_array, utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    layout = plgpu.Layout.WGMMA

    # Shifts of 16-bit numbers would be taken apart into single ones, at three times the instructions.
    @plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(lanes.shape, lanes.dtype, layout)
    )
    def shift(_: Any, array: Any) -> Any:
        word = ir.IntegerType.get_signless(32)
        operation = arith.shli if by > 0 else arith.shrui
        registers = np.empty_like(array.registers)
        for at, register in np.ndenumerate(array.registers):
            moved = operation(utils.bitcast(register, word), utils.c(abs(by), word))
            registers[at] = utils.bitcast(moved, register.type)
        return fragmented_array.FragmentedArray(
            _registers=registers, _layout=array.layout, _is_signed=array.is_signed
        )

    return shift(lanes)


def _int8(lanes: jax.Array, dtype: np.dtype) -> jax.Array:
    """The signed low byte."""
    if dtype == jnp.float16:  # all eight bits, offset by 128, fit its mantissa
        return _float((lanes & _bits(0x00FF)) ^ _bits(0x6480), dtype) - jnp.asarray(1024 + 128, dtype)
    rest, sign = (_float(lanes & _bits(mask) | _one(dtype), dtype) for mask in (0x7F, 0x80))
    return rest - sign


def _rescaled(lanes: jax.Array, dtype: np.dtype) -> jax.Array:
    """e4m3 whose exponent stands in `dtype`'s with its own bias of 7, made right."""
    power = 256.0 if dtype == jnp.float16 else 2.0**120
    value = _float(lanes, dtype)
    if dtype == jnp.bfloat16 and shim.interpreting():
        # XLA on a CPU takes subnormal numbers for zero; the device does not.
        small = (lanes & _bits(0x0070)).astype(jnp.float32) * 2.0**-13
        small = jnp.where(lanes >> _bits(15) != 0, -small, small).astype(dtype)
        return jnp.where(lanes & _bits(0x7F80) == 0, small, value * jnp.asarray(power, dtype))
    return value * jnp.asarray(power, dtype)


def _base(dtype: np.dtype) -> float:
    """The float whose last bit of mantissa is worth one."""
    return 1024.0 if dtype == jnp.float16 else 128.0


def _one(dtype: np.dtype) -> np.uint16:
    return _bits(0x6400 if dtype == jnp.float16 else 0x4300)


def _bits(value: int) -> np.uint16:
    return np.uint16(value)


def _float(lanes: jax.Array, dtype: np.dtype) -> jax.Array:
    return lax.bitcast_convert_type(lanes, dtype)


def joined(pieces: list[jax.Array], cut: Slices) -> list[jax.Array]:
    """Pieces as operands of `cut.width` columns."""
    each = cut.width // cut.lanes
    if each == 1:
        return pieces
    return [jnp.concatenate(pieces[i : i + each], axis=1) for i in range(0, len(pieces), each)]


def row_layout() -> object:
    """One number a row, as WGMMA's registers lie."""
    return plgpu.Layout.WGMMA.reduce(1)
