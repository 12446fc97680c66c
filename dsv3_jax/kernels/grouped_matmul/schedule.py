"""From group sizes to row tiles, on the device: which expert, which rows, for every tile of a persistent grid."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Lines of `Schedule.tiles`.
EXPERT, ROW, ROWS = 0, 1, 2


class Schedule(NamedTuple):
    """The tiles in order of their rows.

    Attributes:
      tiles: int32 [3, most tiles]: the expert (E: rows after the last group), the first row, the number of
        rows that are the group's.
      live: int32 [1], how many of them there are.
    """

    tiles: jax.Array
    live: jax.Array


def most_tiles(N: int, E: int, tile: int) -> int:
    """No group sizes give more tiles: every group, and the rows after the last one, end in one partial tile."""
    return min(N, N // tile + E + 1)


def schedule(group_sizes_E: jax.Array, N: int, tile: int) -> Schedule:
    """Tiles of up to `tile` rows that begin where their group begins, so no tile holds rows of two groups.

    Depends on the sizes and `tile` alone: XLA computes it once for the products of one layer.
    """
    E = group_sizes_E.shape[0]
    sizes = jnp.append(group_sizes_E, N - jnp.sum(group_sizes_E)).astype(jnp.int32)
    counts = (sizes + tile - 1) // tile
    ends, tile_ends = jnp.cumsum(sizes), jnp.cumsum(counts)
    t = jnp.arange(most_tiles(N, E, tile), dtype=jnp.int32)
    expert = jnp.minimum(jnp.sum(t[:, None] >= tile_ends[None, :], axis=1, dtype=jnp.int32), E)
    row = ends[expert] - sizes[expert] + (t - (tile_ends - counts)[expert]) * tile
    rows = jnp.clip(ends[expert] - row, 0, tile)
    return Schedule(jnp.stack([expert, row, rows]).astype(jnp.int32), tile_ends[E:].astype(jnp.int32))
