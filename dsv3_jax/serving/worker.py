"""The thread that owns the engine. Everything else talks to it through two queues and never touches the engine."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from dsv3_jax.errors import DataError
from dsv3_jax.inference.requests import Request


class Update(Protocol):
    """News about one sequence (dsv3_jax/inference)."""

    ticket: int
    token_ids: Sequence[int]
    logprobs: Sequence[Any] | None
    prompt_logprobs: Sequence[Any] | None
    finish_reason: str | None
    error: str | None
    cached_tokens: int
    queue_seconds: float | None
    prefill_seconds: float | None


class EngineLike(Protocol):
    """What the worker needs of an engine."""

    @property
    def idle(self) -> bool: ...

    @property
    def stats(self) -> Any: ...

    def warm(self) -> None: ...

    def submit(self, request: Request) -> int: ...

    def cancel(self, ticket: int) -> None: ...

    def step(self) -> list[Any]: ...


class Sink(Protocol):
    """Who waits for the news of one sequence. Called in the event loop's thread."""

    def accepted(self) -> None:
        """The engine has taken the request."""

    def refused(self, reason: str) -> None:
        """The engine cannot ever take it; nothing follows."""

    def update(self, update: Any) -> None:
        """New tokens or the end."""

    def failed(self) -> None:
        """The engine has crashed; nothing follows. May come twice."""


class Worker:
    """Runs the engine in a thread of its own.

    Requests and cancellations are taken before every step, so a cancelled sequence gives its pages back within one.
    News goes to the event loop once a step, in one call, and waits there for nobody: each sink merges its own.

    Attributes:
      ready: the engine is warm.
      failure: what ended the thread, if it was an exception.
      steps: engine steps so far.
      numbers: copies of the engine's statistics (see `read_stats`), at most a tenth of a second old.
    """

    def __init__(self, make_engine: Callable[[], Any], read_stats: Callable[[Any], dict[str, float]]) -> None:
        self._make_engine, self._read_stats = make_engine, read_stats
        self._inbox: queue.SimpleQueue[tuple[str, Any, Any]] = queue.SimpleQueue()
        self._tickets: dict[Sink, int] = {}
        self._sinks: dict[int, Sink] = {}
        self._out: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stop = False
        self._step_began: float | None = None
        self.ready = False
        self.failure: BaseException | None = None
        self.steps = 0
        self.numbers: dict[str, float] = {}
        self._numbers_at = 0.0

    # --- the event loop's side ----------------------------------------------------------------------------

    def start(self, on_ready: Callable[[], None], on_failure: Callable[[], None]) -> None:
        """Begin to load and warm the engine; both callbacks come in the loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._on_ready, self._on_failure = on_ready, on_failure
        self._thread.start()

    def submit(self, request: Request, sink: Sink) -> None:
        """Hand a request over; the sink hears `accepted` or `refused` first."""
        self._inbox.put(("submit", request, sink))
        if self.failure is not None:  # the thread may have looked into the inbox for the last time
            sink.failed()

    def cancel(self, sink: Sink) -> None:
        """End a sequence; the sink hears nothing more. Any number of times, also after its end."""
        self._inbox.put(("cancel", None, sink))

    def stop(self) -> None:
        """Let the thread end after its step."""
        self._stop = True
        self._inbox.put(("wake", None, None))

    def join(self, seconds: float) -> bool:
        """Wait for the thread to end; whether it did."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def stuck_for(self) -> float:
        """Seconds the present step has taken; 0 between steps and while the engine is loaded."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    # --- the engine's side --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            engine = self._make_engine()
            engine.warm()
            self._note(engine, force=True)
            self.ready = True
            self._call(self._on_ready)
            while not self._stop:
                self._take_inbox(engine)
                if not engine.idle:
                    self._step(engine)
                self._flush()
        except BaseException as error:
            self.failure = error
            self._out += [sink.failed for sink in self._tickets]
            while not self._inbox.empty():
                what, _, sink = self._inbox.get()
                self._out += [sink.failed] if what == "submit" else []
            self._flush()
            self._call(self._on_failure)

    def _take_inbox(self, engine: EngineLike) -> None:
        """Everything that waits; with nothing to do, the next thing that comes."""
        block = engine.idle and not self._out
        if block:
            self._note(engine, force=True)
        while True:
            try:
                what, request, sink = self._inbox.get(block=block)
            except queue.Empty:
                return
            block = False
            if what == "submit":
                self._submit(engine, request, sink)
            elif what == "cancel" and (ticket := self._tickets.pop(sink, None)) is not None:
                del self._sinks[ticket]
                engine.cancel(ticket)

    def _submit(self, engine: EngineLike, request: Request, sink: Sink) -> None:
        try:
            ticket = engine.submit(request)
        except DataError as error:
            reason = str(error)
            self._out.append(lambda: sink.refused(reason))
            return
        except BaseException:
            self._out.append(sink.failed)
            raise
        self._tickets[sink], self._sinks[ticket] = ticket, sink
        self._out.append(sink.accepted)

    def _step(self, engine: EngineLike) -> None:
        self._step_began = time.monotonic()
        updates = engine.step()
        self._step_began = None
        self.steps += 1
        for update in updates:
            sink = self._sinks.get(update.ticket)
            if sink is None:  # cancelled
                continue
            if update.finish_reason is not None:
                del self._sinks[update.ticket], self._tickets[sink]
            self._out.append(_bound(sink, update))
        self._note(engine)

    def _note(self, engine: EngineLike, force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self._numbers_at > 0.1:
            self._numbers_at = now
            self.numbers = {**self._read_stats(engine), "engine_steps": float(self.steps)}

    def _flush(self) -> None:
        if self._out:
            out, self._out = self._out, []
            self._call(lambda: _all(out))

    def _call(self, function: Callable[[], None]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)


def _bound(sink: Sink, update: Any) -> Callable[[], None]:
    return lambda: sink.update(update)


def _all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()
