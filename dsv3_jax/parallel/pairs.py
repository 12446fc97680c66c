"""Token-expert pairs in a buffer: which row holds which pair, rows out of tokens, tokens out of rows.

Letters of this file: M tokens at hand, K choices a token, R rows of a buffer, G groups (experts of one device, or
devices). A pair is numbered m * K + k. Buffers have static sizes; sums over a token's rows are gathers in the order of
choice, never scatters, so they are the same on every run.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Pairs(NamedTuple):
    """Pairs sorted by group, those without a group last; int32."""

    order: Array
    """Number of the pair at each rank, [M * K]."""
    rank_MK: Array
    sizes_G: Array


class Rows(NamedTuple):
    """A buffer of R rows that hold pairs; int32."""

    pair_R: Array
    """Number of the pair in each row; M * K for an empty one."""
    place_MK: Array
    """Row of each pair; R for one that is not in the buffer."""


def sort_pairs(group_MK: Array, groups: int) -> Pairs:
    """Sort pairs by group 0 .. groups - 1, stably; -1 is no group."""
    key = jnp.where(group_MK < 0, groups, group_MK).reshape(-1)
    order = jnp.argsort(key, stable=True).astype(jnp.int32)
    number = jnp.arange(order.shape[0], dtype=jnp.int32)
    rank = jnp.zeros_like(order).at[order].set(number, unique_indices=True)
    sizes_G = jnp.zeros(groups, jnp.int32).at[key].add(1, mode="drop")
    return Pairs(order, rank.reshape(group_MK.shape), sizes_G)


def window(pairs: Pairs, first: Array, rows: int) -> tuple[Rows, Array]:
    """The pairs of rank first .. first + rows - 1 as a buffer, and how many rows of it each group has."""
    end_G = jnp.cumsum(pairs.sizes_G)
    rank_R = first + jnp.arange(rows, dtype=jnp.int32)
    place_MK = pairs.rank_MK - first
    inside_MK = (place_MK >= 0) & (place_MK < rows) & (pairs.rank_MK < end_G[-1])
    in_window = lambda rank_G: jnp.clip(rank_G - first, 0, rows)  # noqa: E731
    sizes_G = in_window(end_G) - in_window(end_G - pairs.sizes_G)
    return Rows(_pair_at(pairs, rank_R, rank_R < end_G[-1]), jnp.where(inside_MK, place_MK, rows)), sizes_G


def blocks(pairs: Pairs, group_MK: Array, first: Array, capacity: int) -> tuple[Rows, Array]:
    """`capacity` rows a group: its pairs from the `first`-th on; and how many rows of its block each group fills.

    Args:
      group_MK: what `pairs` was sorted by.
    """
    groups = pairs.sizes_G.shape[0]
    start_G = jnp.cumsum(pairs.sizes_G) - pairs.sizes_G
    slot = first + jnp.arange(capacity, dtype=jnp.int32)
    full_GC = slot[None, :] < pairs.sizes_G[:, None]
    rank_GC = start_G[:, None] + slot[None, :]
    slot_MK = pairs.rank_MK - start_G[jnp.maximum(group_MK, 0)] - first
    inside_MK = (group_MK >= 0) & (slot_MK >= 0) & (slot_MK < capacity)
    place_MK = jnp.where(inside_MK, group_MK * capacity + slot_MK, groups * capacity)
    sizes_G = jnp.clip(pairs.sizes_G - first, 0, capacity)
    return Rows(_pair_at(pairs, rank_GC.reshape(-1), full_GC.reshape(-1)), place_MK), sizes_G


def _pair_at(pairs: Pairs, rank_R: Array, full_R: Array) -> Array:
    none = pairs.order.shape[0]
    return jnp.where(full_R, pairs.order.at[rank_R].get(mode="fill", fill_value=none), none)


def _take(x: Array, index: Array) -> Array:
    """x[index], zeros where the index is past the end."""
    return x.at[index].get(mode="fill", fill_value=0)


def _over_choices(rows_RD: Array, place_MK: Array, weights_MK: Array | None) -> Array:
    """float32 [M, D]: sum over a token's rows, in the order of its choices; nothing of size [M, K, D]."""
    total = jnp.zeros((place_MK.shape[0], rows_RD.shape[1]), jnp.float32)
    for k in range(place_MK.shape[1]):
        part_MD = _take(rows_RD, place_MK[:, k]).astype(jnp.float32)
        total = total + (part_MD if weights_MK is None else part_MD * weights_MK[:, k, None])
    return total


@jax.custom_vjp
def spread(x_MD: Array, rows: Rows) -> Array:
    """[M, D] -> [R, D]: each row gets its pair's token, empty rows zeros. Its gradient is summed in float32."""
    return _take(x_MD, rows.pair_R // rows.place_MK.shape[1])


def _spread_forward(x_MD: Array, rows: Rows) -> tuple[Array, Rows]:
    return spread(x_MD, rows), rows


def _spread_backward(rows: Rows, g_RD: Array) -> tuple[Array, None]:
    return _over_choices(g_RD, rows.place_MK, None).astype(g_RD.dtype), None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def add_up(rows_RD: Array, weights_MK: Array, rows: Rows) -> Array:
    """[R, D] -> float32 [M, D]: each token's weighted sum of its rows; pairs outside the buffer add nothing."""
    return _over_choices(rows_RD, rows.place_MK, weights_MK)


def _add_up_forward(rows_RD: Array, weights_MK: Array, rows: Rows) -> tuple[Array, tuple[Array, Array, Rows]]:
    return add_up(rows_RD, weights_MK, rows), (rows_RD, weights_MK, rows)


def _add_up_backward(saved: tuple[Array, Array, Rows], g_MD: Array) -> tuple[Array, Array, None]:
    rows_RD, weights_MK, rows = saved
    g_RD = _take(g_MD, rows.pair_R // rows.place_MK.shape[1])
    weight_R = _take(weights_MK.reshape(-1), rows.pair_R)
    dot_R = jnp.sum(rows_RD.astype(jnp.float32) * g_RD, axis=-1)
    return (g_RD * weight_R[:, None]).astype(rows_RD.dtype), _take(dot_R, rows.place_MK), None


add_up.defvjp(_add_up_forward, _add_up_backward)
