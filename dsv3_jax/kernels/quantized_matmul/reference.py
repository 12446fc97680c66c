"""XLA implementation of products with quantised weights.

On the CPU a matrix is never dequantised as a whole: a slab of rows that fits a core's cache is, used, and forgotten. So
a product reads the codes once from memory and nothing of the size of the weight is written. On an accelerator a slab
would be a kernel launch or more: there a dense product is one, of one matrix of one layer. XLA's GPU compiler fuses
int8 with a scale a row into it and writes the other formats out once in the type of the activations.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv3_jax.kernels.fp8_matmul.quantize import quantize_lines, values
from dsv3_jax.kernels.grouped_matmul.reference import (
    ROWS_BY_VECTOR,
    _dot,
    _for_tiles,
    _live,
    _rows,
    _tiles,
    _window,
)
from dsv3_jax.kernels.quantized_matmul.coding import (
    Coding,
    dequantize_split,
    e4m3_values,
    join_columns,
    split_columns,
)
from dsv3_jax.kernels.registry import full_precision

Array = jax.Array
Parts = tuple[Array, Array, Array | None]  # codes, scales, zeros

# Dequantised bytes held at once: a slab stays in a core's second-level cache while it is used.
SLAB_BYTES = 256 * 1024


def slab_rows(rows: int, columns: int, coding: Coding) -> int:
    """Rows dequantised together: a divisor of `rows` that does not straddle blocks, at most SLAB_BYTES in float32."""
    height = coding.block_rows
    fits = [
        f
        for f in range(1, rows + 1)
        if rows % f == 0 and f * columns * 4 <= SLAB_BYTES and (height % f == 0 or f % height == 0)
    ]
    return max(fits, default=1)


def _slab(
    parts: Parts, e: Array | int, i: Array | int, f: int, coding: Coding, columns: int, dtype: Any
) -> list[Array]:
    """Rows [i * f, (i + 1) * f) of matrix e of a stack, dequantised, in the pieces of `dequantize_split`."""
    codes, scales, zeros = parts
    height = coding.block_rows
    first, count = (i * f // height, 1) if f < height else (i * (f // height), -(-f // height))

    def take(x: Array, start: Array | int, rows: int) -> Array:
        return lax.dynamic_slice(x, (e, start, 0), (1, rows, x.shape[2]))[0]

    def blocks(x: Array) -> Array:
        own = take(x, first, count)
        return jnp.broadcast_to(own, (f, own.shape[1])) if f < height else own

    part = coding if f >= height else coding.with_block_rows(1)
    own = (take(codes, i * f, f), blocks(scales), None if zeros is None else blocks(zeros))
    # The slices are made first: a loop that also computes where they begin is not vectorised (10 times slower).
    return _made(dequantize_split(lax.optimization_barrier(own), part, columns, dtype))


def _made(pieces: list[Array]) -> list[Array]:
    """Stops a product from making its operand again for every output."""
    return lax.optimization_barrier(pieces)


def _times(pieces: list[Array], weight: list[Array]) -> Array:
    """float32 [N, f]: columns in pieces times a slab in pieces."""
    return functools.reduce(jnp.add, (_dot(x, w, (1, 1)) for x, w in zip(pieces, weight, strict=True)))


def _stacked(parts: Parts) -> Parts:
    return jax.tree.map(lambda x: x[None], parts)


def _forward(x_NK: Array, parts: Parts, coding: Coding) -> Array:
    return lax.platform_dependent(
        x_NK,
        parts,
        cpu=functools.partial(forward_by_slab, coding=coding),
        default=functools.partial(forward_at_once, coding=coding),
    )


def _backward(dy_NR: Array, parts: Parts, coding: Coding, K: int) -> Array:
    return lax.platform_dependent(
        dy_NR,
        parts,
        cpu=functools.partial(backward_by_slab, coding=coding, K=K),
        default=functools.partial(backward_at_once, coding=coding, K=K),
    )


def forward_at_once(x_NK: Array, parts: Parts, coding: Coding) -> Array:
    """x times the transpose of the weight, dequantised whole; one scale a row is applied to the sums."""
    codes, scales, _ = parts
    if coding.kind == "int8" and scales.shape[1] == 1 and coding.block_rows == 1:
        return (_dot(x_NK, codes.astype(x_NK.dtype), (1, 1)) * scales.T).astype(x_NK.dtype)
    weight = dequantize_split(parts, coding, x_NK.shape[1], x_NK.dtype)
    return _times(split_columns(x_NK, coding), weight).astype(x_NK.dtype)


def backward_at_once(dy_NR: Array, parts: Parts, coding: Coding, K: int) -> Array:
    """dy times the weight [R, K], dequantised whole."""
    weight = dequantize_split(parts, coding, K, dy_NR.dtype)
    return join_columns([_dot(dy_NR, w, (1, 0)) for w in weight], coding).astype(dy_NR.dtype)


def forward_by_slab(x_NK: Array, parts: Parts, coding: Coding) -> Array:
    """The same as `forward_at_once`, slab after slab."""
    R, K = parts[0].shape[0], x_NK.shape[1]
    f = slab_rows(R, K, coding)
    stack = _stacked(parts)
    pieces = _made(split_columns(x_NK, coding))

    def product(i: Array) -> Array:
        return _times(pieces, _slab(stack, 0, i, f, coding, K, x_NK.dtype)).astype(x_NK.dtype)

    if f == R:
        return product(jnp.int32(0))
    y_iNf = lax.map(product, jnp.arange(R // f, dtype=jnp.int32))
    return y_iNf.transpose(1, 0, 2).reshape(-1, R)


def backward_by_slab(dy_NR: Array, parts: Parts, coding: Coding, K: int) -> Array:
    """The same as `backward_at_once`, slab after slab."""
    N, R = dy_NR.shape
    f = slab_rows(R, K, coding)
    stack = _stacked(parts)

    def add(i: Array, dx: list[Array]) -> list[Array]:
        dy_Nf = lax.dynamic_slice_in_dim(dy_NR, i * f, f, 1)
        weight = _slab(stack, 0, i, f, coding, K, dy_NR.dtype)
        return [sums + _dot(dy_Nf, w, (1, 0)) for sums, w in zip(dx, weight, strict=True)]

    zeros = split_columns(jnp.zeros((N, K), jnp.float32), coding)
    return join_columns(lax.fori_loop(0, R // f, add, zeros), coding).astype(dy_NR.dtype)


def _no_gradient(parts: Parts) -> Any:
    """Of codes, scales and zeros: quantised weights are frozen."""
    return jax.tree.map(
        lambda x: (
            np.zeros(x.shape, jax.dtypes.float0)
            if not jnp.issubdtype(x.dtype, jnp.floating)
            else jnp.zeros_like(x)
        ),
        parts,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def quantized_matmul(x_NK: Array, parts: Parts, coding: Coding) -> Array:
    """See `api.quantized_matmul`."""
    if coding.activations == "int8":
        return _eight_by_eight(x_NK, parts, coding)
    if coding.activations == "fp8":
        return lax.platform_dependent(
            x_NK,
            parts,
            cpu=functools.partial(fp8_by_slab, coding=coding),
            default=functools.partial(fp8_by_block, coding=coding),
        )
    return _forward(x_NK, parts, coding)


def backward(coding: Coding, saved: tuple[Parts, int], dy_NR: Array) -> tuple[Array, Any]:
    """Of any implementation of `quantized_matmul`: saved are the parts and the columns of x."""
    parts, columns = saved
    return _backward(dy_NR, parts, coding, columns), _no_gradient(parts)


quantized_matmul.defvjp(
    lambda x_NK, parts, coding: (quantized_matmul(x_NK, parts, coding), (parts, x_NK.shape[1])), backward
)


def fp8_by_slab(x_NK: Array, parts: Parts, coding: Coding) -> Array:
    """e4m3 times e4m3, both scaled before the sum."""
    return forward_by_slab(_rounded(x_NK, coding), parts, coding).astype(x_NK.dtype)


def fp8_by_block(x_NK: Array, parts: Parts, coding: Coding) -> Array:
    """The same as the formula has it: a block of columns at a time, codes as bfloat16 (exact), sums scaled after."""
    codes_NK, scales_NG = quantize_lines(x_NK, coding.block_columns)
    R, width = parts[0].shape[0], coding.block_columns
    G = scales_NG.shape[1]
    pad = ((0, 0), (0, G * width - x_NK.shape[1]))
    ours, theirs = jnp.pad(codes_NK, pad), jnp.pad(parts[0], pad)

    def add(b: Array, sums_NR: Array) -> Array:
        x, w = (lax.dynamic_slice_in_dim(codes, b * width, width, 1) for codes in (ours, theirs))
        part_NR = _dot(x.astype(jnp.bfloat16), e4m3_values(w).astype(jnp.bfloat16), (1, 1))
        scale_R = jnp.repeat(parts[1][:, b].astype(jnp.float32), coding.block_rows)[:R]
        return sums_NR + part_NR * scales_NG[:, b, None] * scale_R[None]

    zeros = jnp.zeros((x_NK.shape[0], R), jnp.float32)
    return lax.fori_loop(0, G, add, zeros).astype(x_NK.dtype)


def _rounded(x_NK: Array, coding: Coding) -> Array:
    """What the e4m3 codes of activations stand for, float32.

    Both operands' scales are applied before the sum instead of after each block of columns: in float32 that only rounds
    elsewhere, and the slabs are those of every other format.
    """
    return values(quantize_lines(x_NK, coding.block_columns), block_columns=coding.block_columns)


def quantize_activations(x_NK: Array) -> tuple[Array, Array]:
    """int8 codes [N, K] and the float32 scale [N] of each token: max |x| / 127."""
    x_NK = x_NK.astype(jnp.float32)
    scale_N = jnp.maximum(jnp.max(jnp.abs(x_NK), axis=-1), jnp.finfo(jnp.float32).tiny) / 127.0
    return jnp.clip(jnp.rint(x_NK / scale_N[:, None]), -127, 127).astype(jnp.int8), scale_N


def _eight_by_eight(x_NK: Array, parts: Parts, coding: Coding) -> Array:
    """int8 activations times int8 weights: whole-number sums within a group of columns, scaled afterwards."""
    codes_RK, scales_RG, _ = parts
    codes_NK, scale_N = quantize_activations(x_NK)
    N, K = codes_NK.shape
    R, G = scales_RG.shape
    if G == 1:
        dims = (((1,), (1,)), ((), ()))
        sums_NR = lax.dot_general(codes_NK, codes_RK, dims, preferred_element_type=jnp.int32)
        y_NR = sums_NR.astype(jnp.float32) * scales_RG[None, :, 0]
    else:
        pad = G * coding.block_columns - K
        ours, theirs = (
            jnp.pad(c, ((0, 0), (0, pad))).reshape(-1, G, coding.block_columns) for c in (codes_NK, codes_RK)
        )
        dims_G = (((2,), (2,)), ((1,), (1,)))
        sums_GNR = lax.dot_general(ours, theirs, dims_G, preferred_element_type=jnp.int32)
        y_NR = jnp.einsum(
            "GNR,RG->NR", sums_GNR.astype(jnp.float32), scales_RG, precision=full_precision(jnp.float32)
        )
    return (y_NR * scale_N[:, None]).astype(x_NK.dtype)


# --- experts --------------------------------------------------------------------------------------------------


def _by_tile(x_ND: Array, parts: Parts, sizes_E: Array, coding: Coding, columns: int, contract: int) -> Array:
    """Each live expert dequantised once, then tiles of its rows; contract 1: forward, 0: dX."""
    N = x_ND.shape[0]
    E, F = parts[0].shape[:2]
    big, small = _tiles(N, E)
    live, order_E, first_E = _live(sizes_E)
    pieces = _made(split_columns(x_ND, coding)) if contract == 1 else [x_ND]

    def expert(i: Array, y: Array) -> Array:
        e = order_E[i]
        weight = _slab(parts, e, 0, F, coding, columns, x_ND.dtype)

        def product(row: Array, count: int) -> Array:
            own = [_rows(x, row, count) for x in pieces]
            if contract == 1:
                return _times(own, weight).astype(x_ND.dtype)
            return jnp.concatenate([_dot(own[0], w, (1, 0)) for w in weight], axis=-1).astype(x_ND.dtype)

        def visit_big(row: Array, y: Array) -> Array:
            return lax.dynamic_update_slice(y, product(row, big), (row, 0))

        def visit_small(row: Array, end: Array, y: Array) -> Array:
            start, own_N1 = _window(row, end, small, N)
            tile = jnp.where(own_N1, product(start, small), _rows(y, start, small))
            return lax.dynamic_update_slice(y, tile, (start, 0))

        return _for_tiles(first_E[e], sizes_E[e], (big, small), visit_big, visit_small, y)

    y = lax.fori_loop(0, live, expert, jnp.zeros((N, F if contract == 1 else columns), x_ND.dtype))
    return (
        y if contract == 1 else join_columns(jnp.split(y, 2 if coding.kind == "int4" else 1, axis=-1), coding)
    )


def _by_vector(x_ND: Array, parts: Parts, sizes_E: Array, coding: Coding) -> Array:
    """Few rows an expert: slab by slab, each dequantised once for all of its expert's rows."""
    N, D = x_ND.shape
    F = parts[0].shape[1]
    f = slab_rows(F, D, coding)
    slabs = F // f
    pieces = _made(split_columns(x_ND, coding))
    live, order_E, first_E = _live(sizes_E)

    def one(i: Array, y_NF: Array) -> Array:
        e, part = order_E[i // slabs], i % slabs
        weight = _slab(parts, e, part, f, coding, D, x_ND.dtype)

        def row(n: Array, y_NF: Array) -> Array:
            y_1f = _times([_rows(x, n, 1) for x in pieces], weight).astype(x_ND.dtype)
            return lax.dynamic_update_slice(y_NF, y_1f, (n, part * f))

        return lax.fori_loop(first_E[e], first_E[e] + sizes_E[e], row, y_NF)

    return lax.fori_loop(0, live * slabs, one, jnp.zeros((N, F), x_ND.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_quantized_matmul(x_ND: Array, parts: Parts, sizes_E: Array, coding: Coding) -> Array:
    """See `api.grouped_quantized_matmul`."""
    N, D = x_ND.shape
    E, F = parts[0].shape[:2]
    dtype = x_ND.dtype
    if N == 0:
        return jnp.zeros((0, F), dtype)
    if coding.activations == "fp8":
        x_ND = _rounded(x_ND, coding)
    if ROWS_BY_VECTOR * E >= N:
        return _by_vector(x_ND, parts, sizes_E, coding).astype(dtype)
    return _by_tile(x_ND, parts, sizes_E, coding, D, 1).astype(dtype)


def grouped_backward(
    coding: Coding, saved: tuple[Parts, Array, int], dy_NF: Array
) -> tuple[Array, Any, np.ndarray]:
    """Of any implementation of `grouped_quantized_matmul`: saved are parts, group sizes and the columns of x."""
    parts, sizes_E, columns = saved
    dx_ND = _by_tile(dy_NF, parts, sizes_E, coding, columns, 0)
    return dx_ND, _no_gradient(parts), np.zeros(sizes_E.shape, jax.dtypes.float0)


grouped_quantized_matmul.defvjp(
    lambda x_ND, parts, sizes_E, coding: (
        grouped_quantized_matmul(x_ND, parts, sizes_E, coding),
        (parts, sizes_E, x_ND.shape[1]),
    ),
    grouped_backward,
)
