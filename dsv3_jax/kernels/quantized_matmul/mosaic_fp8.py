"""Products with FP8 weights and FP8 activations by the Mosaic GPU kernel: rounding, tiles, and what is refused.

The signatures are those of `quantized_matmul.reference`. Backward goes through it: activations as if not rounded.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import shim
from dsv3_jax.kernels.fp8_matmul.mosaic_product import Tile, product
from dsv3_jax.kernels.fp8_matmul.mosaic_quantize import quantize_lines
from dsv3_jax.kernels.fp8_matmul.quantize import BLOCK, Coded
from dsv3_jax.kernels.grouped_matmul.pipeline import LINE
from dsv3_jax.kernels.quantized_matmul import reference
from dsv3_jax.kernels.quantized_matmul.coding import Coding
from dsv3_jax.kernels.quantized_matmul.reference import Parts
from dsv3_jax.kernels.tables import tuned

Array = jax.Array


def refuses(x_ND: Array, parts: Parts, group_sizes_E: Array, coding: Coding) -> str | None:
    """Why these arguments of the grouped product are not taken, or None."""
    F, D = parts[0].shape[-2], x_ND.shape[1]
    if (coding.block_rows, coding.block_columns) != (BLOCK, BLOCK):
        return f"blocks are {coding.block_rows} x {coding.block_columns}; {BLOCK} x {BLOCK} expected"
    if x_ND.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x_ND.dtype}; results are bfloat16 or float16"
    if x_ND.shape[0] == 0:
        return "there are no rows"
    if D % 16:
        return f"the input width {D} is not a multiple of 16"
    return f"the output width {F} is not a multiple of {LINE}" if F % LINE else None


def refuses_dense(x_NK: Array, parts: Parts, coding: Coding) -> str | None:
    """Why these arguments of the dense product are not taken, or None."""
    return refuses(x_NK, parts, _one_group(x_NK), coding)


def _few(N: int, E: int) -> bool:
    return N <= LINE * E


def shape_class(x_ND: Array, parts: Parts, group_sizes_E: Array, coding: Coding) -> str:
    """Widths, type, and whether tiles are low (few rows per expert)."""
    codes = parts[0]
    few = _few(x_ND.shape[0], codes.shape[0] if codes.ndim == 3 else 1)
    return f"d{x_ND.shape[1]}-f{codes.shape[-2]}-{'few' if few else 'many'}-{x_ND.dtype.name}"


def shape_class_dense(x_NK: Array, parts: Parts, coding: Coding) -> str:
    """The same of the dense product."""
    return shape_class(x_NK, parts, _one_group(x_NK), coding)


def default_tile(N: int, E: int, F: int) -> Tile:
    """The tile where the table has none."""
    if not _few(N, E):
        return Tile()
    # At most min(N, E) experts have rows: narrow tiles where wide ones would leave multiprocessors idle.
    if min(N, E) * -(-F // 2 // BLOCK) <= shim.sm_count():
        return Tile(LINE, BLOCK, 6, 2, "columns")
    return Tile(LINE, 2 * BLOCK, 4, 2, "columns")


def _one_group(x_NK: Array) -> Array:
    return jnp.full((1,), x_NK.shape[0], jnp.int32)


def coded(parts: Parts) -> Coded:
    """Codes as float8 (stored as bytes), scales as float32."""
    codes, scales, _ = parts
    if codes.dtype == jnp.uint8:
        codes = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
    return Coded(codes, scales.astype(jnp.float32))


def _product(x: Array, parts: Parts, group_sizes_E: Array, program: str, shape: str) -> Array:
    w = coded(parts)
    E, F = w.codes.shape[:2]
    tile = tuned(program, shape, default_tile(x.shape[0], E, F))
    return product(quantize_lines(x), w, group_sizes_E, tile, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fp8_matmul(x_NK: Array, parts: Parts, coding: Coding) -> Array:
    """See `quantized_matmul.api.quantized_matmul`. A row's result is bitwise independent of the other rows."""
    stack: Any = jax.tree.map(lambda part: part[None], parts)
    shape = shape_class_dense(x_NK, parts, coding)
    return _product(x_NK, stack, _one_group(x_NK), "fp8_matmul", shape)


fp8_matmul.defvjp(
    lambda x_NK, parts, coding: (fp8_matmul(x_NK, parts, coding), (parts, x_NK.shape[1])),
    reference.backward,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_fp8_matmul(x_ND: Array, parts: Parts, group_sizes_E: Array, coding: Coding) -> Array:
    """See `quantized_matmul.api.grouped_quantized_matmul`. A row's result is bitwise independent of the other rows."""
    shape = shape_class(x_ND, parts, group_sizes_E, coding)
    return _product(x_ND, parts, group_sizes_E, "grouped_fp8_matmul", shape)


grouped_fp8_matmul.defvjp(
    lambda x_ND, parts, sizes_E, coding: (
        grouped_fp8_matmul(x_ND, parts, sizes_E, coding),
        (parts, sizes_E, x_ND.shape[1]),
    ),
    reference.grouped_backward,
)
