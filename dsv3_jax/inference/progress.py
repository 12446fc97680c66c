"""Progress of a job on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import statistics
import sys
import time
from types import TracebackType

import rich.console
import rich.progress

from dsv3_jax.inference.stats import Stats

PLAIN_SECONDS = 10.0
"""Between two plain lines."""


class Progress:
    """Shows how many prompts are done, tokens a second and the time left. Use as a context manager."""

    def __init__(self, total: int, already: int) -> None:
        self._total, self._done, self._started = total, already, time.monotonic()
        self._already, self._last = already, time.monotonic()
        self._bar: rich.progress.Progress | None = None
        if sys.stderr.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("prompts"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[speed]}"),
                rich.progress.TimeElapsedColumn(),
                rich.progress.TextColumn("{task.fields[left]}"),
                console=rich.console.Console(stderr=True),
            )
            self._task = self._bar.add_task("prompts", total=total, completed=already, speed="", left="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, finished: int, stats: Stats) -> None:
        """`finished` more prompts are done."""
        self._done += finished
        now = time.monotonic()
        run, seconds = self._done - self._already, now - self._started
        left = (
            f"{(self._total - self._done) * seconds / run:.0f} s left"
            if run and self._done < self._total
            else ""
        )
        new = stats.first_tokens + stats.decode_tokens
        speed = f"{new / max(seconds, 1e-9):.1f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, speed=speed, left=left)
        elif now - self._last >= PLAIN_SECONDS:
            self._last = now
            parts = [f"{self._done}/{self._total} prompts", f"{new} new tokens", speed, left]
            print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)


def summary(stats: Stats) -> str:
    """One line: tokens a second of prefill and decode, the median time to a first token, compiling apart."""

    def rate(tokens: int, seconds: float) -> str:
        return (
            f"{tokens:,} tokens at {tokens / seconds:,.1f} tokens/s" if tokens and seconds > 0 else "nothing"
        )

    waits = stats.first_token_seconds
    first = f"first token after {statistics.median(waits):.2f} s, " if waits else ""
    return (
        f"prefill {rate(stats.prefill_tokens, stats.prefill_seconds)}, "
        f"decode {rate(stats.decode_tokens, stats.decode_seconds)}, "
        f"{first}compiling {stats.compile_seconds:.1f} s ({stats.programs} programs)"
    )
