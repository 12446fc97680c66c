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
import ml_dtypes
import numpy as np

Kind = Literal["fp8", "int8", "int4"]
Array = jax.Array

SYMMETRIC_ZERO = 8


@dataclasses.dataclass(frozen=True)
class Coding:
    """Static description of a quantised matrix [rows, columns].

    Attributes:
      kind: what a code is.
      block_rows, block_columns: the part of the matrix that shares a scale; the last block of a side may be partial.
      activations: what the other operand is rounded to: "int8" per token (int8 weights), "fp8" e4m3 per token and
        `block_columns` columns (fp8 weights).
    """

    kind: Kind
    block_rows: int
    block_columns: int
    activations: Literal["none", "int8", "fp8"] = "none"

    def __post_init__(self) -> None:
        if self.kind not in ("fp8", "int8", "int4"):
            raise ValueError(f"kind is {self.kind!r}; fp8, int8 or int4 expected")
        if self.block_rows < 1 or self.block_columns < 1:
            raise ValueError(
                f"blocks of {self.block_rows} x {self.block_columns}; sizes of 1 or more expected"
            )
        if self.kind == "int4" and (self.block_columns % 2 or self.block_rows != 1):
            raise ValueError(f"int4 has groups of an even number of columns, not {self.block_columns}")
        if self.activations not in ("none", self.kind) or (self.activations == self.kind == "int4"):
            raise ValueError(
                f"8-bit activations go with weights of their kind: {self.activations} not with {self.kind}"
            )

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


def e4m3_values(codes: Array) -> Array:
    """float32 values of e4m3 codes, given as bytes (uint8) or as float8_e4m3fn.

    On the CPU bytes go by a table of 256: XLA's own conversion, or so much as a slice of float8 in a loop, takes ten
    times as long there.
    """
    if codes.dtype != jnp.uint8:
        return codes.astype(jnp.float32)

    def by_table(codes: Array) -> Array:
        table = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        return jnp.asarray(table)[codes.astype(jnp.int32)]

    def by_type(codes: Array) -> Array:
        return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)

    return jax.lax.platform_dependent(codes, cpu=by_table, default=by_type)


def dequantize(
    parts: tuple[Array, Array, Array | None], coding: Coding, columns: int, dtype: jax.typing.DTypeLike
) -> Array:
    """The matrix [..., rows, columns]: products in float32, rounded once to `dtype`."""
    pieces = dequantize_split(parts, coding, columns, dtype)
    if len(pieces) == 1:
        return pieces[0]
    half = coding.block_columns // 2
    low, high = (piece.reshape(*piece.shape[:-1], -1, half) for piece in pieces)
    whole = jnp.concatenate([low, high], axis=-1)
    return whole.reshape(*whole.shape[:-2], columns)


def dequantize_split(
    parts: tuple[Array, Array, Array | None], coding: Coding, columns: int, dtype: jax.typing.DTypeLike
) -> list[Array]:
    """The same as pieces that are cheap to make, to go with those of `split_columns`: int4 in two, others in one."""
    codes, scales, zeros = parts
    rows = codes.shape[-2]
    scales = scales.astype(jnp.float32)
    if coding.kind != "int4":
        values = e4m3_values(codes) if coding.kind == "fp8" else codes.astype(jnp.float32)
        return [(values * _spread(scales, coding, rows, columns)).astype(dtype)]
    grouped = codes.reshape(*codes.shape[:-1], -1, coding.block_columns // 2)
    zero = float(SYMMETRIC_ZERO) if zeros is None else zeros.astype(jnp.float32)[..., None]
    return [
        ((half.astype(jnp.float32) - zero) * scales[..., None]).astype(dtype).reshape(codes.shape)
        for half in (grouped & 0xF, grouped >> 4)
    ]


def split_columns(x: Array, coding: Coding) -> list[Array]:
    """Columns [..., K] in the pieces that `dequantize_split` makes."""
    if coding.kind != "int4":
        return [x]
    *lead, K = x.shape  # sizes are written out: there may be no rows
    halves = x.reshape(*lead, K // coding.block_columns, 2, coding.block_columns // 2)
    return [halves[..., i, :].reshape(*lead, K // 2) for i in range(2)]


def join_columns(pieces: list[Array], coding: Coding) -> Array:
    """The inverse of `split_columns`."""
    if coding.kind != "int4":
        return pieces[0]
    half = coding.block_columns // 2
    *lead, columns = pieces[0].shape
    halves = [piece.reshape(*lead, columns // half, 1, half) for piece in pieces]
    return jnp.concatenate(halves, axis=-2).reshape(*lead, 2 * columns)


def _spread(blocks: Array, coding: Coding, rows: int, columns: int) -> Array:
    """One value a block -> one a code; [..., rows or 1, columns or 1] where a whole side shares it."""
    if blocks.shape[-1] > 1:
        blocks = jnp.repeat(blocks, coding.block_columns, axis=-1)[..., :columns]
    if coding.block_rows > 1 and blocks.shape[-2] > 1:
        blocks = jnp.repeat(blocks, coding.block_rows, axis=-2)[..., :rows, :]
    return blocks
