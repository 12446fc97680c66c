"""What is done to logits before a token is chosen: penalties, biases, a least length, and masks of allowed ids.

A batch without such a row skips all of it; in a batch with one, a row that asks for nothing keeps the bits of its
logits.
Log-probabilities that are returned are those before any of this.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dsv3_jax.inference.options import MAX_BIASES, Sampling

Array = jax.Array

WORD = 32
"""Ids of one element of a mask: bit i % 32 of element i // 32 stands for id i."""


@struct.dataclass
class Adjustments:
    """Changes of logits, one row each.

    What rows have produced is apart, int32 `count_BV`: how often each id. Of rows without penalties it is not read.

    Attributes:
      prompt_BW: uint32 mask of the ids in the row's prompt; only the repetition penalty reads it.
      presence_B, frequency_B: float32, taken from the logits of produced ids once, and once for each time.
      repetition_B: float32, divides positive logits of prompt and produced ids, multiplies negative ones.
      bias_ids_BK, bias_BK: int32 ids (-1: unused) and what is added to their logits, float32.
      least_position_B: int32, positions before this do not end the row (`Sampling.min_tokens`).
      mask_BW: uint32 mask of the ids that may be chosen, all ones where nothing is forbidden.
    """

    prompt_BW: Array
    presence_B: Array
    frequency_B: Array
    repetition_B: Array
    bias_ids_BK: Array
    bias_BK: Array
    least_position_B: Array
    mask_BW: Array


def needs_counts(sampling: Sampling) -> bool:
    """Whether what a row produces must be counted."""
    plain = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
    return plain != (0, 0, 1)


def needs_adjusting(sampling: Sampling, guided: bool = False) -> bool:
    """Whether anything is done to a row's logits.

    Args:
      guided: whether a guide restricts its ids.
    """
    return guided or needs_counts(sampling) or bool(sampling.logit_bias) or sampling.min_tokens > 0


def make_adjustments(
    rows: Sequence[tuple[Sampling, np.ndarray] | None],
    vocab_size: int,
    masks: Sequence[np.ndarray | None] | None = None,
) -> Adjustments:
    """The options of rows as arrays (numpy).

    Args:
      rows: sampling options and prompt ids of each row; None for an empty one.
      masks: what each row's guide allows now (`guides.Guide.mask`); None allows all.
    """
    B, W = len(rows), mask_words(vocab_size)
    found = Adjustments(
        prompt_BW=np.zeros((B, W), np.uint32),
        presence_B=np.zeros(B, np.float32),
        frequency_B=np.zeros(B, np.float32),
        repetition_B=np.ones(B, np.float32),
        bias_ids_BK=np.full((B, MAX_BIASES), -1, np.int32),
        bias_BK=np.zeros((B, MAX_BIASES), np.float32),
        least_position_B=np.zeros(B, np.int32),
        mask_BW=np.full((B, W), 0xFFFFFFFF, np.uint32),
    )
    for b, row in enumerate(rows):
        if row is None:
            continue
        sampling, ids = row
        found.presence_B[b], found.frequency_B[b] = sampling.presence_penalty, sampling.frequency_penalty
        found.repetition_B[b] = sampling.repetition_penalty
        if sampling.repetition_penalty != 1:
            found.prompt_BW[b] = pack_ids(ids, vocab_size)
        for k, (index, bias) in enumerate(sampling.logit_bias):
            found.bias_ids_BK[b, k], found.bias_BK[b, k] = index, bias
        found.least_position_B[b] = len(ids) + sampling.min_tokens
        if masks is not None and masks[b] is not None:
            found.mask_BW[b] = masks[b]
    return found


def mask_words(vocab_size: int) -> int:
    """Elements of a mask over the vocabulary."""
    return -(-vocab_size // WORD)


def pack_ids(ids: np.ndarray | Sequence[int], vocab_size: int) -> np.ndarray:
    """uint32 [W]: the mask with the bits of `ids` set."""
    bits = np.zeros(mask_words(vocab_size) * WORD, np.uint8)
    bits[np.asarray(ids, np.int64)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def unpack(mask_BW: Array, vocab_size: int) -> Array:
    """bool [B, V] of masks uint32 [B, W]."""
    bits_BWb = (mask_BW[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32)[None, None]) & 1
    return bits_BWb.reshape(mask_BW.shape[0], -1)[:, :vocab_size].astype(bool)


def begin_count(count_BV: Array, row: Array, token: Array) -> Array:
    """A request begins on a row (`count_BV` is donated), with a token that it has produced, or -1."""
    new_V = jnp.zeros(count_BV.shape[1], count_BV.dtype)
    place = jnp.where(token < 0, count_BV.shape[1], token)
    return count_BV.at[row].set(new_V.at[place].add(1, mode="drop"))


def counted(count_BV: Array, token_B: Array) -> Array:
    """With the tokens that rows have now produced; negative for a row that gave none."""
    B, V = count_BV.shape
    places_B = jnp.where(token_B < 0, V, token_B)
    return count_BV.at[jnp.arange(B), places_B].add(1, mode="drop")


def adjust(
    logits_BV: Array, adjustments: Adjustments, count_BV: Array, positions_B: Array, ending_ids_BS: Array
) -> Array:
    """float32 [B, V]: the logits that the tokens at `positions_B` are chosen by.

    In this order: the repetition penalty as transformers defines it (over prompt and produced ids); OpenAI's
    `logit - count * frequency - (count > 0) * presence` over produced ids; biases; then -inf for ids outside the mask,
    and before the least length for ids that would end the row, unless the mask leaves no other.

    Args:
      count_BV: how often each row has produced each id.
      ending_ids_BS: ids that end each row; -1 unused.
    """
    B, V = logits_BV.shape
    rows_B1 = jnp.arange(B)[:, None]
    a = adjustments
    produced_BV = count_BV > 0

    repetition_B1 = a.repetition_B[:, None]
    repeated_BV = (produced_BV | unpack(a.prompt_BW, V)) & (repetition_B1 != 1)
    changed_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where(repeated_BV, changed_BV, logits_BV)

    frequency_B1, presence_B1 = a.frequency_B[:, None], a.presence_B[:, None]
    penalised_BV = produced_BV & ((frequency_B1 != 0) | (presence_B1 != 0))
    less_BV = count_BV.astype(jnp.float32) * frequency_B1 + presence_B1
    logits_BV = jnp.where(penalised_BV, logits_BV - less_BV, logits_BV)

    places_BK = jnp.where(a.bias_ids_BK < 0, V, a.bias_ids_BK)
    logits_BV = logits_BV.at[rows_B1, places_BK].add(a.bias_BK, mode="drop")
    # A penalty must not turn the largest float into infinity, which -inf below would make NaN.
    most = jnp.finfo(jnp.float32).max
    logits_BV = jnp.clip(logits_BV, -most, most)

    allowed_BV = unpack(a.mask_BW, V)
    ends_BV = jnp.zeros((B, V), bool)
    ends_BV = ends_BV.at[rows_B1, jnp.where(ending_ids_BS < 0, V, ending_ids_BS)].set(True, mode="drop")
    later_BV = allowed_BV & ~(ends_BV & (positions_B < a.least_position_B)[:, None])
    allowed_BV = jnp.where(jnp.any(later_BV, axis=-1, keepdims=True), later_BV, allowed_BV)
    return jnp.where(allowed_BV, logits_BV, -jnp.inf)
