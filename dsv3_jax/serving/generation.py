"""The sequences of one HTTP request while they grow."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from dsv3_jax.inference.requests import Request
from dsv3_jax.serving.admission import Reservation
from dsv3_jax.serving.api_errors import ApiError, bad_request
from dsv3_jax.serving.metrics import Metrics
from dsv3_jax.serving.text import Delta, TextStream
from dsv3_jax.serving.worker import Worker

LOG = logging.getLogger("dsv3_jax.serving")


@dataclasses.dataclass
class News:
    """What a sequence has gained since it was last looked at."""

    deltas: list[Delta] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[Any] = dataclasses.field(default_factory=list)


class Choice:
    """One sequence. Text is made as tokens come, whether or not the client reads it: a stop string ends the work
    at once, and what waits for a slow client is the rest of one answer and no more.

    Attributes:
      index: of the choice in the response.
      token_ids, logprobs: all so far, cut after the token that completes a stop string.
      prompt_logprobs: of the prompt's tokens, if asked for.
      finish_reason: None while it grows.
    """

    def __init__(self, index: int, request: Request, text: TextStream, stream: bool) -> None:
        self.index, self.request, self.text = index, request, text
        self._stream = stream
        self.opened = False  # its first chunk was written
        self.token_ids: list[int] = []
        self.logprobs: list[Any] = []
        self.prompt_logprobs: Sequence[Any] | None = None
        self.cached_tokens = 0
        self.finish_reason: str | None = None
        self._news = News()
        self._owner: Generation | None = None
        self._first: float | None = None
        self._last: float | None = None

    def bind(self, owner: Generation) -> None:
        """Say who is told of news."""
        self._owner = owner

    @property
    def owner(self) -> Generation:
        """Who is told of news."""
        assert self._owner is not None, "a choice is used within a generation"
        return self._owner

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.ids)

    # --- called by the worker, in the event loop's thread --------------------------------------------------

    def accepted(self) -> None:
        """The engine has taken it."""
        self.owner.on_accepted()

    def refused(self, reason: str) -> None:
        """The engine can never take it."""
        self.finish_reason = "error"
        self.owner.on_refused(reason)

    def failed(self) -> None:
        """The engine is gone."""
        self.finish_reason = self.finish_reason or "error"
        self.owner.on_failed()

    def update(self, update: Any) -> None:
        """New tokens, or the end."""
        if self.finish_reason is not None:
            return
        if update.prompt_logprobs is not None:
            self.prompt_logprobs = update.prompt_logprobs
        self.cached_tokens = max(self.cached_tokens, update.cached_tokens or 0)
        if update.queue_seconds is not None and update.prefill_seconds is not None:
            self.owner.metrics.queue.observe(update.queue_seconds)
            self.owner.metrics.prefill.observe(update.prefill_seconds)
        before = self.text.consumed
        deltas = self.text.push(update.token_ids)
        kept = self.text.consumed - before
        self._time(kept)
        ids = [int(index) for index in update.token_ids[:kept]]
        entries = list(update.logprobs[:kept]) if update.logprobs else []
        self.token_ids += ids
        self.logprobs += entries
        if self._stream:
            self._news.deltas += deltas
            self._news.token_ids += ids
            self._news.logprobs += entries
        if self.text.finish_reason is not None and update.finish_reason is None:
            self.owner.worker.cancel(self)
        if update.finish_reason == "error":
            LOG.error("request %s, answer %d: %s", self.owner.request_id, self.index, update.error)
        if self.text.finish_reason is not None or update.finish_reason is not None:
            self.end(update.finish_reason or "stop")
        self.owner.wake()

    def end(self, reason: str) -> None:
        """Close the text; `reason` stands unless the text itself has a stronger one."""
        self._news.deltas += self.text.finish()
        self.finish_reason = self.text.final_reason(reason)
        now, metrics = time.monotonic(), self.owner.metrics
        metrics.finished.labels(self.finish_reason).inc()
        metrics.whole.observe(now - self.owner.began)
        if self._first is not None:
            metrics.decode.observe(now - self._first)

    def _time(self, new: int) -> None:
        if not new:
            return
        now, metrics = time.monotonic(), self.owner.metrics
        metrics.new_tokens.inc(new)
        if self._last is None:
            self._first = now
            metrics.first_token.observe(now - self.owner.began)
        else:
            for _ in range(new):
                metrics.inter_token.observe((now - self._last) / new)
        self._last = now

    # --- called by the response ----------------------------------------------------------------------------

    def take(self) -> News | None:
        """The news, or None without any; the end of a sequence is news once."""
        news = self._news
        if not (news.deltas or news.token_ids) and self.finish_reason is None:
            return None
        self._news = News()
        return news


class Generation:
    """All sequences of a request, from submission until they end, are timed out, or the client leaves.

    `close` must be called, whatever happens.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        worker: Worker,
        metrics: Metrics,
        reservation: Reservation,
        began: float,
        request_id: str = "",
    ) -> None:
        """`request_id`: what the log names."""
        self.choices, self.request_id = list(choices), request_id
        self.worker, self.metrics, self.began = worker, metrics, began
        self._reservation = reservation
        self._waiting = len(self.choices)
        self._event = asyncio.Event()
        self._refusal: str | None = None
        self._broken = False
        self._told: set[int] = set()
        for choice in self.choices:
            choice.bind(self)

    def on_accepted(self) -> None:
        """A choice was taken."""
        self._waiting -= 1
        self.wake()

    def on_refused(self, reason: str) -> None:
        """A choice can never be taken."""
        self._refusal = reason
        self.wake()

    def on_failed(self) -> None:
        """The engine is gone."""
        self._broken = True
        self.wake()

    def wake(self) -> None:
        """There is news."""
        self._event.set()

    def _check(self) -> None:
        if self._broken:
            raise ApiError(500, "the engine failed; the server is ending", code="engine_failed")
        if self._refusal is not None:
            raise bad_request(
                self._refusal, code="unsupported"
            )  # room was checked before: see `Service.size`

    async def start(self) -> None:
        """Submit, and wait until the engine has taken all. Raises the ApiError of one that it cannot take."""
        for choice in self.choices:
            self.worker.submit(choice.request, choice)
        while self._waiting:
            await self._event.wait()
            self._event.clear()
            self._check()
        self.metrics.prompt_tokens.inc(sum(choice.prompt_tokens for choice in self.choices))

    async def news(self) -> AsyncIterator[tuple[Choice, News]]:
        """News of the choices until all have ended; the last one of each comes with its `finish_reason`."""
        while len(self._told) < len(self.choices):
            for found in self.rest():
                yield found
            if len(self._told) < len(self.choices):
                await self._event.wait()
                self._event.clear()
                self._check()

    def rest(self) -> list[tuple[Choice, News]]:
        """The news that is there now."""
        found = []
        for choice in self.choices:
            if choice.index not in self._told and (news := choice.take()) is not None:
                if choice.finish_reason is not None:
                    self._told.add(choice.index)
                found.append((choice, news))
        return found

    async def finished(self) -> None:
        """Wait until all have ended."""
        while any(choice.finish_reason is None for choice in self.choices):
            await self._event.wait()
            self._event.clear()
            self._check()

    def expire(self, reason: str) -> None:
        """End what still grows."""
        for choice in self.choices:
            if choice.finish_reason is None:
                self.worker.cancel(choice)
                choice.end(reason)

    def close(self) -> None:
        """Cancel what still grows and give the reservation back."""
        for choice in self.choices:
            if choice.finish_reason is None:
                self.worker.cancel(choice)
                choice.finish_reason = "cancelled"
                self.metrics.finished.labels("cancelled").inc()
        self._reservation.release()
