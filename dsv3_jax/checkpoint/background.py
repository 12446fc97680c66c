"""One job at a time in a thread; its error is raised in the caller's, never lost."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs jobs one after the other, each in its own thread, which the process does not outlive.

    An error of a job is raised once, by the next of `check`, `start` and `wait`.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether an error is waiting to be raised."""
        return self._error is not None

    def check(self) -> None:
        """Raises the error of a job that has failed."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def start(self, job: Callable[[], object], name: str) -> None:
        """Run `job` in the background. A job that still runs is waited for; if that failed, `job` is not run."""
        self.wait()

        def run() -> None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001  raised in the caller's thread
                self._error = error

        self._thread = threading.Thread(target=run, name=name)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing runs any more. Raises the error of a job that has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()
