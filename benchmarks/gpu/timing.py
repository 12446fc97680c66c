"""Time on the device, with inputs that differ from call to call."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

CACHE = 64 << 20  # bytes of a last-level cache that inputs must not stay in
MOST_INPUTS = 16 << 30  # bytes of all sets of inputs together


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes:
      method: "kernels" (sum of the kernels' own times, by CUPTI) or "calls" (enqueued together, waited for once).
    """

    median: float
    least: float
    most: float
    calls: int
    method: str

    def row(self) -> dict[str, Any]:
        """For the result file."""
        return {
            key: round(v, 5) if isinstance(v, float) else v for key, v in dataclasses.asdict(self).items()
        }


def sets_for(size: int) -> int:
    """How many sets of inputs of `size` bytes to rotate: two caches' worth, as far as memory allows."""
    wanted = max(2, -(-2 * CACHE // max(size, 1)))
    return max(1, min(wanted, 16, MOST_INPUTS // max(size, 1)))


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def timed(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], calls: int) -> Timing:
    """Time a jitted function over rotated inputs, after a warm-up of every set."""
    for arguments in sets:
        jax.block_until_ready(function(*arguments))
    by_kernels = _by_kernels(function, sets, calls) if jax.default_backend() == "gpu" else None
    if by_kernels is not None:
        return _timing(by_kernels, "kernels")
    samples = []
    rounds = min(5, calls)
    each = max(1, calls // rounds)
    for _ in range(rounds):
        start = time.perf_counter()
        results = [function(*sets[n % len(sets)]) for n in range(each)]
        jax.block_until_ready(results)
        samples.append(1e3 * (time.perf_counter() - start) / each)
        del results
    return _timing(samples, "calls")


def _timing(samples: list[float], method: str) -> Timing:
    return Timing(statistics.median(samples), min(samples), max(samples), len(samples), method)


def _by_kernels(
    function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], calls: int
) -> list[float] | None:
    """Milliseconds of each call by CUPTI; None where it is not to be had, which is told."""
    from jax.experimental.mosaic.gpu import profiler

    measured = profiler.Cupti(finalize=False).measure(function)
    samples = []
    try:
        for n in range(calls):
            _, milliseconds = measured(*sets[n % len(sets)])
            if milliseconds is None:
                return None
            samples.append(float(milliseconds))
    except RuntimeError as error:
        print(f"  note: no times of kernels ({error}); calls are timed instead", flush=True)
        return None
    return samples


def poison(tree: Any) -> None:
    """Fill memory of the outputs' sizes with NaN and free it, so that an output that is not written shows."""
    garbage = [
        jnp.full(leaf.shape, jnp.nan, leaf.dtype)
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        for _ in range(2)
    ]
    jax.block_until_ready(garbage)
    for array in garbage:
        array.delete()
