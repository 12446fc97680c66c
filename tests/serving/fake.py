"""A stand-in for the engine (same interface, no model), and servers around it in processes of their own.

The fake answers every prompt with its own ids backwards, BOS left out, a token a step and row, and then the end; its
log-probabilities follow from the ids. Pages, rows and waiting are counted as the real one does.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dsv3_jax.errors import DataError
from dsv3_jax.inference.requests import Request

REPO = Path(__file__).resolve().parents[2]
MODEL = "fake"


@dataclasses.dataclass
class Update:
    """As in dsv3_jax.inference."""

    ticket: int
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[Any] | None = None
    prompt_logprobs: list[Any] | None = None
    finish_reason: str | None = None
    error: str | None = None
    cached_tokens: int = 0
    queue_seconds: float | None = None
    prefill_seconds: float | None = None


def entry(index: int, count: int) -> dict[str, Any]:
    """A log-probability that depends on the id, and the `count` ids after it."""
    top = [[(index + k) % 256, -0.5 - index / 256 - k] for k in range(count)]
    return {"token_id": index, "logprob": -0.5 - index / 256, "top": top}


class FakeEngine:
    """Rows, pages and a queue; see the module."""

    def __init__(
        self,
        rows: int = 4,
        pages: int = 65,
        page_size: int = 16,
        context: int = 1024,
        delay: float = 0.0,
    ) -> None:
        self.options = SimpleNamespace(
            context=context, pages=pages, page_size=page_size, rows=rows, cache_dtype="fp8"
        )
        self.delay = delay
        self.crash_on: bytes | None = b"CRASH"
        self.waiting: list[int] = []
        self.running: dict[int, int] = {}
        self.requests: dict[int, tuple[Request, list[int]]] = {}
        self.tickets = 0
        self.steps = 0
        self.produced: dict[int, int] = {}
        self.cancelled: list[Update] = []

    def warm(self) -> None:
        """Nothing to compile."""

    def expert_counts(self) -> Any:
        """Two layers of four experts."""
        return np.asarray([[self.steps, 0, self.steps, 2 * self.steps], [self.steps] * 4])

    def _pages(self, request: Request) -> int:
        return -(-(len(request.ids) + request.sampling.max_new_tokens) // self.options.page_size)

    @property
    def pages_used(self) -> int:
        """Pages that running sequences own."""
        return sum(self.running.values())

    @property
    def idle(self) -> bool:
        """Nothing to do."""
        return not self.requests and not self.cancelled

    @property
    def stats(self) -> Any:
        """As the engine's."""
        return SimpleNamespace(
            running=len(self.running),
            waiting=len(self.waiting),
            pages_used=self.pages_used,
            pages_cached=0,
            pages_total=self.options.pages - 1,
            prefix_hit_tokens=0,
            preemptions=0,
            cache_token_bytes=656,
            drafted=10,
            accepted=7,
        )

    def submit(self, request: Request) -> int:
        """Queue."""
        if self._pages(request) > self.options.pages - 1:
            raise DataError("too large for the cache")
        data = bytes(int(i) for i in request.ids if i < 256)
        if self.crash_on is not None and self.crash_on in data:
            raise RuntimeError("the fake engine was told to crash")
        self.tickets += 1
        answer = [int(index) for index in request.ids if index < 256][::-1]
        self.requests[self.tickets] = (request, answer)
        self.waiting.append(self.tickets)
        return self.tickets

    def cancel(self, ticket: int) -> None:
        """Free at once."""
        if ticket in self.requests:
            self._drop(ticket)
            self.cancelled.append(Update(ticket, finish_reason="cancelled"))

    def _drop(self, ticket: int) -> None:
        del self.requests[ticket]
        self.produced.pop(ticket, None)
        self.running.pop(ticket, None)
        if ticket in self.waiting:
            self.waiting.remove(ticket)

    def step(self) -> list[Update]:
        """A token for every row."""
        time.sleep(self.delay)
        self.steps += 1
        while self.waiting and len(self.running) < self.options.rows:
            pages = self._pages(self.requests[self.waiting[0]][0])
            if self.pages_used + pages > self.options.pages - 1:
                break
            self.running[self.waiting.pop(0)] = pages
        updates, self.cancelled = self.cancelled, []
        return updates + [self._advance(ticket) for ticket in list(self.running)]

    def _advance(self, ticket: int) -> Update:
        request, answer = self.requests[ticket]
        sampling = request.sampling
        produced = self.produced.get(ticket, 0)
        update = Update(ticket, logprobs=None if sampling.logprobs is None else [])
        if produced == 0 and sampling.prompt_logprobs is not None:
            rest = [entry(int(index), sampling.prompt_logprobs) for index in request.ids[1:]]
            update.prompt_logprobs = [None, *rest]
        if produced == 0:
            update.queue_seconds, update.prefill_seconds = 0.25, 0.5
        if produced < sampling.max_new_tokens and produced < len(answer):
            update.token_ids = [answer[produced]]
            if sampling.logprobs is not None:
                update.logprobs = [entry(answer[produced], sampling.logprobs)]
            self.produced[ticket] = produced = produced + 1
        if produced >= sampling.max_new_tokens:
            update.finish_reason = "length"
        elif produced >= len(answer):
            update.finish_reason = "stop"
        if update.finish_reason is not None:
            self._drop(ticket)
        return update


class Process:
    """A server in a process, on a free port."""

    def __init__(self, command: list[str], env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=REPO,
            env={**os.environ, "PYTHONPATH": str(REPO), **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("ready http://"):
            self.process.wait(30)
            raise RuntimeError(f"no ready line: {line!r}; {self.error_text()}")
        self.url = line.split()[1]
        self.host, port = self.url.removeprefix("http://").rsplit(":", 1)
        self.port = int(port)

    def error_text(self) -> str:
        """What the process wrote to stderr, at its end."""
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """End it, whatever state it is in."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def rss(self) -> int:
        """Bytes of memory the process holds."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def running(*flags: str, env: dict[str, str] | None = None) -> Iterator[Process]:
    """A server over the fake engine; `flags` are those of `main` below."""
    server = Process([sys.executable, "-m", "tests.serving.fake", *flags], env)
    try:
        yield server
    finally:
        server.close()


def _broken() -> FakeEngine:
    raise DataError("the checkpoint is damaged")


def main() -> int:
    """The process: --name value pairs for Settings; delay, rows, pages, context for the engine; broken 1
    (then it cannot be loaded)."""
    from dsv3_jax.serving.chat import ChatTemplate
    from dsv3_jax.serving.command import serve
    from dsv3_jax.serving.service import ServedModel
    from dsv3_jax.serving.settings import Settings
    from dsv3_jax.text import Tokenizer

    given = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    flags: dict[str, Any] = {
        name.removeprefix("--").replace("-", "_"): value for name, value in given.items()
    }
    engine = {name: int(flags.pop(name)) for name in ("rows", "pages", "context") if name in flags}
    delay = float(flags.pop("delay", 0.0))
    key, broken = flags.pop("api_key", None), bool(flags.pop("broken", 0))
    numbers = {name: float(value) if "." in value else int(value) for name, value in flags.items()}
    settings = Settings(model_id=MODEL, api_key=key, rows=engine.get("rows", 4), **numbers)
    tokenizer = Tokenizer.bytes()
    model = ServedModel(tokenizer, 258, 256, ChatTemplate(tokenizer))
    return serve(
        model,
        settings,
        _broken if broken else lambda: FakeEngine(delay=delay, **engine),
        host="127.0.0.1",
        port=0,
        context=engine.get("context", 1024),
    )


if __name__ == "__main__":
    from dsv3_jax.errors import run_main

    run_main(main)
