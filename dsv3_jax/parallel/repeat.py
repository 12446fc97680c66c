"""A sum over as many visits as there turn out to be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def int32(value: int) -> Array:
    """A constant to count with."""
    return jnp.asarray(value, jnp.int32)


def sum_over(visit: Callable[..., Array], count: Array, most: int, *operands: Array) -> Array:
    """visit(0, ...) + visit(1, ...) + .. + visit(count - 1, ...); at least the first visit is made.

    This is how a buffer of usual size serves the worst case: the first visit is differentiated as any code; further
    ones are a loop whose length is known on the device only, and backward recomputes them one by one. So memory does
    not grow with `count`, and no visit that is not needed costs anything.

    Args:
      visit: (int32 number, *operands) -> array. It may close over weights, quantised or not.
      count: int32, at most `most`. Where a visit holds a collective, equal on the devices of its axis.
      most: 1 or less makes the one visit without any loop.
    """
    if most <= 1:
        return visit(int32(0), *operands)
    # Everything that the visit closes over becomes an operand, codes of quantised weights too
    # (`jax.closure_convert` would leave those behind in the custom derivative).
    traced = jax.make_jaxpr(visit)(int32(0), *operands)

    def closed(number: Array, *values: Array) -> Array:
        own, hoisted = values[: len(operands)], values[len(operands) :]
        (result,) = jax.core.eval_jaxpr(traced.jaxpr, hoisted, number, *own)
        return result

    return _sum_over(closed, count, *operands, *traced.consts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over(visit: Callable[..., Array], count: Array, *operands: Array) -> Array:
    return _rest(visit, count, operands, visit(int32(0), *operands))


def _rest(visit: Callable[..., Array], count: Array, operands: tuple[Array, ...], first: Array) -> Array:
    return lax.fori_loop(int32(1), count, lambda r, total: total + visit(r, *operands), first)


def _is_float(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _pullback(visit: Callable[..., Array], r: Array, operands: tuple[Array, ...]) -> tuple[Array, Any]:
    """The visit's value and its vjp with respect to the floating operands."""

    def of_floats(*floats: Array) -> Array:
        values = iter(floats)
        return visit(r, *(next(values) if _is_float(x) else x for x in operands))

    return jax.vjp(of_floats, *(x for x in operands if _is_float(x)))


def _forward(visit: Callable[..., Array], count: Array, *operands: Array) -> tuple[Array, Any]:
    first, pull = _pullback(visit, int32(0), operands)
    return _rest(visit, count, operands, first), (count, operands, pull)


def _backward(visit: Callable[..., Array], saved: Any, g: Array) -> tuple[Array | None, ...]:
    count, operands, pull = saved

    def more(r: Array, grads: tuple[Array, ...]) -> tuple[Array, ...]:
        return jax.tree.map(jnp.add, grads, _pullback(visit, r, operands)[1](g))

    grads = iter(lax.fori_loop(int32(1), count, more, pull(g)))
    return (None, *(next(grads) if _is_float(x) else None for x in operands))


_sum_over.defvjp(_forward, _backward)
