"""Who reads what in the GPU kernel: rows cut into pieces of context, pieces handed to workers.

A row's pieces follow from its own length alone, so its result does not depend on the rows beside it; only which
worker computes a piece, and when, does.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Slots that the kernel reads at a time.
BLOCK = 64
# What starting a piece costs beside its blocks, in blocks: queries to load, a part of the result to write.
START_COST = 2


class Schedule(NamedTuple):
    """The pieces (i) of all rows in order, the share of each worker (w), and where each row's pieces are.

    Attributes:
      row_i, first_i, blocks_i: the row a piece belongs to, its first block and number of blocks.
      begin_w: worker w has the pieces begin_w[w] ... begin_w[w + 1] - 1; one entry more than workers.
      piece_B, pieces_B: a row's first piece and number of pieces (none if it has no live slot).
    """

    row_i: jax.Array
    first_i: jax.Array
    blocks_i: jax.Array
    begin_w: jax.Array
    piece_B: jax.Array
    pieces_B: jax.Array


def most_pieces(batch: int, slots: int, *, pieces: int, least: int, most: int) -> int:
    """The largest number of pieces that `schedule` can make of `batch` rows of up to `slots` slots."""
    blocks = -(-slots // BLOCK)
    a_row = min(-(-blocks // least), max(pieces, -(-blocks // most)))
    return batch * max(1, a_row)


def schedule(last_B: jax.Array, slots: int, *, workers: int, pieces: int, least: int, most: int) -> Schedule:
    """Cut rows whose last live slots are `last_B` (-1: none).

    Args:
      slots: the most a row can have.
      workers: how many share the pieces.
      pieces: how many pieces a row is cut into, as far as the next two allow.
      least, most: blocks of a piece (the last piece of a row may be shorter).
    """
    length = most_pieces(len(last_B), slots, pieces=pieces, least=least, most=most)
    blocks_B = (last_B + BLOCK) // BLOCK
    size_B = jnp.clip(-(-blocks_B // pieces), least, most)
    pieces_B = -(-blocks_B // size_B)
    ends_B = jnp.cumsum(pieces_B)
    piece_B = ends_B - pieces_B

    i = jnp.arange(length, dtype=jnp.int32)
    # By comparing all with all: one fused kernel, where a binary search is a loop of many small ones.
    row_i = jnp.searchsorted(ends_B, i, side="right", method="compare_all").astype(jnp.int32)
    real_i = row_i < len(last_B)
    row_i = jnp.minimum(row_i, len(last_B) - 1)
    first_i = (i - piece_B[row_i]) * size_B[row_i]
    blocks_i = jnp.where(real_i, jnp.minimum(size_B[row_i], blocks_B[row_i] - first_i), 0)

    # Worker w begins with the first piece whose predecessors cost at least w shares.
    cost_i = jnp.cumsum(jnp.where(real_i, blocks_i + START_COST, 0))
    before_i, total = jnp.concatenate([jnp.zeros(1, cost_i.dtype), cost_i[:-1]]), cost_i[-1]
    w = jnp.arange(workers + 1, dtype=jnp.int32)
    share_w = total // workers * w + total % workers * w // workers
    begin_w = jnp.minimum(jnp.searchsorted(before_i, share_w, method="compare_all"), ends_B[-1])
    return Schedule(*(a.astype(jnp.int32) for a in (row_i, first_i, blocks_i, begin_w, piece_B, pieces_B)))
