"""What this device can do at most: copied bytes and bfloat16 products a second, measured in the same run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu.timing import timed


def ceilings(small: bool) -> dict[str, Any]:
    """bytes_per_s (read and written) of a copy, flops_per_s of a product of random matrices."""
    elements, width, calls = (1 << 16, 64, 5) if small else (1 << 28, 8192, 20)
    keys = jax.random.split(jax.random.key(7), 4)
    arrays = [(jax.random.normal(key, (elements,)),) for key in keys[:2]]
    # A copy that XLA cannot leave out.
    copy = timed(jax.jit(lambda x: -x), arrays, calls)
    sides = [
        tuple(jax.random.normal(k, (width, width), jnp.bfloat16) for k in jax.random.split(key))
        for key in keys[2:]
    ]
    product = timed(jax.jit(lambda a, b: a @ b.T), sides, calls)
    return {
        "bytes_per_s": 2 * 4 * elements / (1e-3 * copy.median),
        "flops_per_s": 2 * width**3 / (1e-3 * product.median),
        "copy": copy.row(),
        "product": product.row(),
    }
