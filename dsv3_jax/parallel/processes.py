"""What the processes of one run tell each other on the host, through the coordination service of `jax.distributed`.

Nothing here touches a device: it may be called from any thread while a step runs. (A barrier made of a collective,
as in `multihost_utils`, would have to stand at the same place between the steps of every process.)
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from dsv3_jax.errors import StorageError, UserError, storage_error

T = TypeVar("T")
TIMEOUT_S = 3600.0  # a process that died is noticed much earlier, by the service's heartbeat
_STOP_AFTER = 3  # processes are at most one step apart, see `stop_at`


class Processes:
    """This process among those of the run. Values that are exchanged are JSON.

    index, count: number of this process and how many there are; first: whether it is number 0.
    """

    def __init__(self, index: int = 0, count: int = 1, client: Any = None) -> None:
        self.index, self.count, self._client = index, count, client
        self._turns: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._stop: int | None = None

    @property
    def first(self) -> bool:
        return self.index == 0

    def exchange(self, name: str, value: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """Every process's value, in the order of their numbers.

        All processes call it with the same name, and equally often for a name; calls with other names may run at the
        same time in other threads. Raises RuntimeError when a process does not answer in time or is gone.
        """
        if self.count == 1:
            return [value]
        with self._lock:
            self._turns[name] += 1
            turn = self._turns[name]
        key = f"dsv3_jax/{name}/{turn}"
        self._client.key_value_set(f"{key}/{self.index}", json.dumps(value))
        milliseconds = int(timeout_s * 1000)
        return [
            json.loads(self._client.blocking_key_value_get(f"{key}/{index}", milliseconds))
            for index in range(self.count)
        ]

    def together(self, name: str, work: Callable[[], T], timeout_s: float = TIMEOUT_S) -> list[T]:
        """Every process does its part; their results, once all have done it.

        If one of them fails, all raise: that one its own error, the others StorageError or RuntimeError naming it.
        """
        outcome: dict[str, Any] = {}
        failure: BaseException | None = None
        try:
            outcome["value"] = work()
        except Exception as error:
            if self.count == 1:
                raise
            failure = error
            storage = isinstance(error, StorageError) or storage_error(error) is not None
            user = isinstance(error, UserError)
            outcome = {"error": str(error) if user else repr(error), "storage": storage}
        outcomes = self.exchange(name, outcome, timeout_s)
        if failure is not None:
            raise failure
        for index, other in enumerate(outcomes):
            if "error" in other:
                message = f"process {index} of {self.count}: {other['error']}"
                raise StorageError(message) if other["storage"] else RuntimeError(message)
        return [other["value"] for other in outcomes]

    def stop_at(self, step: int, asked: bool) -> bool:
        """Whether all processes stop after `step`; each calls this once a step, after it has started the step.

        A process that is asked to stop names a step a little ahead, the first to do so for all. No process starts
        step t before its step t-2 has ended, which needs every process to have started that: so they are at most one
        step apart, and all read the name before they get there.
        """
        if self.count == 1:
            return asked
        if self._stop is None:
            name = "dsv3_jax/stop"
            found = self._peek(name)
            if found is None and asked:
                try:
                    self._client.key_value_set(name, str(step + _STOP_AFTER))
                except jax.errors.JaxRuntimeError:  # another process was quicker
                    pass
                found = self._client.blocking_key_value_get(name, 60_000)
            self._stop = None if found is None else int(found)
        return self._stop is not None and step >= self._stop

    def _peek(self, name: str) -> str | None:
        try:
            found: str = self._client.key_value_try_get(name)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise
        return found


_LONE = Processes()
_here: Processes | None = None


def processes() -> Processes:
    """The processes of this run: one, unless `jax.distributed` was initialised with more."""
    global _here
    if jax.process_count() == 1:
        return _LONE
    if _here is None:
        # The client has no public name yet; Orbax and others take it from here, too.
        from jax._src.distributed import global_state

        assert global_state.client is not None, "several processes without jax.distributed"
        _here = Processes(jax.process_index(), jax.process_count(), global_state.client)
    return _here
