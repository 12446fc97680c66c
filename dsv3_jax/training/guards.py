"""What keeps a bad step out of the state: values that are not finite, and spikes against the recent past.

All of it runs inside the jitted step. A spike is a loss or gradient norm further above the median of the last
applied steps than `training.spike_guard` times their median absolute deviation (MAD). The window holds values of
applied steps only, so nothing that is not finite ever gets in, and a spike does not raise the bar for the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array
WINDOW = 64  # steps
_ENOUGH = 20  # values before anything counts as a spike
_LEAST = (
    0.01  # MADs are taken as at least this share of the median: a flat past must not make every step a spike
)


@struct.dataclass
class Guard:
    """Losses and gradient norms of the last applied steps, float32 [WINDOW] each, as rings.

    count: int32, how many steps were put in; the next goes to count mod WINDOW.
    """

    losses: Array
    grad_norms: Array
    count: Array


def init_guard() -> Guard:
    """An empty window."""
    return Guard(jnp.zeros(WINDOW, jnp.float32), jnp.zeros(WINDOW, jnp.float32), jnp.zeros((), jnp.int32))


def judge(guard: Guard, loss: Array, grad_norm: Array, mads: float) -> tuple[Array, Array]:
    """(whether the step may be applied, whether it is a spike), booleans; `mads` 0 looks for no spikes."""
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if not mads:
        return finite, jnp.zeros((), bool)
    high = _above(guard.losses, guard.count, loss, mads) | _above(
        guard.grad_norms, guard.count, grad_norm, mads
    )
    spike = finite & high & (guard.count >= _ENOUGH)
    return finite & ~spike, spike


def remember(guard: Guard, applied: Array, loss: Array, grad_norm: Array) -> Guard:
    """The window after a step. Selects, never products: 0 * NaN is NaN."""
    here = applied & (jnp.arange(WINDOW) == guard.count % WINDOW)
    return Guard(
        jnp.where(here, loss, guard.losses),
        jnp.where(here, grad_norm, guard.grad_norms),
        guard.count + applied.astype(jnp.int32),
    )


def _above(values: Array, count: Array, value: Array, mads: float) -> Array:
    known = jnp.arange(WINDOW) < count
    median = _median(values, known)
    mad = _median(jnp.abs(values - median), known)
    return value - median > mads * jnp.maximum(mad, _LEAST * jnp.abs(median))


def _median(values: Array, known: Array) -> Array:
    n = jnp.sum(known)
    ordered = jnp.sort(jnp.where(known, values, jnp.inf))
    return (ordered[jnp.maximum(n - 1, 0) // 2] + ordered[n // 2]) / 2


def guard_to_json(guard: Guard) -> dict[str, Any]:
    """For train_state.json; a float32 comes back from its decimal digits exactly."""
    host = jax.device_get(guard)
    return {
        "losses": [float(value) for value in host.losses],
        "grad_norms": [float(value) for value in host.grad_norms],
        "count": int(host.count),
    }


def guard_from_json(saved: Mapping[str, Any] | None) -> Guard:
    """The window as numpy arrays; an empty one for a checkpoint that has none."""
    if saved is None:
        return jax.tree.map(np.asarray, init_guard())
    return Guard(
        np.asarray(saved["losses"], np.float32),
        np.asarray(saved["grad_norms"], np.float32),
        np.asarray(saved["count"], np.int32),
    )
