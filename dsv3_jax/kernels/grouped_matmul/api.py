"""Grouped matrix product: rows sorted by expert, each times its expert's weight; and gate, up and SwiGLU in one."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.grouped_matmul import mosaic, reference, tokamax
from dsv3_jax.kernels.registry import Implementation, call
from dsv3_jax.kernels.registry import mosaic as hopper


def _table(name: str) -> dict[str, Implementation]:
    """Best first; tokamax is there for comparison, no class of shapes lets "auto" take it."""
    return {
        "mosaic": hopper(getattr(mosaic, name), refuses=mosaic.refuses, shape_class=mosaic.shape_class),
        "reference": Implementation(getattr(reference, name)),
        "tokamax": Implementation(
            getattr(tokamax, name),
            platforms=frozenset({"gpu"}),
            refuses=tokamax.refuses,
            shape_class=tokamax.never,
            missing=tokamax.missing,
        ),
    }


GROUPED_MATMUL, GROUPED_SWIGLU = _table("grouped_matmul"), _table("grouped_swiglu")


def grouped_matmul(
    x_ND: jax.Array, w_EFD: jax.Array, group_sizes_E: jax.Array, *, implementation: str = "auto"
) -> jax.Array:
    """y[n] = w[e(n)] @ x[n], where the first group_sizes[0] rows belong to expert 0, and so on.

    Rows after the last group give zeros and get zero gradient. Products accumulate in float32.
    Differentiable in x and w; group sizes are not.

    Args:
      x_ND: rows sorted by expert; those after the last group may hold anything finite.
      w_EFD: weights as stored, [expert, out, in], in x's dtype.
      group_sizes_E: int32 rows of each expert; their sum is at most N. Empty groups are free.
      implementation: "auto", "reference", "mosaic" (Hopper, 16-bit types, widths of 128 n) or "tokamax".

    Returns:
      y_NF in x's dtype.

    Raises:
      ValueError: shapes or dtypes disagree (ConfigError: the implementation is unknown or cannot run).
    """
    if w_EFD.ndim != 3:
        raise ValueError(f"expected w [E, F, D], got {w_EFD.shape}")
    group_sizes_E = _checked(x_ND, w_EFD, group_sizes_E)
    return call("grouped_matmul", implementation, GROUPED_MATMUL, x_ND, w_EFD, group_sizes_E)


def grouped_swiglu(
    x_ND: jax.Array, w_EPFD: jax.Array, group_sizes_E: jax.Array, *, implementation: str = "auto"
) -> jax.Array:
    """h[n] = silu(w[e(n), 0] @ x[n]) * (w[e(n), 1] @ x[n]): `grouped_matmul` with gate and up, and their SwiGLU.

    The "mosaic" implementation applies SwiGLU to the float32 sums; "reference" to sums rounded to x's dtype.

    Args:
      x_ND, group_sizes_E, implementation: as for `grouped_matmul`.
      w_EPFD: weights as stored, P = 2: gate, up.

    Returns:
      h_NF in x's dtype.

    Raises:
      ValueError: as `grouped_matmul`.
    """
    if w_EPFD.ndim != 4 or w_EPFD.shape[1] != 2:
        raise ValueError(f"expected w [E, 2, F, D], got {w_EPFD.shape}")
    group_sizes_E = _checked(x_ND, w_EPFD, group_sizes_E)
    return call("grouped_swiglu", implementation, GROUPED_SWIGLU, x_ND, w_EPFD, group_sizes_E)


def _checked(x_ND: jax.Array, w: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """The group sizes as int32, if all three belong together."""
    if x_ND.ndim != 2 or group_sizes_E.ndim != 1:
        raise ValueError(f"expected x [N, D] and group_sizes [E], got {x_ND.shape} and {group_sizes_E.shape}")
    if x_ND.shape[1] != w.shape[-1] or group_sizes_E.shape[0] != w.shape[0]:
        raise ValueError(
            f"x {x_ND.shape} (N D), w {w.shape} (E .. F D), group_sizes {group_sizes_E.shape} (E) disagree"
        )
    if x_ND.dtype != w.dtype:
        raise ValueError(f"x is {x_ND.dtype} but w is {w.dtype}: cast one explicitly")
    return group_sizes_E.astype(jnp.int32)
