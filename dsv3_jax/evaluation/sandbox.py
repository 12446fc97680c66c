"""Runs programs that a model wrote, each in a child process that may do next to nothing.

What holds everywhere: a session of its own, no inherited files and environment, an empty folder as home and working
folder, limits on processor time, memory, file size, open files and processes (one), a wall clock, and an end for all
of it by kill. On Linux also, where the kernel lets an ordinary user make namespaces: no network, no other process to
reach, every file read-only but a scratch space of 64 MB. Started by root, the program is another user. What could not
be had is told (`Verdict.missing`). How a pass is told from a forged one: `sandbox_child`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsv3_jax.errors import ConfigError

_CHILD = Path(__file__).with_name("sandbox_child.py")
_MOST_OUTPUT = 1 << 16


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one program.

    Attributes:
      seconds: by the clock, starting the interpreter and all tests included; processor time is limited to one more.
      memory, file: bytes.
    """

    seconds: float = 10.0
    memory: int = 1 << 30
    file: int = 1 << 24


@dataclasses.dataclass(frozen=True)
class Program:
    """A solution and its tests.

    Attributes:
      program: the whole solution.
      entry_point: the function of it that is tested.
      test: defines `check(candidate)`, or asserts about the function by its name.
      prompt: what the solution began with; what it defines is the tests' too.
    """

    program: str
    entry_point: str
    test: str
    prompt: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
      outcome: "passed", "failed" (an assertion or an error), "ended" (the process went away), "timeout".
      missing: protection that this machine did not give.
    """

    outcome: str
    reason: str = ""
    missing: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all tests ran and held."""
        return self.outcome == "passed"


def run_program(program: Program, limits: Limits | None = None) -> Verdict:
    """Run one program against its tests; nothing of it is left when this returns."""
    limits = limits or Limits()
    word = secrets.token_hex(16)
    uid = 60_001 + secrets.randbelow(5000) if os.geteuid() == 0 else None
    first = {
        "program": program.program,
        "entry_point": program.entry_point,
        "seconds": limits.seconds,
        "memory": limits.memory,
        "file": limits.file,
        "uid": uid,
        "parent": os.getpid(),
    }
    second = {"test": program.test, "prompt": program.prompt, "word": word}
    with tempfile.TemporaryDirectory(prefix="dsv3-code-", ignore_cleanup_errors=True) as folder:
        if uid is not None:
            try:
                os.chown(folder, uid, uid)
            except OSError as error:  # a namespace whose root is the only user
                raise ConfigError(
                    f"programs cannot be run here: root cannot make user {uid} ({error.strerror}); run as another user"
                ) from None
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
            close_fds=True,
            start_new_session=True,
            bufsize=0,
        ) as process:
            return _Judgement(process, limits.seconds).carry_out(first, second)


class _Judgement:
    """One child process, from its first line to its end."""

    def __init__(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        self._process, self._until = process, time.monotonic() + seconds
        self._buffer = b""
        self._solution: int | None = None
        self._handle: int | None = None
        self._missing: tuple[str, ...] = ()

    def carry_out(self, first: dict[str, Any], second: dict[str, Any]) -> Verdict:
        """Tell both lines and read the verdict; kill what is there in the end, whatever happens."""
        try:
            self._tell(first)
            started = self._line()
            if started is None or started[0] != "started":
                return self._lost("the sandbox did not start")
            self._solution, self._missing = started[1], tuple(dict.fromkeys(started[2]))
            if hasattr(os, "pidfd_open"):  # kills that process and no other, also when its judge is gone
                with contextlib.suppress(OSError):
                    self._handle = os.pidfd_open(self._solution)
            self._tell(second)
            verdict = self._line()
            if verdict is None:
                return self._lost("the judge ended")
            outcome, reason = verdict
            if outcome == "passed":
                if reason != second["word"]:
                    return Verdict("ended", "a pass without the word", self._missing)
                return Verdict("passed", "", self._missing)
            # The solution's words may be no text: half of a surrogate pair, which no file could take.
            return Verdict(outcome, reason.encode(errors="replace").decode(), self._missing)
        finally:
            self._kill()

    def _tell(self, value: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        data = memoryview(json.dumps(value).encode() + b"\n")
        with contextlib.suppress(BrokenPipeError):  # told by the missing answer
            while data:
                data = data[self._process.stdin.write(data) or 0 :]

    def _line(self) -> list[Any] | None:
        """A line of the judge; None at its end, or at the end of the time."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = self._until - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return None
                piece = os.read(self._process.stdout.fileno(), 65536)
                if not piece or len(self._buffer) > _MOST_OUTPUT:
                    return None
                self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        value: list[Any] = json.loads(line)
        return value

    def _lost(self, reason: str) -> Verdict:
        if time.monotonic() >= self._until:
            return Verdict("timeout", "no verdict in time", self._missing)
        return Verdict("ended", reason, self._missing)

    def _kill(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            os.close(self._handle)
        # The solution is a child of the judge, which does not wait for it before its own end: its id is not free yet.
        elif self._solution is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self._solution, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


_GOOD = Program(
    "import fractions\ndef f(x):\n    return x + 1\n", "f", "def check(c):\n    assert c(1) == 2\n"
)
_BAD = dataclasses.replace(_GOOD, program="def f(x):\n    return x\n")


def check_sandbox() -> tuple[str, ...]:
    """Protection that this machine does not give.

    Raises ConfigError when the sandbox cannot tell right from wrong here: nothing is judged then.
    """
    good, bad = run_program(_GOOD, Limits(30)), run_program(_BAD, Limits(30))
    if not good.passed or bad.outcome != "failed":
        raise ConfigError(
            f"programs cannot be run here: a right one {good.outcome} ({good.reason}), a wrong one {bad.outcome} "
            f"({bad.reason}); if this is root, {sys.executable} and its library must be readable by every user"
        )
    return good.missing


def run_programs(
    programs: Sequence[Program],
    limits: Limits | None = None,
    done: Callable[[int, Verdict], None] | None = None,
    workers: int | None = None,
) -> list[Verdict]:
    """Verdicts in order, several programs at a time (by default half of the cores); `done` is told as they come."""
    workers = workers or max(1, (os.cpu_count() or 2) // 2)
    found: dict[int, Verdict] = {}
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(run_program, program, limits): at for at, program in enumerate(programs)}
        for future in concurrent.futures.as_completed(waiting):
            at = waiting[future]
            found[at] = future.result()
            if done is not None:
                done(at, found[at])
    return [found[at] for at in range(len(programs))]
