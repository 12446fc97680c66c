"""A device without a model: what it gives depends on every slot that a row's table leads to, and on nothing else.

The value of a slot is a hash of its token, its position and all earlier slots of its sequence as read through the
page table. So a wrong, stale or shared page changes the tokens, and the tokens of a sound run are a function of the
prompt (`reference`).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference import steps
from dsv3_jax.inference.placement import Placement
from dsv3_jax.inference.sampling import Choosing, TokenLogprobs
from dsv3_jax.inference.settings import EngineOptions, pages_of

VOCAB, EOS, BAD = 50, 0, 49
"""BAD is a prompt token with which nothing is finite."""

_ODD = np.uint64(0x9E3779B97F4A7C15)


def _value(token: int, position: int, before: np.ndarray) -> np.uint64:
    with np.errstate(over="ignore"):
        weights = (np.arange(1, len(before) + 1, dtype=np.uint64) * _ODD) | np.uint64(1)
        total = np.sum(before * weights, dtype=np.uint64)
        mixed = (total + np.uint64(token + 1) * _ODD) ^ np.uint64((position + 1) * 0x1000193)
        mixed ^= mixed >> np.uint64(29)
        return mixed * _ODD | np.uint64(1)


def _next(value: np.uint64) -> tuple[int, bool]:
    """The next token, and whether its logits are finite."""
    return int(value >> np.uint64(33)) % (VOCAB - 1), int(value >> np.uint64(20)) % 61 != 0


def reference(prompt: list[int], max_new: int) -> tuple[list[int], str]:
    """Tokens and finish reason of a request."""
    values: list[np.uint64] = []
    for at, token in enumerate(prompt):
        if token == BAD:
            return [], "error"
        values.append(_value(token, at, np.asarray(values, np.uint64)))
    new: list[int] = []
    while len(new) < max_new:
        token, finite = _next(values[-1])
        if not finite:
            return new, "error"
        if token == EOS:
            return new, "stop"
        new.append(token)
        values.append(_value(token, len(values), np.asarray(values, np.uint64)))
    return new, "length"


class FakeDevice:
    """Stands in for `device.Device`."""

    def __init__(
        self, cfg: ModelConfig, weights: Any, options: EngineOptions, *, placement: Placement, **_: Any
    ) -> None:
        assert options.pages is not None and options.context is not None
        self.programs = SimpleNamespace(count=0, seconds=0.0)
        self.table_width = pages_of(options.context, options.page_size)
        self._options = options
        self._shards = placement.shards
        self._height = options.rows // placement.shards
        shape = (placement.shards, options.pages // placement.shards, options.page_size)
        self._slots = np.zeros(shape, np.uint64)

    def compile(self) -> None:
        pass

    def expert_counts(self) -> None:
        return None

    def begin_count(self, row: int, token: int) -> None:
        pass

    def prefill(
        self,
        tokens_BT: np.ndarray,
        positions_BT: np.ndarray,
        tables_BM: np.ndarray,
        last_B: np.ndarray,
        rows_B: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        hidden_BT = np.zeros(tokens_BT.shape, np.uint64)
        each = self._options.prefill_tiles // self._shards
        for t in np.ndindex(tokens_BT.shape):
            if positions_BT[t] >= 0:
                shard = t[0] // each
                hidden_BT[t] = self._write(shard, tables_BM[t[0]], int(positions_BT[t]), int(tokens_BT[t]))
        hidden_B = np.zeros(self._options.rows, np.uint64)
        for at, row in enumerate(rows_B):
            if row < self._height:
                hidden_B[at // each * self._height + row] = hidden_BT[at, last_B[at]]
        return hidden_BT, hidden_B, ~np.any((tokens_BT == BAD) & (positions_BT >= 0), axis=1)

    def score(self, hidden_BT: np.ndarray, targets_BT: np.ndarray) -> tuple[TokenLogprobs, np.ndarray]:
        none = np.zeros((*targets_BT.shape, 1))
        return TokenLogprobs(-(hidden_BT % 7).astype(float), none, none), np.ones(targets_BT.shape, bool)

    def first(
        self, state: steps.State, hidden_B: np.ndarray, choosing: Choosing, wanted: bool
    ) -> tuple[np.ndarray, steps.Produced]:
        token_TB, reason_B = self._empty(1), state.reason_B.copy()
        for row in np.flatnonzero(state.reason_B == steps.LIVE):
            self._choose(hidden_B[row], row, 0, state, reason_B, token_TB)
        return reason_B, self._produced(token_TB)

    def decode(
        self,
        state: steps.State,
        tables_BM: Any,
        known_TB: np.ndarray,
        choosing: Choosing,
        *,
        wanted: bool,
        limit: int,
        until_one_ends: bool,
    ) -> tuple[np.ndarray, steps.Produced]:
        tables_BM = np.asarray(tables_BM)
        token_TB, reason_B = self._empty(self._options.steps_per_call), state.reason_B.copy()
        live = int((reason_B == steps.LIVE).sum())
        for t in range(limit):
            for row in np.flatnonzero(reason_B == steps.LIVE):
                token, position = int(state.token_B[row]), int(state.position_B[row])
                value = self._write(row // self._height, tables_BM[row], position, token)
                self._choose(value, row, t, state, reason_B, token_TB)
                if known_TB[t, row] != steps.NO_TOKEN:
                    assert token_TB[t, row] == known_TB[t, row], "a token that is fed again is another one"
            now = int((reason_B == steps.LIVE).sum())
            if not now or (until_one_ends and now < live):
                break
        return reason_B, self._produced(token_TB)

    def _write(self, shard: int, table_M: np.ndarray, position: int, token: int) -> np.uint64:
        P, slots = self._options.page_size, self._slots[shard]
        before = slots[table_M[: pages_of(position, P)]].reshape(-1)[:position]
        page = table_M[position // P]
        assert page != 0, "a token goes to the null page"
        slots[page, position % P] = value = _value(token, position, before)
        return value

    def _choose(
        self,
        value: np.uint64,
        row: int,
        t: int,
        state: steps.State,
        reason_B: np.ndarray,
        token_TB: np.ndarray,
    ) -> None:
        token, finite = _next(value)
        if not finite:
            reason_B[row] = steps.ERROR
        elif token == EOS:
            reason_B[row] = steps.STOP
        else:
            token_TB[t, row] = state.token_B[row] = token
            state.position_B[row] += 1
            state.left_B[row] -= 1
            if state.left_B[row] <= 0:
                reason_B[row] = steps.LENGTH

    def _empty(self, count: int) -> np.ndarray:
        return np.full((count, self._options.rows), steps.NO_TOKEN, np.int32)

    def _produced(self, token_TB: np.ndarray) -> steps.Produced:
        none = np.zeros((*token_TB.shape, 1))
        return steps.Produced(token_TB, TokenLogprobs(np.zeros(token_TB.shape), none, none))
