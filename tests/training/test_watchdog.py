"""A process in which nothing finishes ends with 75 and its stacks; signals that SLURM sends twice count once."""

from __future__ import annotations

import os
import signal
import time

import pytest

from dsv3_jax.training.trainer import StopSignals
from dsv3_jax.training.watchdog import Watchdog


def a_step_that_hangs(codes: list[int]) -> None:
    until = time.monotonic() + 10
    while not codes and time.monotonic() < until:
        time.sleep(0.01)


def test_it_ends_a_process_that_hangs_and_shows_where(capfd: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    with Watchdog(0.2, codes.append):
        a_step_that_hangs(codes)
    assert codes == [75]
    printed = capfd.readouterr().err
    assert "no step finished for 0.00333333 minutes (training.watchdog_minutes)" in printed
    assert "in a_step_that_hangs" in printed and "Started again, the run goes on" in printed


def test_it_lets_go_on_what_beats(capfd: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    with Watchdog(0.5, codes.append) as watchdog:
        for _ in range(10):
            time.sleep(0.1)
            watchdog.beat()
    time.sleep(0.6)  # over: nobody beats, nobody is ended
    with Watchdog(0, codes.append):
        time.sleep(0.1)
    assert codes == [] and capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("watched", "pause", "ended"), [(True, 0.0, []), (True, 2.0, [143]), (False, 0.0, [143])]
)
def test_the_same_signal_at_once_counts_once_in_a_watched_process(
    watched: bool, pause: float, ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    if watched:
        monkeypatch.setenv("DSV3_SUPERVISED", "1")
    else:
        monkeypatch.delenv("DSV3_SUPERVISED", raising=False)
    clock = time.monotonic()
    with StopSignals() as signals:
        monkeypatch.setattr(time, "monotonic", lambda: clock)
        os.kill(os.getpid(), signal.SIGTERM)
        clock += pause
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.asked == "SIGTERM" and codes == ended
