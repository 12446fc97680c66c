"""The device programs of the engine: tiles of prompts, the first new token, scoring, and a loop of several tokens.

All are pure functions with donated state. Their shapes are fixed by the engine's options, and on one device what
becomes of a token does not depend on what the other rows and tiles hold.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import struct

from dsv3_jax.config import AUTO_KERNELS, Kernels, ModelConfig
from dsv3_jax.inference.adjustments import counted
from dsv3_jax.inference.ahead import look_ahead
from dsv3_jax.inference.sampling import Choosing, TokenLogprobs, choose, ends_row, token_logprobs
from dsv3_jax.inference.weights import Weights, kinds
from dsv3_jax.kernels.mla_decode import CodedPages
from dsv3_jax.model import PagedCache, Transformer
from dsv3_jax.model.attention import Context
from dsv3_jax.model.block import Block
from dsv3_jax.model.module import rows
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.model.rope import rope_tables
from dsv3_jax.parallel.dispatch import Dispatch

Array = jax.Array
Variables = dict[str, Any]

LIVE, STOP, LENGTH, ERROR = 0, 1, 2, 3
NO_TOKEN = -1

SCORE_FLOATS = 1 << 24
"""Logits that scoring holds at once, about."""


@struct.dataclass
class Memory:
    """What stays on the device between calls, donated to each.

    Attributes:
      latent_NPJ, index_NPZ: the pages of all layers (`PagedCache`).
      counts_LE: int32 tokens sent to each expert of each expert layer, modulo 2**32; None without experts.
      count_BV: int32, how often each row has produced each id; read for rows with penalties.
      hidden_BD: the main model's last hidden state of each row; None without a multi-token module (`ahead`).
    """

    latent_NPJ: Array | CodedPages
    index_NPZ: Array | CodedPages | None
    counts_LE: Array | None
    count_BV: Array
    hidden_BD: Array | None = None


@struct.dataclass
class State:
    """Where every row of the decode step is.

    Attributes:
      token_B: the last token of each row that is not yet in the pages.
      position_B: its position.
      left_B: tokens the row may still produce.
      reason_B: LIVE, or why the row ended; STOP for a row that nobody uses.
    """

    token_B: Array
    position_B: Array
    left_B: Array
    reason_B: Array


@struct.dataclass
class Produced:
    """Tokens of one call, in order: [steps, B], NO_TOKEN where a row gave none; and their log-probabilities."""

    token_TB: Array
    logprobs: TokenLogprobs | None


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the programs are compiled for beside the model; static.

    Attributes:
      pages: of one layer.
      vocab_limit: ids from here on are never chosen.
      logprobs: how many of the likeliest ids a log-probability may come with; None: there are none to be had.
      steps: tokens that a decode call may give a row.
      kernels: which implementation computes each kernel.
      dispatch: how tokens find experts of other devices; None: all are here.
      axes: mesh axes that rows are cut over.
    """

    pages: int
    vocab_limit: int
    logprobs: int | None
    steps: int
    kernels: Kernels = AUTO_KERNELS
    dispatch: Dispatch | None = None
    axes: tuple[str, ...] = ()


# --- prompts --------------------------------------------------------------------------------------------------


def embed(cfg: ModelConfig, top: Variables, tokens_BT: Array) -> Array:
    """Tokens [B, T] -> [B, T, D] in the compute type."""
    return rows(top["params"]["embed_VD"], tokens_BT, jnp.dtype(cfg.dtype))


def prompt_layer(
    cfg: ModelConfig,
    kind: str,
    sizes: Sizes,
    x_BTD: Array,
    memory: Memory,
    variables: Variables,
    positions_BT: Array,
    tables_BM: Array,
    layer: Array,
) -> tuple[Array, Memory]:
    """One layer over tiles of prompts; several tiles may belong to one prompt.

    All latents are written before any attention reads, so a tile sees the earlier ones of the same call. One
    program serves all layers of a kind: compile time does not grow with depth.

    Args:
      kind: "dense" or "moe".
      x_BTD, memory: donated.
      positions_BT: position of each token in its prompt, negative for padding.
      tables_BM: pages of each tile's prompt.
    """
    return _layer(
        cfg, kind, sizes, x_BTD, memory, variables, prompt_context(cfg, positions_BT), tables_BM, layer
    )


def prompt_end(
    cfg: ModelConfig,
    height: int,
    top: Variables,
    x_BTD: Array,
    positions_BT: Array,
    last_B: Array,
    rows_B: Array,
) -> tuple[Array, Array, Array]:
    """The final norm: hidden states [B, T, D] of the tiles, those of the last prompt tokens by row, and what is sound.

    Args:
      height: rows of the decode step.
      last_B: where in its tile the last token of a prompt is; anything for the other tiles.
      rows_B: the row of a tile that ends a prompt; `height` for the other tiles.
    Returns:
      [B, T, D], [height, D], and bool [B]: whether every token of a tile is finite. What is not finite in any
      layer still is at the end, as layers add to the hidden state.
    """
    hidden_BTD = _final_norm(cfg, top, x_BTD)
    finite_BT = jnp.all(jnp.isfinite(hidden_BTD), axis=-1) | (positions_BT < 0)
    last_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    empty = jnp.zeros((height, hidden_BTD.shape[2]), hidden_BTD.dtype)
    return hidden_BTD, empty.at[rows_B].set(last_BD, mode="drop"), jnp.all(finite_BT, axis=1)


def prompt_ahead(
    cfg: ModelConfig,
    sizes: Sizes,
    memory: Memory,
    weights: Weights,
    hidden_BTD: Array,
    next_BT: Array,
    positions_BT: Array,
    tables_BM: Array,
    last_B: Array,
    rows_B: Array,
) -> Memory:
    """The multi-token module's entries of tiles, and the last hidden state of each prompt that ends.

    Args:
      memory: donated.
      hidden_BTD, last_B, rows_B: of and for `prompt_end`.
      next_BT, positions_BT: the token after each, and where that is known; negative elsewhere.
    """
    _, memory = look_ahead(cfg, sizes, memory, weights, hidden_BTD, next_BT, positions_BT, tables_BM)
    last_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    assert memory.hidden_BD is not None
    return dataclasses.replace(memory, hidden_BD=memory.hidden_BD.at[rows_B].set(last_BD, mode="drop"))


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
        logits_BtV = head(cfg, top, hidden_BtD)
        return token_logprobs(logits_BtV, targets_Bt, count), jnp.all(jnp.isfinite(logits_BtV), axis=-1)

    found = jax.lax.map(one, jnp.arange(chunks))
    return jax.tree.map(lambda x: einops.rearrange(x, "n b t ... -> b (n t) ...")[:, :T], found)


# --- new tokens -----------------------------------------------------------------------------------------------


def first(
    cfg: ModelConfig,
    sizes: Sizes,
    memory: Memory,
    state: State,
    top: Variables,
    hidden_BD: Array,
    choosing: Choosing,
    eos_ids: Array,
    wanted: Array,
) -> tuple[Memory, Array, Produced]:
    """The first new token of every live row, from the last hidden state of its prompt; one step.

    Returns memory (donated), the reasons [B] and the tokens.
    """
    no_B = jnp.full(state.token_B.shape, NO_TOKEN, jnp.int32)
    logits_BV = head(cfg, top, hidden_BD[:, None])[:, 0]
    memory, state, produced = advance(cfg, sizes, memory, state, logits_BV, no_B, choosing, eos_ids, wanted)
    return memory, state.reason_B, jax.tree.map(lambda x: x[None], produced)


def decode(
    cfg: ModelConfig,
    sizes: Sizes,
    memory: Memory,
    weights: Weights,
    state: State,
    tables_BM: Array,
    known_TB: Array,
    choosing: Choosing,
    eos_ids: Array,
    wanted: Array,
    limit: Array,
    until_one_ends: Array,
) -> tuple[Memory, Array, Produced]:
    """Up to `limit` (at most `sizes.steps`) tokens for every live row; ends early when no row is left.

    Args:
      memory: donated.
      tables_BM: pages of each row, enough for `limit` more tokens.
      known_TB: the token that step t of row b is known to give, fed again after a row lost its pages; else NO_TOKEN.
      wanted: bool, whether anybody wants log-probabilities.
      until_one_ends: bool, end as soon as a row has ended, since another request waits for it.
    Returns:
      memory, the reasons [B] and the tokens.
    """
    B = state.token_B.shape[0]
    live_before = live_rows(sizes, state)

    def step(carry: tuple[Array, Memory, State, Produced]) -> tuple[Array, Memory, State, Produced]:
        i, memory, state, produced = carry
        live_B = state.reason_B == LIVE
        # Rows that ended all read the same token, so that they touch the same few experts.
        tokens_B1 = jnp.where(live_B, state.token_B, 0)[:, None]
        positions_B1 = jnp.where(live_B, state.position_B, -1)[:, None]
        if memory.hidden_BD is not None:  # so that drafting can set in at any time
            before_B1 = jnp.where(live_B, state.position_B - 1, -1)[:, None]
            _, memory = look_ahead(
                cfg, sizes, memory, weights, memory.hidden_BD[:, None], tokens_B1, before_B1, tables_BM
            )
        hidden_BTD, memory = forward(cfg, sizes, memory, weights, tokens_B1, positions_B1, tables_BM)
        if memory.hidden_BD is not None:
            hidden_BD = jnp.where(live_B[:, None], hidden_BTD[:, 0], memory.hidden_BD)
            memory = dataclasses.replace(memory, hidden_BD=hidden_BD)
        known_B = jax.lax.dynamic_index_in_dim(known_TB, i, keepdims=False)
        logits_BV = head(cfg, weights.top, hidden_BTD)[:, 0]
        memory, state, new = advance(cfg, sizes, memory, state, logits_BV, known_B, choosing, eos_ids, wanted)
        produced = jax.tree.map(lambda all_, one: all_.at[i].set(one), produced, new)
        return i + 1, memory, state, produced

    def go_on(carry: tuple[Array, Memory, State, Produced]) -> Array:
        i, _, state, _ = carry
        live = live_rows(sizes, state)
        return (i < limit) & (live > 0) & ~(until_one_ends & (live < live_before))

    start = (jnp.zeros((), jnp.int32), memory, state, no_tokens(sizes, sizes.steps, B))
    _, memory, state, produced = jax.lax.while_loop(go_on, step, start)
    return memory, state.reason_B, produced


def live_rows(sizes: Sizes, state: State) -> Array:
    """Of all devices: each must run as many steps, for the experts of the others."""
    here = jnp.sum(state.reason_B == LIVE)
    return jax.lax.psum(here, sizes.axes) if sizes.axes else here


def no_tokens(sizes: Sizes, length: int, B: int) -> Produced:
    """An empty `Produced` of [length, B]."""
    logprobs = None
    if sizes.logprobs is not None:
        wide = (length, B, sizes.logprobs)
        logprobs = TokenLogprobs(jnp.zeros((length, B)), jnp.zeros(wide, jnp.int32), jnp.zeros(wide))
    return Produced(jnp.full((length, B), NO_TOKEN, jnp.int32), logprobs)


def advance(
    cfg: ModelConfig,
    sizes: Sizes,
    memory: Memory,
    state: State,
    logits_BV: Array,
    known_B: Array,
    choosing: Choosing,
    eos_ids: Array,
    wanted: Array,
) -> tuple[Memory, State, Produced]:
    """Choose the next token of every live row from the logits at its last one, unless it is known."""
    position_B = state.position_B + 1
    known = known_B != NO_TOKEN
    chosen_B = choose(logits_BV, choosing, memory.count_BV, position_B, sizes.vocab_limit, eos_ids)
    token_B = jnp.where(known, known_B, chosen_B)
    live_B = state.reason_B == LIVE
    finite_B = jnp.all(jnp.isfinite(logits_BV), axis=-1)
    ends_B = ends_row(token_B, choosing.options, eos_ids) & ~known
    gives_B = live_B & finite_B & ~ends_B
    left_B = state.left_B - gives_B.astype(jnp.int32)
    reason_B = jnp.where(live_B & ends_B, STOP, state.reason_B)
    reason_B = jnp.where(gives_B & (left_B <= 0), LENGTH, reason_B)
    reason_B = jnp.where(live_B & ~finite_B, ERROR, reason_B)
    given_B = jnp.where(gives_B, token_B, NO_TOKEN)
    new = State(
        token_B=jnp.where(gives_B, token_B, state.token_B),
        position_B=jnp.where(gives_B, position_B, state.position_B),
        left_B=left_B,
        reason_B=reason_B,
    )
    memory = dataclasses.replace(memory, count_BV=counted(memory.count_BV, given_B))
    return memory, new, Produced(given_B, _logprobs(sizes.logprobs, logits_BV, given_B, wanted))


def _logprobs(count: int | None, logits_BV: Array, tokens_B: Array, wanted: Array) -> TokenLogprobs | None:
    if count is None:
        return None
    wide = (tokens_B.shape[0], count)
    return jax.lax.cond(
        wanted,
        lambda: token_logprobs(logits_BV, tokens_B, count),
        lambda: TokenLogprobs(jnp.zeros(wide[0]), jnp.zeros(wide, jnp.int32), jnp.zeros(wide)),
    )


# --- the model ------------------------------------------------------------------------------------------------


def forward(
    cfg: ModelConfig,
    sizes: Sizes,
    memory: Memory,
    weights: Weights,
    tokens_BT: Array,
    positions_BT: Array,
    tables_BM: Array,
) -> tuple[Array, Memory]:
    """Hidden states [B, T, D] after the final norm of new tokens over the pages; positions negative for padding."""
    x_BTD, ctx = embed(cfg, weights.top, tokens_BT), prompt_context(cfg, positions_BT)
    for layer, (kind, variables) in enumerate(zip(kinds(cfg), weights.layers, strict=True)):
        at = jnp.int32(layer)
        x_BTD, memory = _layer(cfg, kind, sizes, x_BTD, memory, variables, ctx, tables_BM, at)
    return _final_norm(cfg, weights.top, x_BTD), memory


def _layer(
    cfg: ModelConfig,
    kind: str,
    sizes: Sizes,
    x_BTD: Array,
    memory: Memory,
    variables: Variables,
    ctx: Context,
    tables_BM: Array,
    layer: Array,
) -> tuple[Array, Memory]:
    cache = PagedCache(memory.latent_NPJ, memory.index_NPZ, tables_BM, sizes.pages)
    block = Block(cfg, kind, "absorbed", sizes.dispatch, sizes.kernels)
    (x_BTD, cache), routing = block.apply(variables, (x_BTD, cache), layer, ctx)
    counts_LE = memory.counts_LE
    if routing is not None and counts_LE is not None:
        counts_LE = counts_LE.at[layer - cfg.num_dense_layers].add(routing.counts_E.astype(jnp.int32))
    memory = dataclasses.replace(
        memory, latent_NPJ=cache.latent_NPJ, index_NPZ=cache.index_NPZ, counts_LE=counts_LE
    )
    return x_BTD, memory


def prompt_context(cfg: ModelConfig, positions_BT: Array) -> Context:
    """What the layers of one call share; positions negative for padding."""
    return Context(rope_tables(cfg, positions_BT), positions_BT, None, positions_BT >= 0)


def _final_norm(cfg: ModelConfig, top: Variables, x_BTD: Array) -> Array:
    return rms_norm(x_BTD, top["params"]["final_norm_D"], cfg.rms_norm_eps)


def head(cfg: ModelConfig, top: Variables, hidden: Array) -> Array:
    """float32 logits [B, T, V]."""
    logits = Transformer(cfg).apply(top, hidden, method="logits")
    # What is asked of the logits later (log-probabilities or not) must not change how they are computed.
    return jax.lax.optimization_barrier(logits)
