"""Work that process 0 does for all, or before all, and waiting for each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from dsv3_jax.errors import ConfigError, DataError, StorageError, UserError
from dsv3_jax.parallel.processes import processes

T = TypeVar("T")
_ALONE_S = (
    24 * 3600.0
)  # process 0 may tokenise or hash terabytes; if it dies the service's heartbeat ends the others


def from_first(name: str, make: Callable[[], T]) -> T:
    """What `make` returns in process 0 (as JSON can hold it), in every process, once it is there.

    A UserError of `make` is raised in all of them, so that all end with the same exit code.
    """
    group = processes()
    if group.count == 1:
        return make()
    if not group.first:
        told = group.exchange(name, None, _ALONE_S)[0]
        if "error" in told:
            kinds = {kind.exit_code: kind for kind in (ConfigError, DataError, StorageError)}
            raise kinds.get(told["code"], UserError)(f"process 0: {told['error']}")
        value: T = told["value"]
        return value
    try:
        value = make()
    except UserError as error:
        group.exchange(name, {"error": str(error), "code": error.exit_code})
        raise
    group.exchange(name, {"value": value})
    return value


def first_then_all(name: str, make: Callable[[], T]) -> T:
    """`make()` in process 0, then in all others, so that what it leaves on a shared disk is made once.

    Raises as `from_first` does.
    """
    if processes().count == 1:
        return make()
    kept: list[T] = []
    from_first(name, lambda: kept.append(make()))
    return kept[0] if kept else make()


def barrier(name: str) -> None:
    """Wait until every process is here."""
    processes().exchange(name, None)


def compiled_by_all(name: str, function: Any, *arguments: Any) -> Any:
    """A jitted function, compiled for these arguments in every process before one of them runs it.

    Compiling takes one process longer than another, and collectives between CPUs wait half a minute, no longer.
    """
    if processes().count == 1 or isinstance(function, jax.stages.Compiled):
        return function
    compiled = function.lower(*arguments).compile()
    barrier(f"compiled {name}")
    return compiled
