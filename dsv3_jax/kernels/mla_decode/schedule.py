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


def most_pieces(batch: int, slots: int, *, pieces: int, least: int, most: int, limit: int) -> int:
    """The largest number of pieces that `schedule` can make of `batch` rows of up to `slots` slots."""
    blocks = -(-slots // BLOCK)
    return batch * max(1, min(-(-blocks // least), max(pieces, min(limit, -(-blocks // most)))))


def schedule(
    last_B: jax.Array, slots: int, *, workers: int, pieces: int, least: int, most: int, limit: int
) -> Schedule:
    """Cut rows whose last live slots are `last_B` (-1: none).

    Args:
      slots: the most a row can have.
      workers: how many share the pieces.
      pieces: how many pieces a row is cut into, as far as `least` and `most` allow.
      least, most: blocks of a piece (the last piece of a row may be shorter).
      limit: no row is cut into more than the larger of `limit` and `pieces`, whatever `most` is.
    """
    B = len(last_B)
    length = most_pieces(B, slots, pieces=pieces, least=least, most=most, limit=limit)
    blocks_B = (last_B.astype(jnp.int32) + BLOCK) // BLOCK
    size_B = jnp.clip(-(-blocks_B // pieces), least, most)
    size_B = jnp.maximum(size_B, -(-blocks_B // max(limit, pieces)))
    pieces_B = -(-blocks_B // size_B)

    # Sums and searches by comparing all with all: a few fused kernels, where a scan or a binary search is many.
    b, i, w = (jnp.arange(n, dtype=jnp.int32) for n in (B, length, workers + 1))
    up_to_BB = b[:, None] <= b[None, :]
    ends_B = jnp.sum(jnp.where(up_to_BB, pieces_B[:, None], 0), axis=0)
    cost_B = blocks_B + START_COST * pieces_B
    costs_B = jnp.sum(jnp.where(up_to_BB, cost_B[:, None], 0), axis=0)
    piece_B = ends_B - pieces_B

    row_i = jnp.minimum(jnp.sum((ends_B[:, None] <= i[None, :]).astype(jnp.int32), axis=0), B - 1)
    first_i = (i - piece_B[row_i]) * size_B[row_i]
    real_i = i < ends_B[-1]
    blocks_i = jnp.where(real_i, jnp.minimum(size_B[row_i], blocks_B[row_i] - first_i), 0)

    # Worker w begins with the first piece before which at least w shares are spent.
    before_i = (costs_B - cost_B)[row_i] + first_i + START_COST * (i - piece_B[row_i])
    total = costs_B[-1]
    share_w = total // workers * w + total % workers * w // workers
    begin_w = jnp.sum(((before_i[None, :] < share_w[:, None]) & real_i[None, :]).astype(jnp.int32), axis=1)
    return Schedule(row_i, first_i, blocks_i, begin_w, piece_B, pieces_B)
