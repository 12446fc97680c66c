"""Grouped matrix product: rows sorted by expert, each times its expert's weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.grouped_matmul import reference
from dsv3_jax.kernels.registry import Implementation, call

GROUPED_MATMUL = {"reference": Implementation(reference.grouped_matmul)}


def grouped_matmul(
    x_ND: jax.Array, w_EFD: jax.Array, group_sizes_E: jax.Array, *, implementation: str = "auto"
) -> jax.Array:
    """y[n] = w[e(n)] @ x[n], where the first group_sizes[0] rows belong to expert 0, and so on.

    Rows after the last group give zeros and get zero gradient. Products accumulate in float32.
    Differentiable in x and w; group sizes are not.

    Args:
      x_ND: rows sorted by expert.
      w_EFD: weights as stored, [expert, out, in], in x's dtype.
      group_sizes_E: int32 rows of each expert; their sum is at most N. Empty groups are free.
      implementation: "auto" or "reference".

    Returns:
      y_NF in x's dtype.

    Raises:
      ValueError: shapes or dtypes disagree, or the implementation is unknown.
    """
    if x_ND.ndim != 2 or w_EFD.ndim != 3 or group_sizes_E.ndim != 1:
        raise ValueError(
            f"expected x [N, D], w [E, F, D], group_sizes [E], got {x_ND.shape}, {w_EFD.shape}, "
            f"{group_sizes_E.shape}"
        )
    if x_ND.shape[1] != w_EFD.shape[2] or group_sizes_E.shape[0] != w_EFD.shape[0]:
        raise ValueError(
            f"x {x_ND.shape} (N D), w {w_EFD.shape} (E F D), group_sizes {group_sizes_E.shape} (E) disagree"
        )
    if x_ND.dtype != w_EFD.dtype:
        raise ValueError(f"x is {x_ND.dtype} but w is {w_EFD.dtype}: cast one explicitly")
    group_sizes_E = group_sizes_E.astype(jnp.int32)
    return call("grouped_matmul", implementation, GROUPED_MATMUL, x_ND, w_EFD, group_sizes_E)
