"""Helper processes of a run, which outlive a wish to stop: SLURM and Ctrl-C signal every process of a job."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def helpers_keep_running() -> Iterator[None]:
    """Processes that this thread, or a thread it starts, starts inside never get SIGINT and SIGTERM.

    The signals are blocked from a process's first moment, before it could ignore them. This process still gets them:
    in another thread, or at the end of the block. A helper is ended by SIGKILL.
    """
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
