"""Starting processes and watching them: their output, their signals, their end.

One that fails ends the others, soon and with a message, and its exit code is that of the whole. What JAX's
coordination service prints when it aborts a process is said again in plain words.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import IO, BinaryIO

from dsv3_jax.errors import LOST, ConfigError
from dsv3_jax.launch.local import Command

GRACE = 10.0  # seconds from SIGTERM to SIGKILL for the others of a process that failed
SETTLE = 1.0  # seconds in which failures count as one: the cause may be seen after its consequence

# Words of JAX's coordination service (on stderr, before it aborts the process) and what they mean.
_ABORT = b"JAX distributed service detected fatal errors"
_NEVER_CAME = b"RegisterTask"


class Child:
    """A started process and the threads that read what it prints."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.process = subprocess.Popen(
            command.arguments,
            env=dict(command.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if command.label else None,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C comes to the watching process alone, which passes it on
        )
        self.aborted = self.never_joined = False

    def follow(self, exits: queue.Queue[Child]) -> None:
        """Pass the output on and report the end to `exits`, both in threads."""
        readers = [
            threading.Thread(target=self._copy, args=(self.process.stderr, sys.stderr.buffer), daemon=True)
        ]
        if self.process.stdout is not None:
            readers.append(
                threading.Thread(
                    target=self._copy, args=(self.process.stdout, sys.stdout.buffer), daemon=True
                )
            )

        def wait() -> None:
            self.process.wait()
            for reader in readers:
                reader.join(timeout=SETTLE)  # a grandchild may hold the pipe open
            exits.put(self)

        for thread in (*readers, threading.Thread(target=wait, daemon=True)):
            thread.start()

    def _copy(self, source: IO[bytes], target: BinaryIO) -> None:
        label = self.command.label.encode()
        with source:
            for line in source:
                if _ABORT in line:
                    self.aborted = True
                if self.aborted and _NEVER_CAME in line:
                    self.never_joined = True
                with _output:
                    target.write(label + line if line.endswith(b"\n") else label + line + b"\n")
                    target.flush()

    @property
    def code(self) -> int:
        """The exit code as a shell would give it; an abort by JAX's coordination service has ours."""
        code = self.process.returncode
        if self.aborted and code == -signal.SIGABRT:
            return ConfigError.exit_code if self.never_joined else LOST
        return 128 - code if code < 0 else code

    def how(self) -> str:
        """How it ended, for a message."""
        code = self.process.returncode
        if self.aborted and code == -signal.SIGABRT:
            if self.never_joined:
                return (
                    "ended because not all processes came together in time; expected all of them to be started with "
                    "the same coordinator address and number of processes, and to reach process 0 there"
                )
            return (
                "ended because another process died or cannot be reached; the one that stopped first says why. Started "
                "again, the run goes on from its newest checkpoint"
            )
        if code == -signal.SIGKILL:
            return "was ended by SIGKILL (from outside, or the machine ran out of memory)"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"

    def send(self, number: int) -> None:
        """Send a signal, if it still runs; SIGKILL goes to whatever it started as well."""
        if self.process.returncode is None:
            try:
                if number == signal.SIGKILL:
                    os.killpg(self.process.pid, number)
                else:
                    self.process.send_signal(number)
            except ProcessLookupError:
                pass  # it ended just now


_output = threading.Lock()


def watch(commands: Sequence[Command], *, grace: float = GRACE) -> int:
    """Start the commands and watch them until all have ended; the exit code.

    SIGTERM and SIGINT are passed on to all. When one fails, the others get SIGTERM, and SIGKILL after `grace` seconds.
    The exit code is 0 when all gave 0, else that of the first that failed by itself (128 + N for signal N): of
    processes that fail within a second, one that only lost another process is not the first.
    """
    exits: queue.Queue[Child] = queue.Queue()
    children: list[Child] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        for child in children:
            child.send(number)

    old = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for command in commands:
            children.append(Child(command))
        for child in children:
            child.follow(exits)
        return _until_all_ended(exits, len(children), children, grace)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        for child in children:  # only if this function fails
            child.send(signal.SIGKILL)


def _until_all_ended(exits: queue.Queue[Child], running: int, children: Sequence[Child], grace: float) -> int:
    failed: list[Child] = []
    while running and not failed:
        child = exits.get()
        running -= 1
        if child.code:
            failed.append(child)
    if not failed:
        return 0
    deadline = time.monotonic() + SETTLE
    while running and (left := deadline - time.monotonic()) > 0:
        try:
            child = exits.get(timeout=left)
        except queue.Empty:
            break
        running -= 1
        if child.code:
            failed.append(child)
    first = next((child for child in failed if child.code != LOST), failed[0])
    message = f"error: {first.command.name} {first.how()}"
    stopped = running
    _say(f"{message}; stopping {stopped} other{'s' if stopped > 1 else ''}" if stopped else message)
    for child in children:
        child.send(signal.SIGTERM)
    deadline = time.monotonic() + grace
    while running:
        try:
            exits.get(timeout=max(deadline - time.monotonic(), 0.0))
            running -= 1
        except queue.Empty:
            for child in children:
                child.send(signal.SIGKILL)
            deadline = time.monotonic() + grace
    if stopped:
        _say(message)  # again below whatever the others had to say
    return first.code


def _say(text: str) -> None:
    with _output:
        sys.stderr.buffer.write(text.encode() + b"\n")
        sys.stderr.flush()
