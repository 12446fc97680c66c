"""The device programs of decoding: prefill, scoring of prompts, and a loop of several tokens.

All are pure functions with donated state. A program's shapes are fixed by the batch size and a bucket, and on
one device a row's result does not depend on what the other rows hold.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import struct

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.sampling import RowOptions, TokenLogprobs, ends_row, sample, token_logprobs
from dsv3_jax.inference.weights import Weights, kinds
from dsv3_jax.model import Cache, Transformer, make_cache
from dsv3_jax.model.attention import Context
from dsv3_jax.model.block import Block
from dsv3_jax.model.module import rows
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.model.rope import rope_tables

Array = jax.Array
Variables = dict[str, Any]

LIVE, STOP, LENGTH, ERROR = 0, 1, 2, 3
NO_TOKEN = -1

SCORE_FLOATS = 1 << 24
"""Logits that scoring holds at once, about."""

MOST_STEPS = 16
"""Tokens a row can get in one call of the engine."""


@struct.dataclass
class State:
    """What a batch carries from one call to the next.

    Attributes:
      cache: latent cache of all rows.
      token_B: the last token of each row, not yet in the cache.
      position_B: its position.
      left_B: tokens the row may still produce.
      reason_B: LIVE, or why the row ended.
    """

    cache: Cache
    token_B: Array
    position_B: Array
    left_B: Array
    reason_B: Array


@struct.dataclass
class Produced:
    """Tokens of one call, in order: [steps, B], NO_TOKEN where a row gave none; and their log-probabilities."""

    token_TB: Array
    logprobs: TokenLogprobs | None


def embed(cfg: ModelConfig, top: Variables, tokens_BT: Array) -> Array:
    """Tokens [B, T] -> [B, T, D] in the compute type."""
    return rows(top["params"]["embed_VD"], tokens_BT, jnp.dtype(cfg.dtype))


def prompt_layer(
    cfg: ModelConfig,
    kind: str,
    x_BTD: Array,
    cache: Cache | None,
    variables: Variables,
    lengths_B: Array,
    layer: Array,
    rows_B: Array,
) -> tuple[Array, Cache | None]:
    """One layer over prompts in the expanded form; its latents go into rows of the batch's cache.

    One program serves all layers of a kind, so that compile time does not grow with depth.

    Args:
      kind: "dense" or "moe".
      x_BTD: prompts, padded on the right (donated).
      cache: of the whole batch, its slots at least T (donated); None for prompts that are only scored.
      lengths_B: tokens of each prompt; 0 for a row that is only padding.
      rows_B: where each prompt goes; beyond the batch for padding.
    """
    B, T, _ = x_BTD.shape
    order_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None, :], (B, T))
    ctx = _context(cfg, jnp.where(order_BT < lengths_B[:, None], order_BT, -1))
    block = Block(cfg, kind, "expanded")
    if cache is None:
        (x_BTD, _), _ = block.apply(variables, (x_BTD, None), jnp.int32(0), ctx)
        return x_BTD, None
    part = make_cache(cfg, B, T, layers=1, dtype=cache.latent_LBSJ.dtype.name)
    (x_BTD, filled), _ = block.apply(variables, (x_BTD, part), jnp.int32(0), ctx)
    cache = jax.tree.map(
        lambda whole, new: whole.at[layer, rows_B, :T].set(new[0], mode="drop"), cache, filled
    )
    return x_BTD, cache


def prompt_end(
    cfg: ModelConfig, hidden_BD: Array, top: Variables, x_BTD: Array, lengths_B: Array, rows_B: Array
) -> tuple[Array, Array]:
    """The final norm: hidden states [B, T, D] of these prompts, and the last ones put into `hidden_BD` (donated)."""
    hidden_BTD = _final_norm(cfg, top, x_BTD)
    last_B11 = jnp.maximum(lengths_B - 1, 0)[:, None, None]
    last_BD = jnp.take_along_axis(hidden_BTD, last_B11, axis=1)[:, 0]
    return hidden_BD.at[rows_B].set(last_BD, mode="drop"), hidden_BTD


def _context(cfg: ModelConfig, positions_BT: Array) -> Context:
    return Context(rope_tables(cfg, positions_BT), positions_BT, None, positions_BT >= 0)


def _final_norm(cfg: ModelConfig, top: Variables, x_BTD: Array) -> Array:
    return rms_norm(x_BTD, top["params"]["final_norm_D"], cfg.rms_norm_eps)


def _forward(
    cfg: ModelConfig, weights: Weights, tokens_BT: Array, positions_BT: Array, cache: Cache
) -> tuple[Array, Cache]:
    """`Transformer` in the absorbed form over unstacked weights: hidden states [B, T, D] and the cache."""
    carry: tuple[Array, Cache] = (embed(cfg, weights.top, tokens_BT), cache)
    ctx = _context(cfg, positions_BT)
    for layer, (kind, variables) in enumerate(zip(kinds(cfg), weights.layers, strict=True)):
        carry, _ = Block(cfg, kind, "absorbed").apply(variables, carry, jnp.int32(layer), ctx)
    return _final_norm(cfg, weights.top, carry[0]), carry[1]


def score(
    cfg: ModelConfig, count: int, floats: int, top: Variables, hidden_BTD: Array, targets_BT: Array
) -> tuple[TokenLogprobs, Array]:
    """Log-probabilities of `targets_BT` [B, T] under the hidden states, a chunk of tokens at a time.

    Also returns bool [B, T]: whether all logits of the position are finite.

    Args:
      count: how many of the likeliest ids are wanted.
      floats: logits held at once, about.
    """
    B, T, _ = hidden_BTD.shape
    chunk = min(T, max(1, floats // (B * cfg.vocab_size)))
    chunks = -(-T // chunk)
    hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, chunks * chunk - T), (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, 0), (0, chunks * chunk - T)))

    def one(i: Array) -> tuple[TokenLogprobs, Array]:
        hidden_BtD = jax.lax.dynamic_slice_in_dim(hidden_BTD, i * chunk, chunk, axis=1)
        targets_Bt = jax.lax.dynamic_slice_in_dim(targets_BT, i * chunk, chunk, axis=1)
        logits_BtV = _logits(cfg, top, hidden_BtD)
        return token_logprobs(logits_BtV, targets_Bt, count), jnp.all(jnp.isfinite(logits_BtV), axis=-1)

    found = jax.lax.map(one, jnp.arange(chunks))
    return jax.tree.map(lambda x: einops.rearrange(x, "n b t ... -> b (n t) ...")[:, :T], found)


def _logits(cfg: ModelConfig, top: Variables, hidden: Array) -> Array:
    logits = Transformer(cfg).apply(top, hidden, method="logits")
    # What is asked of the logits later (log-probabilities or not) must not change how they are computed.
    return jax.lax.optimization_barrier(logits)


def _advance(
    cfg: ModelConfig,
    vocab_limit: int,
    count: int | None,
    top: Variables,
    state: State,
    hidden_BD: Array,
    options: RowOptions,
    eos_ids: Array,
) -> tuple[State, Produced]:
    """Choose the next token of every live row from the hidden state of its last one."""
    logits_BV = _logits(cfg, top, hidden_BD[:, None])[:, 0]
    position_B = state.position_B + 1
    token_B = sample(logits_BV, options, position_B, vocab_limit)
    live_B = state.reason_B == LIVE
    finite_B = jnp.all(jnp.isfinite(logits_BV), axis=-1)
    ends_B = ends_row(token_B, options, eos_ids)
    gives_B = live_B & finite_B & ~ends_B
    left_B = state.left_B - gives_B.astype(jnp.int32)
    reason_B = jnp.where(live_B & ends_B, STOP, state.reason_B)
    reason_B = jnp.where(gives_B & (left_B <= 0), LENGTH, reason_B)
    reason_B = jnp.where(live_B & ~finite_B, ERROR, reason_B)
    given_B = jnp.where(gives_B, token_B, NO_TOKEN)
    logprobs = None if count is None else token_logprobs(logits_BV, given_B, count)
    new = State(
        cache=state.cache,
        token_B=jnp.where(gives_B, token_B, state.token_B),
        position_B=jnp.where(gives_B, position_B, state.position_B),
        left_B=left_B,
        reason_B=reason_B,
    )
    return new, Produced(given_B, logprobs)


def first(
    cfg: ModelConfig,
    vocab_limit: int,
    count: int | None,
    state: State,
    top: Variables,
    hidden_BD: Array,
    options: RowOptions,
    eos_ids: Array,
) -> tuple[State, Produced]:
    """The first new token of every row, from the last hidden states of the prompts; one step."""
    state, produced = _advance(cfg, vocab_limit, count, top, state, hidden_BD, options, eos_ids)
    return state, jax.tree.map(lambda x: x[None], produced)


def decode(
    cfg: ModelConfig,
    vocab_limit: int,
    count: int | None,
    steps: int,
    state: State,
    weights: Weights,
    options: RowOptions,
    eos_ids: Array,
    stopped_B: Array,
    limit: Array,
) -> tuple[State, Produced]:
    """Up to `limit` (at most `steps`) tokens for every live row; ends early when no row is left.

    Args:
      state: donated.
      stopped_B: bool, rows that the caller ended since the last call.
    """
    stopped_B &= state.reason_B == LIVE
    state = dataclasses.replace(state, reason_B=jnp.where(stopped_B, STOP, state.reason_B))
    B = stopped_B.shape[0]

    def step(carry: tuple[Array, State, Produced]) -> tuple[Array, State, Produced]:
        i, state, produced = carry
        live_B = state.reason_B == LIVE
        # Rows that ended all read the same token, so that they touch the same few experts.
        tokens_B1 = jnp.where(live_B, state.token_B, 0)[:, None]
        positions_B1 = jnp.where(live_B, state.position_B, -1)[:, None]
        hidden_BTD, cache = _forward(cfg, weights, tokens_B1, positions_B1, state.cache)
        state = dataclasses.replace(state, cache=cache)
        state, new = _advance(cfg, vocab_limit, count, weights.top, state, hidden_BTD[:, 0], options, eos_ids)
        produced = jax.tree.map(lambda all_, one: all_.at[i].set(one), produced, new)
        return i + 1, state, produced

    def go_on(carry: tuple[Array, State, Produced]) -> Array:
        i, state, _ = carry
        return (i < limit) & jnp.any(state.reason_B == LIVE)

    logprobs = None
    if count is not None:
        wide = (steps, B, count)
        logprobs = TokenLogprobs(jnp.zeros((steps, B)), jnp.zeros(wide, jnp.int32), jnp.zeros(wide))
    empty = Produced(jnp.full((steps, B), NO_TOKEN, jnp.int32), logprobs)
    _, state, produced = jax.lax.while_loop(go_on, step, (jnp.zeros((), jnp.int32), state, empty))
    return state, produced
