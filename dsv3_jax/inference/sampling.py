"""The next token of every row from its logits, and log-probabilities.

Options are arrays, one value a row: other options are another input, never another program. A row's token
depends on its own logits, options and key alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dsv3_jax.inference.adjustments import Adjustments, adjust
from dsv3_jax.inference.options import MAX_STOP_IDS, Sampling

Array = jax.Array


@struct.dataclass
class RowOptions:
    """Sampling options, one value a row.

    Attributes:
      key_B2: uint32 key of the row (`options.row_key`).
      temperature_B: float32; 0 is greedy.
      top_k_B: int32; 0 keeps all.
      top_p_B: float32; 1 keeps all.
      min_p_B: float32; 0 keeps all.
      stop_at_eos_B: bool; False goes on after an end-of-sequence id.
      stop_ids_BS: int32, ids that end the row whether or not those do; -1 unused.
    """

    key_B2: Array
    temperature_B: Array
    top_k_B: Array
    top_p_B: Array
    min_p_B: Array
    stop_at_eos_B: Array
    stop_ids_BS: Array


def row_options(samplings: Sequence[Sampling], keys: Sequence[np.ndarray]) -> RowOptions:
    """The options of rows as arrays (numpy); `keys` are `options.row_key` of each."""
    stop_ids_BS = np.full((len(samplings), MAX_STOP_IDS), -1, np.int32)
    for b, sampling in enumerate(samplings):
        stop_ids_BS[b, : len(sampling.stop_token_ids)] = sampling.stop_token_ids
    return RowOptions(
        key_B2=np.stack(keys),
        temperature_B=np.asarray([s.temperature for s in samplings], np.float32),
        top_k_B=np.asarray([s.top_k for s in samplings], np.int32),
        top_p_B=np.asarray([s.top_p for s in samplings], np.float32),
        min_p_B=np.asarray([s.min_p for s in samplings], np.float32),
        stop_at_eos_B=np.asarray([not s.ignore_eos for s in samplings], bool),
        stop_ids_BS=stop_ids_BS,
    )


def ending_ids(options: RowOptions, eos_ids: Array) -> Array:
    """int32 [B, S]: the ids that end each row, -1 where unused."""
    eos_BS = jnp.where(options.stop_at_eos_B[:, None], eos_ids[None, :], -1)
    return jnp.concatenate([jnp.maximum(eos_BS, -1), options.stop_ids_BS], axis=1)


def ends_row(token_B: Array, options: RowOptions, eos_ids: Array) -> Array:
    """bool [B]: whether a token ends its row."""
    return jnp.any(token_B[:, None] == ending_ids(options, eos_ids), axis=-1)


@struct.dataclass
class Choosing:
    """How every row chooses its next token.

    Attributes:
      adjusting: bool, whether any row has something done to its logits.
    """

    options: RowOptions
    changes: Adjustments
    adjusting: Array


def choose(
    logits_BV: Array,
    choosing: Choosing,
    count_BV: Array,
    positions_B: Array,
    vocab_limit: int,
    eos_ids: Array,
) -> Array:
    """int32 [B]: the token for `positions_B`, from the logits after what is to be done to them (`adjust`, `sample`).

    Args:
      count_BV: how often each row has produced each id.
      eos_ids: ids that end a row.
    """
    options = choosing.options
    logits_BV = jax.lax.cond(
        choosing.adjusting,
        lambda: adjust(logits_BV, choosing.changes, count_BV, positions_B, ending_ids(options, eos_ids)),
        lambda: logits_BV,
    )
    return sample(logits_BV, options, positions_B, vocab_limit)


def sample(
    logits_BV: Array,
    options: RowOptions,
    positions_B: Array,
    vocab_limit: int,
) -> Array:
    """int32 [B]: the token for `positions_B`, from float32 logits.

    Greedy rows take the largest logit, the lowest id among equals. The others draw from
    softmax(logits / temperature) limited to the `top_k` largest, then to the smallest set of the largest whose
    probability reaches `top_p`, then to tokens with at least `min_p` times the largest probability.
    Ids from `vocab_limit` on are never chosen.
    """
    V = logits_BV.shape[1]
    if vocab_limit < V:
        logits_BV = jnp.where(jnp.arange(V)[None, :] < vocab_limit, logits_BV, -jnp.inf)
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    is_greedy_B = options.temperature_B == 0

    def draw() -> Array:
        temperature_B = jnp.where(is_greedy_B, 1.0, options.temperature_B)
        # The maximum is taken off first, so that no temperature makes a logit infinite.
        scaled_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature_B[:, None]
        noise_BV = jax.vmap(lambda key, at: _gumbel(key, at, V))(options.key_B2, positions_B)
        limited_B = (options.top_k_B > 0) | (options.top_p_B < 1) | (options.min_p_B > 0)
        return jax.lax.cond(
            jnp.any(limited_B & ~is_greedy_B),
            lambda: _draw_limited(scaled_BV, noise_BV, options),
            lambda: jnp.argmax(scaled_BV + noise_BV, axis=-1).astype(jnp.int32),
        )

    drawn_B = jax.lax.cond(jnp.all(is_greedy_B), lambda: greedy_B, draw)
    return jnp.where(is_greedy_B, greedy_B, drawn_B)


def _gumbel(key_2: Array, position: Array, size: int) -> Array:
    key = jax.random.wrap_key_data(key_2, impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(key, position), (size,), jnp.float32)


def _draw_limited(scaled_BV: Array, noise_BV: Array, options: RowOptions) -> Array:
    B, V = scaled_BV.shape
    ids_BV = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32)[None, :], (B, V))
    # Stable and descending: equal logits stay in the order of their ids.
    minus_BV, ids_BV, noise_BV = jax.lax.sort(
        (-scaled_BV, ids_BV, noise_BV), dimension=1, num_keys=1, is_stable=True
    )
    sorted_BV = -minus_BV
    top_k_B = jnp.where(options.top_k_B > 0, options.top_k_B, V)
    kept_BV = jnp.arange(V)[None, :] < top_k_B[:, None]
    weights_BV = jnp.where(kept_BV, jnp.exp(sorted_BV), 0.0)  # the largest is exp(0) = 1
    total_B = jnp.sum(weights_BV, axis=-1)
    before_BV = jnp.cumsum(weights_BV, axis=-1) - weights_BV
    within_BV = (before_BV < (options.top_p_B * total_B)[:, None]) | (options.top_p_B >= 1)[:, None]
    # The first is within any top_p; saying so keeps one candidate whatever cumsum rounds to.
    kept_BV &= within_BV | (jnp.arange(V) == 0)[None, :]
    kept_BV &= weights_BV >= options.min_p_B[:, None]
    place_B1 = jnp.argmax(jnp.where(kept_BV, sorted_BV + noise_BV, -jnp.inf), axis=-1)[:, None]
    return jnp.take_along_axis(ids_BV, place_B1, axis=1)[:, 0]


@struct.dataclass
class TokenLogprobs:
    """Natural logarithms of the probabilities of tokens [...] and of the K likeliest ids [..., K]."""

    chosen: Array
    top_ids: Array
    top: Array


def token_logprobs(logits: Array, tokens: Array, top: int) -> TokenLogprobs:
    """Log-probabilities of `tokens` [...] under float32 logits [..., V], and those of the `top` likeliest ids.

    Over the whole vocabulary and before temperature or masks; equals are in the order of their ids.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[..., None], axis=-1) - log_z
    if top == 0:
        none = (*tokens.shape, 0)
        return TokenLogprobs(chosen[..., 0], jnp.zeros(none, jnp.int32), jnp.zeros(none, jnp.float32))
    values, ids = jax.lax.top_k(logits, top)
    return TokenLogprobs(chosen[..., 0], ids.astype(jnp.int32), values - log_z)
