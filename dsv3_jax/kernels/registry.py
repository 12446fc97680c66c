"""Which implementation of a kernel runs: an explicit name, or "auto" by device, arguments and evidence.

How an operation is put together (`kernels/<op>/api.py`):

    ATTENTION = {                                    # best first; "reference" last
        "mosaic": mosaic(pallas_gpu.attention, refuses=pallas_gpu.refuses, shape_class=pallas_gpu.shape_class),
        "reference": Implementation(reference.attention),
    }

    def attention(q, k, v, *, scale, implementation="auto"):
        ...check the shapes, raise ValueError...
        return call("attention", implementation, ATTENTION, q, k, v, scale=scale)

Every function of the table takes the same arguments, and so do `refuses` and `shape_class`:

    def refuses(q, k, v, *, scale) -> str | None:    # the reason these are not taken, or None
        if q.shape[-1] % 64: return f"head size {q.shape[-1]} is not a multiple of 64"

    def shape_class(q, k, v, *, scale) -> str:       # what tiling and correctness depend on, no sizes that only
        return f"q{q.shape[-1]}-v{v.shape[-1]}-{q.dtype.name}"              # scale the grid (batch, length, heads)

They look at shapes, dtypes and static values only: they run at trace time. Whatever `refuses` lets through must be
right.
Tile parameters come from `tables.tuned(program, shape_class, default)`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.errors import ConfigError
from dsv3_jax.kernels import tables
from dsv3_jax.kernels.shim import Target, target, why_not_interpret, why_not_mosaic

logger = logging.getLogger(__name__)

# Families of compute capability 9.0: what kernels that use WGMMA and the tensor memory accelerator run on.
HOPPER = frozenset({"H100", "H200", "H800", "H20", "GH200"})


@dataclass(frozen=True)
class Implementation:
    """One way to compute a kernel.

    Attributes:
      function: same signature as the kernel's reference.
      platforms: JAX platforms it can run on; empty means every platform.
      kinds: device families it can run on (`shim.Target.kind`); empty means every one.
      refuses: called with the function's arguments; why they are not taken, or None.
      shape_class: called with the function's arguments; their class in `tables`. With one, "auto" takes this
        implementation only where a committed run on the device shows it correct for the class.
      missing: why it cannot be used on this installation (a package, a version), or None.
      interpretable: it also runs, on any platform, inside `shim.interpret()`.
    """

    function: Callable
    platforms: frozenset[str] = field(default_factory=frozenset)
    kinds: frozenset[str] = field(default_factory=frozenset)
    refuses: Callable[..., str | None] | None = None
    shape_class: Callable[..., str] | None = None
    missing: Callable[[], str | None] | None = None
    interpretable: bool = False

    def why_not(self, where: Target) -> str | None:
        """The reason it cannot run on that device, whatever the arguments, or None if it can."""
        if self.interpretable and where.interpreted:
            return why_not_interpret()
        if self.platforms and where.platform not in self.platforms:
            return f"it runs on {', '.join(sorted(self.platforms))}, not on {where.platform}"
        if self.kinds and where.kind not in self.kinds:
            return f"it runs on {', '.join(sorted(self.kinds))}, not on {where.kind}"
        return self.missing() if self.missing else None


def mosaic(
    function: Callable, *, refuses: Callable[..., str | None], shape_class: Callable[..., str]
) -> Implementation:
    """A Pallas Mosaic GPU kernel for Hopper, which "auto" takes only where a committed run shows it correct."""
    return Implementation(
        function,
        platforms=frozenset({"gpu"}),
        kinds=HOPPER,
        refuses=refuses,
        shape_class=shape_class,
        missing=why_not_mosaic,
        interpretable=True,
    )


@functools.cache
def _log_choice(kernel: str, where: Target, name: str, passed_over: str) -> None:
    # Cached so that a kernel called in every layer of every trace is announced once.
    device = where.platform if where.platform == where.kind else f"{where.platform} ({where.kind})"
    logger.info("kernel %s: implementation %r on platform %s%s", kernel, name, device, passed_over)


def resolve(
    kernel: str, implementation: str, available: Mapping[str, Implementation], *args: Any, **kwargs: Any
) -> Callable:
    """The function that computes `kernel` for these arguments, on the device that is traced for.

    Args:
      kernel: the kernel's name, for messages and tables.
      implementation: "auto" or a key of `available`.
      available: implementations by name, best first; "auto" takes the first that can run and is shown correct.
      args, kwargs: what the function will be called with.

    Raises:
      ConfigError: the name is unknown, or that implementation cannot run here or refuses the arguments.
    """
    where = target()

    def why_not(name: str, shown: bool) -> str | None:
        candidate = available[name]
        reason = candidate.why_not(where)
        if reason is None and candidate.refuses is not None:
            reason = candidate.refuses(*args, **kwargs)
        if reason is None and shown and candidate.shape_class is not None:
            shape = candidate.shape_class(*args, **kwargs)
            if not tables.verified(kernel, name, where.kind, shape):
                reason = f"no committed run on {where.kind} shows it correct for {shape}"
        return reason

    def taken(name: str) -> Callable:
        candidate = available[name]
        if candidate.shape_class is not None:
            tables.chosen(kernel, name, candidate.shape_class(*args, **kwargs))
        return candidate.function

    if implementation == "auto":
        reasons = {}
        for name in available:
            reason = why_not(name, shown=True)
            if reason is None:
                passed_over = "".join(f"; not {other!r}: {why}" for other, why in reasons.items())
                # On a machine without a GPU it goes without saying that kernels for one are passed over.
                _log_choice(kernel, where, name, passed_over if where.platform == "gpu" else "")
                return taken(name)
            reasons[name] = reason
        told = "; ".join(f"{name}: {why}" for name, why in reasons.items())
        raise ConfigError(f"kernel {kernel} has no implementation that can run here ({told})")
    if implementation not in available:
        known = ", ".join(["auto", *available])
        raise ConfigError(f"kernel {kernel} has no implementation {implementation!r}; known: {known}")
    reason = why_not(implementation, shown=False)
    if reason is not None:
        raise ConfigError(f"kernel {kernel}: implementation {implementation!r} cannot run: {reason}")
    return taken(implementation)


def call(
    kernel: str, implementation: str, available: Mapping[str, Implementation], *args: Any, **kwargs: Any
) -> Any:
    """Compute `kernel` with the implementation that `resolve` gives for these arguments."""
    return resolve(kernel, implementation, available, *args, **kwargs)(*args, **kwargs)


def full_precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision | None:
    """The precision of a product of this type: float32 means full float32, no TF32 on GPUs."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
