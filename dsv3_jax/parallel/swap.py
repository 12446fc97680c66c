"""Blocks of rows, one a peer, exchanged over a mesh axis: padded, or only what is filled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


class Swap(Protocol):
    """rows [size * C, ..], block p for peer p -> [size * C, ..], block p from peer p; what was not filled is zero."""

    def __call__(self, rows: Array, *, sent: Array, received: Array, axis: str) -> Array:
        """
        Args:
          rows: rows of a block that are not filled must be zero.
          sent, received: int32 filled rows of each block here, and of this device's block at each peer.
        """


def swap_padded(rows: Array, *, sent: Array, received: Array, axis: str) -> Array:
    """Whole blocks travel."""
    return lax.all_to_all(rows, axis, 0, 0, tiled=True)


def swap_ragged(
    rows: Array,
    *,
    sent: Array,
    received: Array,
    axis: str,
    primitive: Callable[..., Array] = lax.ragged_all_to_all,
) -> Array:
    """Only the filled rows travel.

    Args:
      primitive: `jax.lax.ragged_all_to_all`, or a stand-in where XLA does not implement it.
    """
    return _ragged(rows, sent, received, axis, primitive)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _ragged(rows: Array, sent: Array, received: Array, axis: str, primitive: Callable) -> Array:
    """Both sides keep block p for peer p, so every offset is a multiple of a block's length."""
    size = sent.shape[0]
    capacity = rows.shape[0] // size
    return primitive(
        rows,
        jnp.zeros_like(rows),
        jnp.arange(size, dtype=jnp.int32) * capacity,  # where the rows for peer p begin here
        sent,
        jnp.full(size, lax.axis_index(axis) * capacity, jnp.int32),  # and where they go at peer p
        received,
        axis_name=axis,
    )


def _ragged_forward(
    rows: Array, sent: Array, received: Array, axis: str, primitive: Callable
) -> tuple[Array, tuple[Array, Array]]:
    return _ragged(rows, sent, received, axis, primitive), (sent, received)


def _ragged_backward(
    axis: str, primitive: Callable, saved: tuple[Array, Array], g: Array
) -> tuple[Array, None, None]:
    sent, received = saved
    return _ragged(g, received, sent, axis, primitive), None, None


_ragged.defvjp(_ragged_forward, _ragged_backward)
