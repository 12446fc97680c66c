"""Rounding arrays to e4m3 inside a program: activations and gradients by line, weights by block.

    scale = max(max |x| / 448, smallest normal float32)          of one line of 128, or of one block of 128 x 128
    code  = x * (1 / scale), clipped to +-448, rounded to nearest even

The inverse is rounded to float32 as well: a division of every element costs more, and XLA would not keep it. The
lower limit is for lines of zeros (their codes are 0) and of numbers below 448 * 2^-126, whose quotients would not be
normal. Nothing hides a value that is not finite: an infinity makes its line's scale infinite and a NaN the whole line
NaN, so every product with that line is NaN, and no other line is touched.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

BLOCK = 128
E4M3_MAX = 448.0


class Coded(NamedTuple):
    """e4m3 codes [..., rows, columns] and their float32 scales [..., row blocks, column blocks].

    Attributes:
      codes: float8_e4m3fn.
      scales: one a block; the last block of a side may be partial.
    """

    codes: Array
    scales: Array


def quantize_lines(x: Array, block: int = BLOCK) -> Coded:
    """[..., N, K] with a scale per row and `block` columns: scales [..., N, ceil(K / block)]."""
    K = x.shape[-1]
    whole = _whole(x.astype(jnp.float32), {-1: block})
    lines = whole.reshape(*x.shape[:-1], whole.shape[-1] // block, block)  # -1 would not do without rows
    scales = scales_of(jnp.max(jnp.abs(lines), axis=-1))
    codes = codes_of(lines, scales[..., None])
    return Coded(codes.reshape(whole.shape)[..., :K], scales)


def quantize_blocks(w: Array, block: int = BLOCK) -> Coded:
    """[..., R, K] with a scale per `block` x `block`, as weights are released."""
    R, K = w.shape[-2:]
    whole = _whole(w.astype(jnp.float32), {-2: block, -1: block})
    down, across = whole.shape[-2] // block, whole.shape[-1] // block
    blocks = whole.reshape(*w.shape[:-2], down, block, across, block)
    scales = scales_of(jnp.max(jnp.abs(blocks), axis=(-3, -1)))
    codes = codes_of(blocks, scales[..., :, None, :, None])
    return Coded(codes.reshape(whole.shape)[..., :R, :K], scales)


def values(coded: Coded, block_rows: int = 1, block_columns: int = BLOCK) -> Array:
    """float32: what the codes stand for, each product rounded once."""
    rows, columns = coded.codes.shape[-2:]
    scales = jnp.repeat(coded.scales, block_columns, axis=-1)[..., :columns]
    if block_rows > 1:
        scales = jnp.repeat(scales, block_rows, axis=-2)[..., :rows, :]
    return coded.codes.astype(jnp.float32) * scales


def scales_of(most: Array) -> Array:
    """Scales of blocks whose largest values are given, float32."""
    # XLA turns a division by a constant into a product with its rounded inverse, and half of all scales then differ
    # in one bit; this one it cannot know.
    limit = jnp.where(most > -1.0, E4M3_MAX, 1.0)
    return jnp.maximum(most / limit, jnp.finfo(jnp.float32).tiny)


def power_of_two(scales: Array) -> Array:
    """Scales rounded up to powers of two: bfloat16 then holds code * scale. e4m3 floats, so no precision is lost."""
    bits = lax.bitcast_convert_type(scales, jnp.int32)
    return lax.bitcast_convert_type((bits + 0x7FFFFF) & ~0x7FFFFF, jnp.float32)


def quotients(x: Array, scales: Array) -> Array:
    """float32 values over their scales, within what e4m3 holds."""
    return jnp.clip(x * (1.0 / scales), -E4M3_MAX, E4M3_MAX)


def nearest(x: Array) -> Array:
    """The e4m3 number nearest to each float32 within +-448, ties to even, in float32.

    In arithmetic: XLA leaves out a conversion to a narrow type and back (`xla_allow_excess_precision`), and with it the
    rounding; compiled for H200 it does so for e4m3, on the CPU it does not.
    """
    exponent = lax.bitcast_convert_type(x, jnp.int32) & 0x7F800000
    power = jnp.maximum(lax.bitcast_convert_type(exponent, jnp.float32), 2.0**-6)
    return jnp.where(jnp.isnan(x), x, jnp.round(x * (8.0 / power)) * (power * 0.125))


def codes_of(x: Array, scales: Array) -> Array:
    """e4m3 codes of float32 values with their scales."""
    return nearest(quotients(x, scales)).astype(jnp.float8_e4m3fn)


def _whole(x: Array, blocks: dict[int, int]) -> Array:
    """Zeros after the end, up to whole blocks."""
    pads = [(0, 0)] * x.ndim
    for axis, block in blocks.items():
        pads[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, pads) if any(after for _, after in pads) else x
