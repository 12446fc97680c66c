"""How the codes of a quantised matrix stand for its values.

    value[r, k] = code[r, k] * scale[r // block_rows, k // block_columns]               fp8, int8
    value[r, k] = (code[r, k] - zero[r, k // block_columns]) * scale[...]               int4

fp8: e4m3 codes with one scale a block of 128 x 128, as DeepSeek releases them. int8: -127 .. 127, a scale per row
(channel) or per group of columns. int4: 0 .. 15, a scale and a zero point per group of columns (symmetric: the zero
point is 8 and not stored), two codes to a byte: byte j of a group of g columns holds column j in its low half and
column j + g / 2 in its high half, so that unpacking is two shifts and a concatenation, never an interleaving.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

Kind = Literal["fp8", "int8", "int4"]
Array = jax.Array

SYMMETRIC_ZERO = 8


@dataclasses.dataclass(frozen=True)
class Coding:
    """Static description of a quantised matrix [rows, columns].

    Attributes:
      kind: what a code is.
      block_rows, block_columns: the part of the matrix that shares a scale; the last block of a side may be partial.
      activations: "int8" quantises the other operand per token as well (int8 weights only).
    """

    kind: Kind
    block_rows: int
    block_columns: int
    activations: Literal["none", "int8"] = "none"

    def __post_init__(self) -> None:
        if self.kind not in ("fp8", "int8", "int4"):
            raise ValueError(f"kind is {self.kind!r}; fp8, int8 or int4 expected")
        if self.block_rows < 1 or self.block_columns < 1:
            raise ValueError(
                f"blocks of {self.block_rows} x {self.block_columns}; sizes of 1 or more expected"
            )
        if self.kind == "int4" and (self.block_columns % 2 or self.block_rows != 1):
            raise ValueError(f"int4 has groups of an even number of columns, not {self.block_columns}")
        if self.activations != "none" and self.kind != "int8":
            raise ValueError(f"8-bit activations go with int8 weights, not with {self.kind}")

    def with_block_rows(self, rows: int) -> Coding:
        """The same with other block rows."""
        return dataclasses.replace(self, block_rows=rows)

    def code_columns(self, columns: int) -> int:
        """Columns of the stored codes. Raises ValueError when int4 groups do not fit."""
        if self.kind != "int4":
            return columns
        if columns % self.block_columns:
            raise ValueError(f"{columns} columns are not whole int4 groups of {self.block_columns}")
        return columns // 2

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the scales (and zero points): one a block, partial blocks included."""
        return -(-rows // self.block_rows), -(-columns // self.block_columns)


def unpack_int4(packed: Array, group: int) -> Array:
    """uint8 [..., columns / 2] -> uint8 codes [..., columns]."""
    pairs = packed.reshape(*packed.shape[:-1], -1, group // 2)
    codes = jnp.concatenate([pairs & 0xF, pairs >> 4], axis=-1)
    return codes.reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def dequantize(
    parts: tuple[Array, Array, Array | None], coding: Coding, columns: int, dtype: jax.typing.DTypeLike
) -> Array:
    """The matrix [..., rows, columns]: products in float32, rounded once to `dtype`."""
    codes, scales, zeros = parts
    rows = codes.shape[-2]
    if coding.kind == "int4":
        values = unpack_int4(codes, coding.block_columns).astype(jnp.float32)
        values -= (
            SYMMETRIC_ZERO if zeros is None else _spread(zeros.astype(jnp.float32), coding, rows, columns)
        )
    else:
        values = codes.astype(jnp.float32)
    return (values * _spread(scales.astype(jnp.float32), coding, rows, columns)).astype(dtype)


def _spread(blocks: Array, coding: Coding, rows: int, columns: int) -> Array:
    """One value a block -> one a code; [..., rows or 1, columns or 1] where a whole side shares it."""
    if blocks.shape[-1] > 1:
        blocks = jnp.repeat(blocks, coding.block_columns, axis=-1)[..., :columns]
    if coding.block_rows > 1 and blocks.shape[-2] > 1:
        blocks = jnp.repeat(blocks, coding.block_rows, axis=-2)[..., :rows, :]
    return blocks
