"""Speculative decoding: the multi-token module drafts k tokens, one call of the main model checks them all.

A draft is kept where it is the token that the main model chooses there, by the very rule of plain decoding: the largest
logit, or the draw by the noise of (seed, prompt, position). So drafts change how many calls a text takes and never the
text, sampled or not. Drafts are drawn with the same noise, which makes draft and choice agree more often than two
draws.

One thing may differ from plain decoding: logits of [rows, k + 1] tokens and of [rows, 1] may be rounded differently, so
a token can differ where two are equal up to that.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference import steps
from dsv3_jax.inference.adjustments import counted
from dsv3_jax.inference.ahead import ahead_logits, look_ahead
from dsv3_jax.inference.sampling import Choosing, choose
from dsv3_jax.inference.steps import LIVE, NO_TOKEN, Memory, Produced, Sizes, State
from dsv3_jax.inference.weights import Weights

Array = jax.Array

PAUSED = 100
"""Reason of a row whose draft was not the token: it goes on with the next call of the main model."""


@struct.dataclass
class Drafts:
    """What one round proposes for the rows: tokens [B, k], and bool [B, k] which of them are to be checked.

    Once one is not, none after it is.
    """

    token_Bk: Array
    valid_Bk: Array


def draft(
    cfg: ModelConfig,
    sizes: Sizes,
    k: int,
    memory: Memory,
    weights: Weights,
    state: State,
    tables_BM: Array,
    known_Bk: Array,
    drafting_B: Array,
    room_B: Array,
    choosing: Choosing,
    eos_ids: Array,
) -> tuple[Memory, Drafts]:
    """Up to k tokens for every live row, each chosen from the module's logits as the main model's would be.

    Args:
      memory: its `hidden_BD` is the main model's at the position before `state.position_B`.
      known_Bk: tokens that are known anyway (`steps.decode`), taken instead; NO_TOKEN where none is.
      drafting_B: bool, rows that want drafts; known tokens are taken in any case.
      room_B: slots of each row's pages; none is checked beyond them, nor beyond what the row may still produce.
    """
    assert memory.hidden_BD is not None
    live_B = state.reason_B == LIVE
    hidden_BD, token_B, position_B = memory.hidden_BD, state.token_B, state.position_B - 1
    count_BV, valid_B = memory.count_BV, live_B
    tokens, valid = [], []
    for j in range(k):
        # The first look makes an entry that must be, whoever drafts; the further ones only serve their drafts.
        looks_B = live_B if j == 0 else valid_B
        here_B1 = jnp.where(looks_B, position_B, -1)[:, None]
        ahead_BTD, memory = look_ahead(
            cfg, sizes, memory, weights, hidden_BD[:, None], token_B[:, None], here_B1, tables_BM
        )
        hidden_BD = ahead_BTD[:, 0]
        logits_BV = ahead_logits(cfg, weights, ahead_BTD)[:, 0]
        token_B = choose(logits_BV, choosing, count_BV, position_B + 2, sizes.vocab_limit, eos_ids)
        known_B = known_Bk[:, j]
        token_B = jnp.where(known_B == NO_TOKEN, token_B, known_B)
        room = (state.position_B + j + 1 < room_B) & (j + 1 < state.left_B)
        valid_B = valid_B & room & (drafting_B | (known_B != NO_TOKEN))
        count_BV = counted(count_BV, jnp.where(valid_B, token_B, NO_TOKEN))
        position_B = position_B + 1
        tokens.append(token_B)
        valid.append(valid_B)
    return memory, Drafts(jnp.stack(tokens, axis=1), jnp.stack(valid, axis=1))


def verify(
    cfg: ModelConfig,
    sizes: Sizes,
    memory: Memory,
    weights: Weights,
    state: State,
    tables_BM: Array,
    known_BT: Array,
    drafts: Drafts,
    choosing: Choosing,
    eos_ids: Array,
    wanted: Array,
) -> tuple[Memory, State, Produced]:
    """One call of the main model over each row's token and drafts: the tokens that follow, [k + 1, B].

    A row gets the drafts that are its tokens, and one token more: the one in the place of the first that is not.
    The slots of what was refused hold nothing that is read: a token of that position is written before.

    Args:
      known_BT: [B, k + 1], see `draft`.
    """
    live_B = state.reason_B == LIVE
    T = drafts.token_Bk.shape[1] + 1
    tokens_BT = jnp.concatenate([state.token_B[:, None], drafts.token_Bk], axis=1)
    fed_BT = jnp.concatenate([live_B[:, None], drafts.valid_Bk], axis=1)
    positions_BT = state.position_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
    hidden_BTD, memory = steps.forward(
        cfg,
        sizes,
        memory,
        weights,
        jnp.where(fed_BT, tokens_BT, 0),
        jnp.where(fed_BT, positions_BT, -1),
        tables_BM,
    )
    logits_BTV = steps.head(cfg, weights.top, hidden_BTD)
    before_BD, given = memory.hidden_BD, []
    for t in range(T):
        memory, state, new = steps.advance(
            cfg, sizes, memory, state, logits_BTV[:, t], known_BT[:, t], choosing, eos_ids, wanted
        )
        given.append(new)
        if t < T - 1:
            goes_on_B = drafts.valid_Bk[:, t] & (new.token_TB == drafts.token_Bk[:, t])
            paused_B = (state.reason_B == LIVE) & ~goes_on_B
            state = dataclasses.replace(state, reason_B=jnp.where(paused_B, PAUSED, state.reason_B))
    state = dataclasses.replace(state, reason_B=jnp.where(state.reason_B == PAUSED, LIVE, state.reason_B))
    produced = jax.tree.map(lambda *parts: jnp.stack(parts), *given)

    # The drafts' entries were made from guesses; now the hidden states and tokens are known.
    gave_BT = produced.token_TB.T != NO_TOKEN
    entries_BT = jnp.where(gave_BT, positions_BT, -1)
    _, memory = look_ahead(
        cfg, sizes, memory, weights, hidden_BTD, produced.token_TB.T, entries_BT, tables_BM
    )
    last_B = jnp.maximum(jnp.sum(gave_BT, axis=1) - 1, 0)
    last_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    hidden_BD = jnp.where(gave_BT[:, :1], last_BD, before_BD)
    return dataclasses.replace(memory, hidden_BD=hidden_BD), state, produced


def speculate(
    cfg: ModelConfig,
    sizes: Sizes,
    k: int,
    memory: Memory,
    weights: Weights,
    state: State,
    tables_BM: Array,
    known_TB: Array,
    drafting_B: Array,
    room_B: Array,
    choosing: Choosing,
    eos_ids: Array,
    wanted: Array,
    limit: Array,
    until_one_ends: Array,
) -> tuple[Memory, Array, Produced, Array]:
    """`steps.decode` in rounds of drafting and checking; `limit` counts rounds, of 1 to k + 1 tokens a row.

    Args:
      memory: donated.
      known_TB: the token that a row is known to give as its t-th of this call, else NO_TOKEN.
      drafting_B, room_B: see `draft`.
    Returns:
      memory, the reasons [B], the tokens [rounds (k + 1), B] with NO_TOKEN between rounds, and int32 [2]: drafts that
      were checked and kept, known tokens apart.
    """
    B, T = state.token_B.shape[0], k + 1
    live_before = steps.live_rows(sizes, state)
    # Nobody is known to give anything beyond the table.
    known_BS = jnp.pad(known_TB.T, ((0, 0), (0, T)), constant_values=NO_TOKEN)

    def turn(
        carry: tuple[Array, Memory, State, Produced, Array, Array],
    ) -> tuple[Array, Memory, State, Produced, Array, Array]:
        i, memory, state, produced, given_B, kept_2 = carry
        at_BT = jnp.minimum(given_B, known_TB.shape[0])[:, None] + jnp.arange(T)[None, :]
        known_BT = jnp.take_along_axis(known_BS, at_BT, axis=1)
        memory, drafts = draft(
            cfg,
            sizes,
            k,
            memory,
            weights,
            state,
            tables_BM,
            known_BT[:, :k],
            drafting_B,
            room_B,
            choosing,
            eos_ids,
        )
        memory, state, new = verify(
            cfg, sizes, memory, weights, state, tables_BM, known_BT, drafts, choosing, eos_ids, wanted
        )
        produced = jax.tree.map(
            lambda all_, one: jax.lax.dynamic_update_slice_in_dim(all_, one, i * T, axis=0), produced, new
        )
        count_B = jnp.sum(new.token_TB != NO_TOKEN, axis=0, dtype=jnp.int32)
        guessed_Bk = drafts.valid_Bk & (known_BT[:, :k] == NO_TOKEN)
        right_Bk = guessed_Bk & (jnp.arange(k)[None, :] < count_B[:, None])
        right_Bk &= new.token_TB[:k].T == drafts.token_Bk
        kept_2 = kept_2 + jnp.stack([jnp.sum(guessed_Bk), jnp.sum(right_Bk)]).astype(jnp.int32)
        return i + 1, memory, state, produced, given_B + count_B, kept_2

    def go_on(carry: tuple[Array, Memory, State, Produced, Array, Array]) -> Array:
        i, _, state, *_ = carry
        live = steps.live_rows(sizes, state)
        return (i < limit) & (live > 0) & ~(until_one_ends & (live < live_before))

    empty = steps.no_tokens(sizes, rounds(sizes.steps, k) * T, B)
    zero_B = jnp.zeros(B, jnp.int32)
    start = (jnp.zeros((), jnp.int32), memory, state, empty, zero_B, jnp.zeros(2, jnp.int32))
    _, memory, state, produced, _, kept_2 = jax.lax.while_loop(go_on, turn, start)
    kept_2 = jax.lax.psum(kept_2, sizes.axes) if sizes.axes else kept_2
    return memory, state.reason_B, produced, kept_2


def rounds(tokens: int, k: int) -> int:
    """Rounds for which pages of so many tokens are enough, at least one."""
    return max(1, tokens // (k + 1))
