"""Watched processes: one failure ends all soon, with its name and its exit code; signals and output pass through."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dsv3_jax.launch import Command, watch

REPO = Path(__file__).resolve().parents[2]
WORDS = "F1 client.h:80] Terminating process because the JAX distributed service detected fatal errors."
SLEEP = "import time; time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
ABORT = f"import os, sys; sys.stderr.write({WORDS!r} + '\\n'); sys.stderr.flush(); os.abort()"


def run(*programs: str, grace: float = 30.0) -> int:
    commands = [
        Command(f"process {index}", (sys.executable, "-c", program), os.environ, f"[{index}] ")
        for index, program in enumerate(programs)
    ]
    return watch(commands, grace=grace)


def test_all_well_is_zero_and_lines_carry_the_process(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("print('a'); print('b', end='')", "import sys; print('c', file=sys.stderr)") == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[0] a", "[0] b"] and err == "[1] c\n"


@pytest.mark.parametrize(
    ("program", "code", "words"),
    [
        ("raise SystemExit(65)", 65, "process 1 failed with exit code 65; stopping 1 other"),
        ("import os; os.kill(os.getpid(), 9)", 137, "process 1 was ended by SIGKILL"),
        ("import os; os.kill(os.getpid(), 11)", 139, "process 1 was ended by SIGSEGV"),
    ],
)
def test_one_that_fails_ends_the_others(
    program: str, code: int, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    assert run(SLEEP, program) == code
    assert time.monotonic() - began < 15
    assert words in capfd.readouterr().err


def test_one_that_does_not_listen_is_killed_after_the_grace_time(capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    # The second fails once the first has said that it ignores SIGTERM.
    assert run(STUBBORN, "import time; time.sleep(1.5); raise SystemExit(3)", grace=1.0) == 3
    assert time.monotonic() - began < 15
    assert "[0] up" in capfd.readouterr().out


def test_the_cause_counts_not_the_process_that_lost_its_peer(capfd: pytest.CaptureFixture[str]) -> None:
    lost_first = "import time; time.sleep(0.3); raise SystemExit(74)"
    assert run("raise SystemExit(75)", lost_first) == 74
    assert "process 1 failed with exit code 74" in capfd.readouterr().err


def test_an_abort_by_jax_is_said_in_plain_words(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(ABORT) == 75
    assert "process 0 ended because another process died or cannot be reached" in capfd.readouterr().err
    never = ABORT.replace("fatal errors.", "fatal errors. RegisterTask")
    assert run(never) == 2
    assert "process 0 ended because not all processes came together in time" in capfd.readouterr().err
    assert run("import os; os.abort()") == 134  # somebody else's abort


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    program = (
        "import signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: (print('saved', flush=True), sys.exit(0)))\n"
        "print('up', flush=True); time.sleep(60)"
    )

    timer = threading.Timer(1.5, os.kill, (os.getpid(), number))
    timer.start()
    assert run(program, program) == 0
    timer.join()
    assert sorted(capfd.readouterr().out.split()) == [
        "[0]",
        "[0]",
        "[1]",
        "[1]",
        "saved",
        "saved",
        "up",
        "up",
    ]


def test_when_the_watching_process_is_killed_the_others_are_asked_to_stop(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    child = (
        "import pathlib, signal, sys, time; from dsv3_jax.launch import follow_parent\n"
        f"signal.signal(15, lambda *_: (pathlib.Path({str(asked)!r}).touch(), sys.exit(0)))\n"
        "follow_parent(); print('up', flush=True); time.sleep(60)"
    )
    parent = (
        "import os, sys; from dsv3_jax.launch import Command, watch\n"
        f"watch([Command('process 0', (sys.executable, '-c', {child!r}), "
        "{**os.environ, 'DSV3_SUPERVISED': str(os.getpid())}, '[0] ')])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], cwd=REPO, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "[0] up\n"
        process.kill()
    until = time.monotonic() + 10
    while not asked.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert asked.exists()
