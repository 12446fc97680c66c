"""Products of training in FP8: y = x w^T forward, dX and dW backward, every operand rounded to e4m3.

As in the V3 report (section 3.3): activations and output gradients 1 x 128 along the summed axis, weights 128 x 128,
sums in float32. Kept for backward are x's codes, not x. dW sums over tokens, so both of its operands have a scale for
128 tokens of a column: the gradient is rounded from itself, x from what its codes stand for (rounded twice, as there).
With experts, blocks of tokens begin where the expert's rows begin.

Forward and dX are products with a stored FP8 weight and go through `quantized_matmul.api`, so to the Mosaic kernels
where they are chosen. Scales along tokens are powers of two (the report's for activations that are rounded both ways):
then bfloat16 holds code * scale exactly, and dW is a product of the compute type, with a float32 sum.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv3_jax.kernels.fp8_matmul.quantize import (
    BLOCK,
    Coded,
    codes_of,
    power_of_two,
    quantize_blocks,
    quantize_lines,
    scales_of,
    values,
)
from dsv3_jax.kernels.grouped_matmul import grouped_matmul
from dsv3_jax.kernels.quantized_matmul import Coding, grouped_quantized_matmul, quantized_matmul
from dsv3_jax.kernels.registry import full_precision

Array = jax.Array

CODING = Coding("fp8", BLOCK, BLOCK, "fp8")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x_NK: Array, w_RK: Array, implementation: str = "auto") -> Array:
    """y [N, R] in x's type, from x and w rounded to FP8; gradients from operands that are rounded as well.

    Args:
      w_RK: the weight as stored, [out, in].
      implementation: of the forward and dX product, see `quantized_matmul.api.quantized_matmul`.
    """
    return _product(x_NK, quantize_blocks(w_RK), implementation)


def _product(x_NK: Array, w: Coded, implementation: str) -> Array:
    return quantized_matmul(x_NK, w.codes, w.scales, coding=CODING, implementation=implementation)


def _forward(x_NK: Array, w_RK: Array, implementation: str) -> tuple[Array, tuple[Coded, Array, Array]]:
    return linear(x_NK, w_RK, implementation), (quantize_lines(x_NK), w_RK, jnp.zeros((0,), x_NK.dtype))


def _backward(implementation: str, saved: tuple[Coded, Array, Array], dy_NR: Array) -> tuple[Array, Array]:
    x, w_RK, like = saved
    dx_NK = _product(dy_NR, _transposed(quantize_blocks(w_RK)), implementation).astype(like.dtype)
    one = jnp.full((1,), dy_NR.shape[0], jnp.int32)
    x_PK, dy_PR = (by_token_blocks(a, one)[0].astype(w_RK.dtype) for a in (values(x), dy_NR))
    dims, precision = (((0,), (0,)), ((), ())), full_precision(w_RK.dtype)
    dw_RK = lax.dot_general(dy_PR, x_PK, dims, precision, preferred_element_type=jnp.float32)
    return dx_NK, dw_RK.astype(w_RK.dtype)


linear.defvjp(_forward, _backward)


def _transposed(w: Coded) -> Coded:
    """The weight with its sides swapped: blocks are square."""
    return Coded(*(jnp.swapaxes(part, -1, -2) for part in w))


# --- experts --------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_linear(
    x_ND: Array, w_EFD: Array, group_sizes_E: Array, implementation: str = "auto", of_dw: str = "auto"
) -> Array:
    """`linear` with rows sorted by expert, each times its expert's weight: [N, F]; rows left over give zeros.

    Args:
      of_dw: implementation of dW, see `grouped_matmul`.
    """
    return _grouped(x_ND, quantize_blocks(w_EFD), group_sizes_E, implementation)


def _grouped(x_ND: Array, w: Coded, group_sizes_E: Array, implementation: str) -> Array:
    return grouped_quantized_matmul(
        x_ND, w.codes, w.scales, None, group_sizes_E, coding=CODING, implementation=implementation
    )


def _grouped_forward(x_ND: Array, w_EFD: Array, group_sizes_E: Array, implementation: str, of_dw: str) -> Any:
    y_NF = grouped_linear(x_ND, w_EFD, group_sizes_E, implementation, of_dw)
    return y_NF, (quantize_lines(x_ND), w_EFD, group_sizes_E, jnp.zeros((0,), x_ND.dtype))


def _grouped_backward(
    implementation: str, of_dw: str, saved: Any, dy_NF: Array
) -> tuple[Array, Array, np.ndarray]:
    x, w_EFD, group_sizes_E, like = saved
    no_gradient = np.zeros(group_sizes_E.shape, jax.dtypes.float0)
    if dy_NF.shape[0] == 0:
        return jnp.zeros((0, w_EFD.shape[2]), like.dtype), jnp.zeros_like(w_EFD), no_gradient
    transposed = _transposed(quantize_blocks(w_EFD))
    dx_ND = _grouped(dy_NF, transposed, group_sizes_E, implementation).astype(like.dtype)
    x_PD, sizes_E = by_token_blocks(values(x), group_sizes_E)
    dy_PF, _ = by_token_blocks(dy_NF, group_sizes_E)
    x_PD, dy_PF = x_PD.astype(w_EFD.dtype), dy_PF.astype(w_EFD.dtype)
    product = functools.partial(grouped_matmul, implementation=of_dw)
    (dw_EFD,) = jax.vjp(lambda w: product(x_PD, w, sizes_E), w_EFD)[1](dy_PF)
    return dx_ND, dw_EFD, no_gradient


grouped_linear.defvjp(_grouped_forward, _grouped_backward)


def by_token_blocks(x_ND: Array, group_sizes_E: Array) -> tuple[Array, Array]:
    """Rows rounded with a power of two for each column of 128 rows of their group, float32, and the size of each group.

    Every group is filled up with zeros to whole blocks: [P, D], P = 128 (N // 128 + E), sizes multiples of 128.
    """
    N, E = x_ND.shape[0], group_sizes_E.shape[0]
    if N == 0:  # nothing to take from
        return jnp.zeros((BLOCK * E, x_ND.shape[1]), jnp.float32), jnp.zeros_like(group_sizes_E)
    blocks_E = (group_sizes_E + BLOCK - 1) // BLOCK
    ends_E = jnp.cumsum(blocks_E)
    first_row_E, first_block_E = jnp.cumsum(group_sizes_E) - group_sizes_E, ends_E - blocks_E
    block_B = jnp.arange(N // BLOCK + E, dtype=jnp.int32)
    expert_B = jnp.minimum(jnp.sum(block_B[:, None] >= ends_E[None, :], axis=1, dtype=jnp.int32), E - 1)
    within_B = (block_B - first_block_E[expert_B]) * BLOCK
    row_BI = within_B[:, None] + jnp.arange(BLOCK, dtype=jnp.int32)[None, :]
    own_BI = (row_BI < group_sizes_E[expert_B][:, None]) & (block_B < ends_E[-1])[:, None]
    index_BI = jnp.where(own_BI, first_row_E[expert_B][:, None] + row_BI, N)
    x_BID = jnp.take(x_ND, index_BI, axis=0, mode="fill", fill_value=0).astype(jnp.float32)
    scale_BD = power_of_two(scales_of(jnp.max(jnp.abs(x_BID), axis=1)))
    codes_BID = codes_of(x_BID, scale_BD[:, None, :])
    rounded = codes_BID.astype(jnp.float32) * scale_BD[:, None, :]
    return rounded.reshape(-1, x_ND.shape[1]), blocks_E * BLOCK
