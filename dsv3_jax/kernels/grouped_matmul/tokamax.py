"""The grouped products of the tokamax package, for comparison: an optional implementation, never chosen by "auto"."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp


def missing() -> str | None:
    """Why it cannot be used on this installation, or None."""
    return None if importlib.util.find_spec("tokamax") else "the package tokamax is not installed"


def refuses(x_ND: jax.Array, w_EFD: jax.Array, group_sizes_E: jax.Array) -> str | None:
    """Why these arguments are not taken, or None."""
    return None if x_ND.dtype in (jnp.bfloat16, jnp.float16) else f"x is {x_ND.dtype}, not a 16-bit type"


def never(x_ND: jax.Array, w_EFD: jax.Array, group_sizes_E: jax.Array) -> str:
    """A class of shapes that no table lists."""
    return "comparison only"


def grouped_matmul(x_ND: jax.Array, w_EFD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`. tokamax takes weights as [expert, in, out]: the swap may cost a copy."""
    import tokamax

    live_N1 = jnp.arange(x_ND.shape[0])[:, None] < jnp.sum(group_sizes_E)
    y_NF = tokamax.ragged_dot(x_ND, jnp.swapaxes(w_EFD, 1, 2), group_sizes_E)
    # What it leaves in rows after the last group is not said.
    return jnp.where(live_N1, y_NF, 0).astype(x_ND.dtype)


def grouped_swiglu(x_ND: jax.Array, w_EPFD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """See `api.grouped_swiglu`: not fused."""
    E, P, F, D = w_EPFD.shape
    gate_NF, up_NF = jnp.split(grouped_matmul(x_ND, w_EPFD.reshape(E, P * F, D), group_sizes_E), P, axis=-1)
    return jax.nn.silu(gate_NF) * up_NF
