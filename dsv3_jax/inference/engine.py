"""Decoding of token ids in static batches.

Promise: at a given batch size and compute type, the tokens of a request depend on its own ids and options
alone, not on the other requests, their number or their order. What it rests on:

* every program runs at a fixed shape: batches are padded to `batch_size`, and a request's sizes (prompt
  bucket, rows of a prefill call, cache slots) follow from its own length (`buckets`);
* attention over the cache runs in fixed blocks, so masked ones add exact zeros; experts add a token's K
  parts in the order of choice; a row of a matrix product does not depend on its place;
* random numbers come from (seed, hash of the prompt ids, position).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import DataError
from dsv3_jax.inference import steps
from dsv3_jax.inference.adjustments import needs_adjusting
from dsv3_jax.inference.buckets import cache_slots, prefill_rows, prompt_bucket
from dsv3_jax.inference.options import Sampling, row_key
from dsv3_jax.inference.programs import Programs, Stats
from dsv3_jax.inference.requests import Request, Result, Row, check_prompt, entry
from dsv3_jax.inference.sampling import RowOptions, row_options
from dsv3_jax.inference.weights import Weights, kinds, unstack_layers
from dsv3_jax.model import Cache, make_cache

Watch = Callable[[Request, list[int]], int | None]


class Engine:
    """A model ready to decode. Knows token ids only."""

    def __init__(
        self,
        cfg: ModelConfig,
        variables: Mapping[str, Any] | Weights,
        *,
        batch_size: int = 16,
        eos_ids: Sequence[int] = (),
        vocab_limit: int | None = None,
        cache_dtype: str | None = None,
        steps_per_call: int = steps.MOST_STEPS,
    ) -> None:
        """
        Args:
          cfg: its `dtype` is the compute type.
          variables: {"params", "router"}, or what `weights.unstack_layers` made of them.
          batch_size: rows of every decode step.
          eos_ids: ids that end a row.
          vocab_limit: ids from here on are never chosen; by default the vocabulary.
          cache_dtype: storage of the cache; by default the compute type, on the CPU float32 (a 16-bit cache is
            converted as a whole in every layer there).
          steps_per_call: tokens a row may get between two looks of the host; at most `steps.MOST_STEPS`.
        """
        self.cfg = cfg
        self.batch_size = batch_size
        self.steps_per_call = min(steps_per_call, steps.MOST_STEPS)
        self.stats = Stats()
        self._programs = Programs(self.stats)
        self._weights = variables if isinstance(variables, Weights) else unstack_layers(cfg, variables)
        # An id that no token has keeps the array's shape legal when nothing ends a row.
        self._eos_ids = np.asarray(sorted(set(eos_ids)) or [-2], np.int32)
        self._vocab_limit = min(vocab_limit or cfg.vocab_size, cfg.vocab_size)
        self._cache_dtype = cache_dtype or ("float32" if jax.default_backend() == "cpu" else cfg.dtype)

    def run(self, requests: Iterable[Request], watch: Watch | None = None) -> Iterator[list[Result]]:
        """Decode all requests; yields after every device call the results that became known, often none.

        Args:
          watch: called with the new ids of a request as they come; a number says to keep that many of them and
            end the request with "stop". Log-probabilities are cut alike.
        Raises:
          DataError: a prompt is empty, has ids out of range, or does not fit the context with its new tokens.
        """
        rows = []
        for request in requests:
            check_prompt(self.cfg, request.ids, request.sampling.max_new_tokens)
            if needs_adjusting(request.sampling):
                raise DataError("penalties, logit_bias and min_tokens are not supported by this engine")
            rows.append(Row(request, np.asarray(request.ids, np.int32)))
        wanted = [row.request.sampling.logprobs for row in rows if row.request.sampling.logprobs is not None]
        groups: dict[int, list[Row]] = {}
        for row in sorted(rows, key=self._bucket):
            groups.setdefault(self._slots(row), []).append(row)
        for slots, group in sorted(groups.items()):
            if slots == 0:
                yield from self._read_only(group)
                continue
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                yield from self._decode_batch(batch, slots, max(wanted) if wanted else None, watch)

    def _bucket(self, row: Row) -> int:
        return prompt_bucket(len(row.ids), self.cfg.max_position_embeddings)

    def _slots(self, row: Row) -> int:
        """Cache slots that the row needs; 0 when nothing is to be decoded."""
        new = row.request.sampling.max_new_tokens
        return cache_slots(len(row.ids) + new, self.cfg.max_position_embeddings) if new else 0

    # --- prompts ------------------------------------------------------------------------------------------

    def _read_only(self, rows: list[Row]) -> Iterator[list[Result]]:
        """Rows without new tokens: their prompts are scored if asked for, else there is nothing to compute."""
        silent = [row for row in rows if row.request.sampling.prompt_logprobs is None]
        for row in silent:
            row.reason = steps.LENGTH
        if silent:
            yield [row.result() for row in silent]
        rows = [row for row in rows if row.request.sampling.prompt_logprobs is not None]
        for places in self._calls(rows):
            part = [rows[place] for place in places]
            self._prefill(
                part, None, jnp.zeros((self.batch_size, self.cfg.hidden_size), self.cfg.dtype), places
            )
            for row in part:
                row.reason = row.reason or steps.LENGTH
            yield [row.result() for row in part]

    def _calls(self, rows: list[Row]) -> Iterator[range]:
        """Prefill calls of rows sorted by bucket: which rows go together."""
        start = 0
        while start < len(rows):
            bucket = self._bucket(rows[start])
            stop = start
            limit = min(start + prefill_rows(bucket, self.batch_size), len(rows))
            while stop < limit and self._bucket(rows[stop]) == bucket:
                stop += 1
            yield range(start, stop)
            start = stop

    def _prefill(
        self, rows: list[Row], cache: Cache | None, hidden_BD: jax.Array, places: range
    ) -> tuple[Cache | None, jax.Array]:
        """Run the prompts of one call, all of one bucket, into `places` of the batch; scores those that ask for it."""
        bucket = self._bucket(rows[0])
        height = prefill_rows(bucket, self.batch_size)
        tokens_BT = np.zeros((height, bucket), np.int32)
        lengths_B = np.zeros(height, np.int32)
        rows_B = np.full(height, self.batch_size, np.int32)
        for at, (row, place) in enumerate(zip(rows, places, strict=True)):
            tokens_BT[at, : len(row.ids)], lengths_B[at], rows_B[at] = row.ids, len(row.ids), place
        with self.stats.timed("prefill"):
            cache, hidden_BD, hidden_BTD = prefill(
                self._programs, self.cfg, self._weights, cache, hidden_BD, tokens_BT, lengths_B, rows_B
            )
            self._score(rows, hidden_BTD, tokens_BT)
            jax.block_until_ready(hidden_BD)
        self.stats.prefill_tokens += int(lengths_B.sum())
        return cache, hidden_BD

    def _score(self, rows: list[Row], hidden_BTD: jax.Array, tokens_BT: np.ndarray) -> None:
        """Fill in the prompt log-probabilities of the rows of one call that want them."""
        counts = [row.request.sampling.prompt_logprobs for row in rows]
        if all(count is None for count in counts):
            return
        targets_BT = np.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
        static = (self.cfg, max(count or 0 for count in counts), steps.SCORE_FLOATS)
        found, finite_BT = jax.device_get(
            self._programs.run(steps.score, static, (self._weights.top, hidden_BTD, targets_BT))
        )
        for at, (row, count) in enumerate(zip(rows, counts, strict=True)):
            scored = len(row.ids) - 1
            if count is None:
                continue
            if not finite_BT[at, :scored].all():
                row.reason = steps.ERROR
                continue
            row.prompt_logprobs = [None]
            row.prompt_logprobs += [entry(int(row.ids[t + 1]), found, (at, t), count) for t in range(scored)]

    # --- new tokens ---------------------------------------------------------------------------------------

    def _decode_batch(
        self, rows: list[Row], slots: int, count: int | None, watch: Watch | None
    ) -> Iterator[list[Result]]:
        cfg, B, top = self.cfg, self.batch_size, self._weights.top
        cache: Any = make_cache(cfg, B, slots, dtype=self._cache_dtype)
        hidden_BD = jnp.zeros((B, cfg.hidden_size), cfg.dtype)
        for places in self._calls(rows):
            cache, hidden_BD = self._prefill([rows[place] for place in places], cache, hidden_BD, places)
        yield [row.result() for row in rows if row.reason != steps.LIVE]  # prompts that could not be scored

        state = self._start(rows, cache)
        options = self._options(rows)
        static = (cfg, self._vocab_limit, count)
        limit = np.int32(self.steps_per_call)
        produced = None
        while any(row.reason == steps.LIVE for row in rows):
            with self.stats.timed("decode"):
                if produced is None:
                    start = (state, top, hidden_BD, options, self._eos_ids)
                    state, produced = self._programs.run(steps.first, static, start, (0,))
                else:
                    stopped_B = np.ones(B, bool)
                    stopped_B[: len(rows)] = [row.reason != steps.LIVE for row in rows]
                    more = (state, self._weights, options, self._eos_ids, stopped_B, limit)
                    state, produced = self._programs.run(
                        steps.decode, (*static, steps.MOST_STEPS), more, (0,)
                    )
                host, reason_B = jax.device_get((produced, state.reason_B))
            yield self._harvest(rows, host, reason_B, watch)

    def _start(self, rows: list[Row], cache: Cache) -> steps.State:
        token_B, position_B, left_B = (np.zeros(self.batch_size, np.int32) for _ in range(3))
        reason_B = np.full(self.batch_size, steps.STOP, np.int32)
        for at, row in enumerate(rows):
            token_B[at], position_B[at] = row.ids[-1], len(row.ids) - 1
            left_B[at], reason_B[at] = row.request.sampling.max_new_tokens, row.reason
        return steps.State(cache, *map(jnp.asarray, (token_B, position_B, left_B, reason_B)))

    def _options(self, rows: list[Row]) -> RowOptions:
        padding = self.batch_size - len(rows)
        samplings = [row.request.sampling for row in rows] + [Sampling()] * padding
        keys = [row_key(row.request.sampling.seed, row.ids) for row in rows] + [
            np.zeros(2, np.uint32)
        ] * padding
        return row_options(samplings, keys)

    def _harvest(
        self, rows: list[Row], produced: steps.Produced, reason_B: np.ndarray, watch: Watch | None
    ) -> list[Result]:
        """Take the new tokens of every live row; returns the results of rows that have ended now."""
        ended = []
        for at, row in enumerate(rows):
            if row.reason != steps.LIVE:
                continue
            column = np.asarray(produced.token_TB)[:, at]
            times = np.flatnonzero(column != steps.NO_TOKEN).tolist()
            new = [int(column[t]) for t in times]
            row.reason = int(reason_B[at])
            keep = watch(row.request, new) if watch is not None and new else None
            if keep is not None:
                times, new, row.reason = times[:keep], new[:keep], steps.STOP
            row.add(times, new, produced.logprobs, at)
            self.stats.decode_tokens += len(new)
            if row.reason != steps.LIVE:
                ended.append(row.result())
        return ended


def prefill(
    programs: Programs,
    cfg: ModelConfig,
    weights: Weights,
    cache: Cache | None,
    hidden_BD: jax.Array,
    tokens_BT: np.ndarray,
    lengths_B: np.ndarray,
    rows_B: np.ndarray,
) -> tuple[Cache | None, jax.Array, jax.Array]:
    """Run right-padded prompts layer by layer into rows of a batch (see `steps.prompt_layer`).

    Args:
      cache, hidden_BD: of the whole batch, donated; no cache for prompts that are only scored.
      tokens_BT, lengths_B, rows_B: the prompts, their lengths, their rows in the batch.
    Returns:
      The cache, `hidden_BD` with the prompts' last hidden states, and the hidden states [B, T, D] of the prompts.
    """
    x_BTD = programs.run(steps.embed, (cfg,), (weights.top, tokens_BT))
    for layer, (kind, variables) in enumerate(zip(kinds(cfg), weights.layers, strict=True)):
        args = (x_BTD, cache, variables, lengths_B, np.int32(layer), rows_B)
        x_BTD, cache = programs.run(steps.prompt_layer, (cfg, kind), args, (0, 1))
    end = (hidden_BD, weights.top, x_BTD, lengths_B, rows_B)
    hidden_BD, hidden_BTD = programs.run(steps.prompt_end, (cfg,), end, (0,))
    return cache, hidden_BD, hidden_BTD
