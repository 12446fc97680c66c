"""A signal to every process of a job ends no helper."""

from __future__ import annotations

import signal
import subprocess

import pytest

from dsv3_jax.parallel.helpers import helpers_keep_running

SIGNALS = [signal.SIGINT, signal.SIGTERM]
COMMAND = ["sh", "-c", 'kill -"$0" $$; echo alive']


@pytest.mark.parametrize("number", SIGNALS)
def test_a_helper_outlives_a_signal_from_its_first_moment(number: signal.Signals) -> None:
    with helpers_keep_running():
        helper = subprocess.run([*COMMAND, str(int(number))], capture_output=True)
    assert helper.stdout == b"alive\n" and helper.returncode == 0
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(SIGNALS)
    assert subprocess.run([*COMMAND, str(int(number))]).returncode == -number


def test_the_process_itself_gets_the_signal() -> None:
    got: list[int] = []
    old = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    try:
        with helpers_keep_running():
            signal.raise_signal(signal.SIGTERM)
            assert got == []
        assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, old)
