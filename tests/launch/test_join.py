"""Real processes that join without a launcher, as SLURM starts them: what each says and gives back when one fails."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from dsv3_jax.launch.join import lost_peer
from dsv3_jax.launch.local import free_port

REPO = Path(__file__).resolve().parents[2]


def start(job: str, count: int = 2, patience: int = 60) -> list[tuple[int, str]]:
    """Exit code and everything printed, for each process."""
    address = f"127.0.0.1:{free_port()}"
    flags = " ".join(
        flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag
    )  # one device each
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(REPO)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.launch.member", job, address, str(index), str(patience)],
            cwd=REPO,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]
    try:
        printed = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, printed, strict=True)]


def test_processes_say_who_they_are_and_agree() -> None:
    (code0, first), (code1, second) = start("agree")
    assert (code0, code1) == (0, 0), first + second
    assert "process 0 of 2 on " in first and "(flags): cpu:0 of 2 devices" in first
    assert "process 1 of 2 on " in second and " of 2 devices" in second


@pytest.mark.parametrize("victim", [0, 1], ids=["the coordinator", "another"])
def test_a_killed_process_ends_the_other_with_75_and_plain_words(victim: int) -> None:
    began = time.monotonic()
    ended = start(f"kill {victim}")
    assert time.monotonic() - began < 40  # the other would sleep for 60 seconds
    assert ended[victim][0] == 137 and "was ended by SIGKILL" in ended[victim][1]
    code, printed = ended[1 - victim]
    assert code == 75, printed
    assert (
        f"error: process {1 - victim} of 2 ended because another process died or cannot be reached" in printed
    )


def test_an_error_of_the_first_is_that_of_all() -> None:
    (code0, first), (code1, second) = start("refuse")
    assert (code0, code1) == (2, 2), first + second
    assert "error: process 0 of 2: no such thing" in first
    assert "error: process 1 of 2: process 0: no such thing" in second


def test_a_process_whose_peers_never_come_ends_with_2() -> None:
    [(code, printed)] = start("agree", count=1, patience=2)
    assert code == 2 and "process 0 of 2 ended because not all processes came together in time" in printed


def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "tests.launch.member", "agree", address, "0", "5"]
        ended = subprocess.run(
            command,
            cwd=REPO,
            env={**os.environ, "DSV3_SUPERVISED": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert ended.returncode == 2, ended.stderr
    assert "error: process 0 of 2 (flags) cannot listen on port" in ended.stderr
    assert "Address already in use; expected a port that is free on its host" in ended.stderr


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (
            jax.errors.JaxRuntimeError(
                "UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]"
            ),
            True,
        ),
        (
            jax.errors.JaxRuntimeError(
                "INTERNAL: NCCL operation ncclAllReduce failed: remote process exited"
            ),
            True,
        ),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes"), False),
        (ValueError("Gloo"), False),
    ],
)
def test_errors_that_mean_a_lost_process(error: Exception, lost: bool) -> None:
    assert lost_peer(error) == lost
