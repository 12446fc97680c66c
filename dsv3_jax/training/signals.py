"""SIGTERM and SIGINT as a wish to stop."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from dsv3_jax.launch.local import SUPERVISED


class StopSignals:
    """SIGTERM and SIGINT ask for a stop after the current step; a second one ends the process at once.

    In a watched process the same signal within a second counts once: SLURM sends it to the watching process, which
    passes it on, and to this one.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._at = 0.0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        before, self._at = self._at, time.monotonic()
        if self.asked == name and SUPERVISED in os.environ and self._at - before < 1.0:
            return
        if self.asked:
            os.write(2, f"{name} again: ending now, without saving\n".encode())
            os._exit(128 + number)
        self.asked = name
        os.write(2, f"{name}: saving after this step (again: end now)\n".encode())
