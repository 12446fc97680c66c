"""Ends a process in which nothing finishes any more, after printing where every thread stands."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from dsv3_jax.errors import LOST


class Watchdog:
    """Within its block, `beat` must come more often than every `seconds`; else the process ends with exit code 75.

    `seconds` 0 never ends anything. It runs in a thread: a main thread that waits for a device lets it run.
    """

    def __init__(self, seconds: float, end: Callable[[int], object] = os._exit) -> None:
        """`end`: called with the exit code."""
        self.seconds, self._end = seconds, end
        self._last = time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        """Something finished."""
        self._last = time.monotonic()

    def __enter__(self) -> Watchdog:
        self.beat()
        if self.seconds:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while (left := self._last + self.seconds - time.monotonic()) > 0:
            if self._over.wait(left):
                return
        sys.stdout.flush()
        print(
            f"error: no step finished for {self.seconds / 60:g} minutes (training.watchdog_minutes); the stacks of all "
            "threads follow. Started again, the run goes on from its newest checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
        self._end(LOST)
