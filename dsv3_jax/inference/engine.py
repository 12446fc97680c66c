"""The engine: requests in, tokens out, a step at a time. Token ids only; continuous batching over a paged cache.

Promise: with the same options and compute type, the tokens and log-probabilities of a request depend on its own ids
and options alone: not on the other requests, their number or order, nor on how its prompt was cut into tiles, on
prefixes found in the cache, or on pages lost and computed again. What it rests on:

* two programs compute all latents, each at one fixed shape: tiles of prompts, and a decode step of all rows. A prompt
  token is always computed by the first, a new one by the second (`scheduler`);
* attention over the pages runs in fixed blocks, so masked ones add exact zeros; experts add a token's K parts in the
  order of choice; a row of a matrix product does not depend on its place;
* random numbers come from (seed, hash of the prompt ids, position).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import DataError
from dsv3_jax.inference import calls, run, steps
from dsv3_jax.inference.adjustments import needs_counts
from dsv3_jax.inference.device import Device
from dsv3_jax.inference.options import check_ids
from dsv3_jax.inference.pace import Pace
from dsv3_jax.inference.pages import PagePool
from dsv3_jax.inference.placement import Placement
from dsv3_jax.inference.requests import Entry, Request, Result, Update, check_prompt, entry
from dsv3_jax.inference.scheduler import Plan, Scheduler, Sequence, Tile
from dsv3_jax.inference.settings import EngineOptions, resolve, token_bytes
from dsv3_jax.inference.shards import Shards
from dsv3_jax.inference.stats import Stats
from dsv3_jax.inference.table import RowTable
from dsv3_jax.inference.weights import Weights, unstack_layers, with_whole_kv_b

_REASONS = {steps.STOP: "stop", steps.LENGTH: "length", steps.ERROR: "error"}


@dataclasses.dataclass(eq=False)
class _Record:
    """A request on its way.

    Attributes:
      prompt_logprobs: so far; None if not asked for, or delivered.
      submitted, admitted: when it came, and when it was first planned; 0 before.
      timed: whether both were told.
      mask_W: what the guide allows next; None without one.
    """

    request: Request
    sequence: Sequence
    prompt_logprobs: list[Entry | None] | None
    submitted: float = 0.0
    admitted: float = 0.0
    timed: bool = False
    mask_W: np.ndarray | None = None


class Engine:
    """A model ready to decode. One thread at a time."""

    def __init__(
        self,
        cfg: ModelConfig,
        weights: Mapping[str, Any] | Weights,
        *,
        options: EngineOptions | None = None,
        eos_ids: Iterable[int] = (),
        vocab_limit: int | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """
        Args:
          cfg: its `dtype` is the compute type.
          weights: {"params", "router"}, or what `weights.unstack_layers` made of them.
          eos_ids: ids that end a row.
          vocab_limit: ids from here on are never chosen; by default the vocabulary.
          mesh: devices; rows, tiles and pages of the options are cut over all of them, experts over its axis
            "expert".
        Raises:
          ConfigError: no memory for the cache, sizes that do not divide by the devices, or nothing that could draft.
        """
        self.cfg = cfg
        self._place = place = Placement(mesh)
        place.check()
        weights = weights if isinstance(weights, Weights) else unstack_layers(cfg, weights)
        if options is None or not options.keep_kv_b_codes:
            weights = with_whole_kv_b(weights, cfg.dtype)  # before what is left for pages is counted
        self.options = options = resolve(options or EngineOptions(), cfg, place.shards)
        assert options.pages is not None
        self._device = Device(
            cfg,
            weights,
            options,
            eos_ids=list(eos_ids),
            vocab_limit=min(vocab_limit or cfg.vocab_size, cfg.vocab_size),
            placement=place,
        )
        height = options.rows // place.shards
        schedulers = [
            Scheduler(
                PagePool(options.pages // place.shards),
                rows=height,
                first_row=shard * height,
                page_size=options.page_size,
                prefill_tiles=options.prefill_tiles // place.shards,
                tile=options.tile,
                most_steps=options.steps_per_call,
                prefix_cache=options.prefix_cache,
            )
            for shard in range(place.shards)
        ]
        self.scheduler = schedulers[0] if place.shards == 1 else Shards(schedulers)
        self._table = RowTable(options.rows, self._device.table_width, cfg.vocab_size, place)
        self._pace = Pace() if options.speculative else None
        self._records: dict[int, _Record] = {}
        self._ready: list[Update] = []
        self._tickets = 0
        assert options.cache_dtype is not None
        nbytes = token_bytes(cfg, options.cache_dtype, options.layers(cfg))
        self._stats = Stats(pages_total=self.scheduler.pool.total, cache_token_bytes=nbytes)
        self._expert_counts: tuple[np.ndarray, np.ndarray] | None = None

    def warm(self) -> None:
        """Compile every program; nothing is compiled after it."""
        self._device.compile()

    @property
    def idle(self) -> bool:
        """Whether a step would bring nothing."""
        return not self._records and not self._ready

    @property
    def queued_tokens(self) -> int:
        """Prompt and new tokens that the waiting requests may come to."""
        return sum(len(s.prompt) + s.max_new for s in self.scheduler.waiting)

    @property
    def stats(self) -> Stats:
        """Counts up to now."""
        scheduler, stats = self.scheduler, self._stats
        stats.running, stats.waiting = len(scheduler.running), len(scheduler.waiting)
        stats.pages_used, stats.pages_cached = scheduler.pool.used, scheduler.pool.cached
        stats.prefix_hit_tokens, stats.preemptions = scheduler.prefix_hit_tokens, scheduler.preemptions
        if self._pace is not None:
            stats.drafting_calls, stats.drafting_pays = self._pace.drafting, self._pace.pays
        stats.programs, stats.compile_seconds = self._device.programs.count, self._device.programs.seconds
        return stats

    def expert_counts(self) -> np.ndarray | None:
        """int64 [expert layers, experts]: tokens sent to each expert since the start; None without experts."""
        now = self._device.expert_counts()
        if now is None:
            return None
        last, total = self._expert_counts or (np.zeros_like(now), np.zeros(now.shape, np.int64))
        # The device's counters wrap around; their differences do not.
        total = total + (now - last).astype(np.uint32)
        self._expert_counts = (now, total)
        return total

    def check(self, request: Request) -> None:
        """Whether `submit` would take a request.

        Raises:
          DataError: its prompt is empty or has ids out of range, it can never fit, it asks for more
            log-probabilities than the engine was made for, or its options name ids that there are not.
        """
        sampling, options = request.sampling, self.options
        check_prompt(self.cfg, request.ids, sampling.max_new_tokens, options.context)
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(sampling, name)
            if count is not None and (options.max_logprobs is None or count > options.max_logprobs):
                raise DataError(f"{name} is {count}; this engine gives {options.max_logprobs} at most")
        check_ids(sampling, self.cfg.vocab_size, DataError)
        if request.guide is not None and sampling.ignore_eos:
            raise DataError("ignore_eos cannot be used with structured output, which says where a text ends")
        if not self.scheduler.fits(len(request.ids), sampling.max_new_tokens):
            raise DataError(
                f"the prompt has {len(request.ids)} tokens and max_new_tokens is {sampling.max_new_tokens}: "
                f"together more than the cache of {self.scheduler.pool.total} pages of {options.page_size} tokens"
            )

    def submit(self, request: Request) -> int:
        """Queue a request; its ticket. Raises DataError as `check` does."""
        self.check(request)
        sampling, ids = request.sampling, np.asarray(request.ids, np.int32)
        self._tickets += 1
        ticket = self._tickets
        scored = sampling.prompt_logprobs is not None
        if sampling.max_new_tokens == 0 and not scored:
            self._ready.append(Update(ticket, finish_reason="length"))
            return ticket
        sequence = Sequence(
            ticket,
            ids,
            sampling.max_new_tokens,
            tenant=request.tenant,
            find_prefix=not scored,
            # A guide must see a token before it can say what may follow.
            one_by_one=request.stream or request.guide is not None,
        )
        record = _Record(request, sequence, [None] * len(ids) if scored else None, time.perf_counter())
        if request.guide is not None:
            record.mask_W = request.guide.mask()
        self._records[ticket] = record
        self.scheduler.add(sequence)
        return ticket

    def cancel(self, ticket: int) -> None:
        """End a request; its pages are free at once. Nothing happens to one that has ended."""
        record = self._records.pop(ticket, None)
        if record is not None:
            self.scheduler.remove(record.sequence)
            self._ready.append(Update(ticket, finish_reason="cancelled"))

    def step(self) -> list[Update]:
        """Admit, compute a call of prompt tiles and one of the decode step, and say what came of it."""
        if self._records:
            self.warm()  # before any clock runs: no rate and no wait of the counts holds compiling
        updates = {update.ticket: update for update in self._ready}
        self._ready = []
        plan = self.scheduler.plan()
        if plan.tiles or plan.decode:
            self._enter(plan)
            for update in self._carry_out(plan):
                updates[update.ticket] = update
        return list(updates.values())

    def run(self, requests: Iterable[Request], watch: run.Watch | None = None) -> Iterator[list[Result]]:
        """Decode all requests; see `run.run`."""
        return run.run(self, requests, watch)

    def _enter(self, plan: Plan) -> None:
        """Bring the table of rows up to the plan."""
        for sequence in self.scheduler.running:
            record = self._records[sequence.ticket]
            record.admitted = record.admitted or time.perf_counter()
            owner = (sequence.ticket, sequence.preempted)
            sampling, row = record.request.sampling, sequence.row
            if self._table.enter(row, owner, sampling, sequence.prompt) and needs_counts(sampling):
                # The others of a row that lost its pages are counted as they are fed again.
                self._device.begin_count(row, sequence.new[0] if sequence.new else steps.NO_TOKEN)
            if record.mask_W is not None:
                self._table.allow(row, record.mask_W)
            self._table.list_pages(sequence.row, sequence.pages)
        self._table.leave({sequence.row for sequence in self.scheduler.running})

    def _carry_out(self, plan: Plan) -> Iterator[Update]:
        """The calls of a plan, one look at what they gave, and the updates."""
        prompts = rows = None
        if plan.tiles:
            with self._stats.timed("prefill"):
                prompts = calls.prefill(
                    self._device,
                    self.options,
                    self._table,
                    plan.tiles,
                    score=any(self._records[t.sequence.ticket].prompt_logprobs for t in plan.tiles),
                    wanted=self._wants_logprobs(calls.starting(plan.tiles)),
                    shards=self._place.shards,
                )
                jax.block_until_ready(prompts)
        with self._stats.timed("decode"):
            drafting = self._drafting(plan)
            started = time.perf_counter()
            if plan.decode:
                rows = calls.decode(
                    self._device,
                    self.options,
                    self._table,
                    plan,
                    wanted=self._wants_logprobs(plan.decode),
                    until_one_ends=bool(self.scheduler.waiting),
                    drafting=drafting,
                )
                self._stats.decode_calls += 1
            prompts, rows = jax.device_get((prompts, rows))
        if rows is not None and self._pace is not None:
            self._keep_pace(plan, rows, drafting is not None, time.perf_counter() - started)
        if prompts is not None:
            yield from self._after_prompts(plan.tiles, prompts)
        if rows is not None:
            for sequence in plan.decode:
                yield from self._after_decode(sequence, rows.reason_B, rows.produced)

    def _drafting(self, plan: Plan) -> list[Sequence] | None:
        """The sequences that the next decode call drafts for, or None when it should not draft."""
        if self._pace is None:
            return None
        # What a guide allows after a draft is not known on the device.
        free = [s for s in plan.decode if self._records[s.ticket].request.guide is None]
        return free if free and self._pace.drafts_next() else None

    def _keep_pace(self, plan: Plan, rows: calls.RowsFound, drafted: bool, seconds: float) -> None:
        assert self._pace is not None
        gave_TB = np.asarray(rows.produced.token_TB) != steps.NO_TOKEN
        width = self.options.speculative + 1 if drafted else 1
        gave_nTB = gave_TB[: len(gave_TB) // width * width].reshape(-1, width, gave_TB.shape[1])
        live_nB = gave_nTB.any(axis=1)
        turns = int(live_nB.any(axis=1).sum())
        self._pace.took(drafted, seconds, turns, float(gave_nTB.sum() / max(int(live_nB.sum()), 1)))
        if rows.kept_2 is not None:
            self._stats.drafted += int(rows.kept_2[0])
            self._stats.accepted += int(rows.kept_2[1])

    def _wants_logprobs(self, sequences: list[Sequence]) -> bool:
        return any(self._records[s.ticket].request.sampling.logprobs is not None for s in sequences)

    def _after_prompts(self, tiles: list[Tile], found: calls.PromptsFound) -> Iterator[Update]:
        begin = calls.starting(tiles)
        places = calls.places(tiles, self.options, self._place.shards)
        for at, tile in zip(places, tiles, strict=True):
            sequence = tile.sequence
            record = self._records.get(sequence.ticket)
            if record is None:
                continue  # ended by an earlier tile
            scored = min(tile.stop + 1, len(sequence.prompt)) - tile.start - 1
            finite = bool(found.finite_B[at])
            if record.prompt_logprobs is not None and found.scored is not None:
                finite = finite and bool(found.scored[1][at, :scored].all())
            if not finite:
                where = f"prompt tokens {tile.start} to {tile.stop - 1}"
                yield self._end(record, "error", f"what the model gives for {where} is not finite")
                continue
            self.scheduler.prefilled(tile)
            self._stats.prefill_tokens += tile.stop - tile.start
            if record.prompt_logprobs is not None and found.scored is not None:
                count = record.request.sampling.prompt_logprobs
                for t in range(scored):
                    token = int(sequence.prompt[tile.start + t + 1])
                    new = entry(token, found.scored[0], (at, t), count or 0)
                    record.prompt_logprobs[tile.start + t + 1] = new
            if sequence.in_prompt:
                continue
            if sequence in begin and found.first is not None:
                yield from self._after_decode(sequence, *found.first)
            elif not sequence.max_new:
                yield self._end(record, "length")

    def _after_decode(
        self, sequence: Sequence, reason_B: np.ndarray, produced: steps.Produced
    ) -> Iterator[Update]:
        """Take the new tokens of a row."""
        record, row = self._records[sequence.ticket], sequence.row
        column = np.asarray(produced.token_TB)[:, row]
        times = np.flatnonzero(column != steps.NO_TOKEN).tolist()
        given = column[times].tolist()
        first = not sequence.new
        # The tokens of a row that lost its pages are known already, and were reported.
        again = 0 if first else sequence.length - 1 - sequence.written
        new = given[again:]
        # The first token comes from the prompt: nothing was written for it.
        self.scheduler.decoded(sequence, 0 if first else len(given), new)
        if first:
            self._stats.first_tokens += len(new)
        else:
            self._stats.decode_tokens += len(new)
        count, logprobs = record.request.sampling.logprobs, None
        if count is not None and produced.logprobs is not None:
            logprobs = [
                entry(token, produced.logprobs, (t, row), count)
                for t, token in zip(times[again:], new, strict=True)
            ]
        if first:
            self._stats.first_token_seconds.append(time.perf_counter() - record.admitted)
        reason, error = _REASONS.get(int(reason_B[row])), None
        if reason == "error":
            error = f"the logits after token {sequence.length} are not finite"
        if record.request.guide is not None and reason is None:
            reason, error = self._follow(record, new)
        if reason is not None:
            yield self._end(record, reason, error, new, logprobs)
        elif new:
            yield self._update(record, new, logprobs)

    def _follow(self, record: _Record, new: list[int]) -> tuple[str | None, str | None]:
        """Tell the guide of a row what came; how the row ends if the guide cannot go on."""
        guide = record.request.guide
        assert guide is not None
        try:
            for token in new:
                guide.accept(token)
            record.mask_W = guide.mask()
        except DataError as error:
            return "error", str(error)
        return None, None

    def _update(self, record: _Record, new: list[int], logprobs: list[Entry] | None) -> Update:
        """An update; the prompt's log-probabilities go with the first one."""
        prompt_logprobs, record.prompt_logprobs = record.prompt_logprobs, None
        if prompt_logprobs is not None:
            record.sequence.find_prefix = True  # they need not be computed again
        queue_seconds = prefill_seconds = None
        if not record.timed:
            record.timed = True
            queue_seconds = record.admitted - record.submitted
            prefill_seconds = time.perf_counter() - record.admitted
        return Update(
            record.sequence.ticket,
            new,
            logprobs,
            prompt_logprobs,
            cached_tokens=max(record.sequence.cached, 0),
            queue_seconds=queue_seconds,
            prefill_seconds=prefill_seconds,
        )

    def _end(
        self,
        record: _Record,
        reason: str,
        error: str | None = None,
        new: list[int] | None = None,
        logprobs: list[Entry] | None = None,
    ) -> Update:
        sequence = record.sequence
        del self._records[sequence.ticket]
        self.scheduler.remove(sequence)
        if logprobs is None and record.request.sampling.logprobs is not None:
            logprobs = []
        return dataclasses.replace(
            self._update(record, new or [], logprobs), finish_reason=reason, error=error
        )
