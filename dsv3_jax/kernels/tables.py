"""Two committed tables: where a kernel was shown correct on a device, and the tile parameters it takes there.

Both name devices by family ("H200"), kernels as the registry does, and shapes by class: what a kernel's
`shape_class` makes of its arguments, such as "q192-v128-bfloat16".

verified.json  {device: {kernel: {implementation: {shape class: {"error": .., "bound": .., "date": .., ..}}}}},
               written by `python -m benchmarks.gpu --record` after a run on that device.
tuning.json    {device: {program: {shape class: {parameter: value}}}}, written by `python -m benchmarks.tune`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dsv3_jax.kernels.shim import target

FOLDER = Path(__file__).resolve().parent
VERIFIED, TUNING = FOLDER / "verified.json", FOLDER / "tuning.json"

Tiles = TypeVar("Tiles", bound=tuple)


@functools.cache
def read(path: Path) -> Mapping[str, Any]:
    """A table, read once a process."""
    return json.loads(path.read_text(encoding="utf-8"))


def verified(kernel: str, implementation: str, device: str, shape_class: str) -> bool:
    """Whether a committed run on this device family shows this implementation correct for the class of shapes."""
    return shape_class in read(VERIFIED).get(device, {}).get(kernel, {}).get(implementation, {})


def tuned(program: str, shape_class: str, default: Tiles) -> Tiles:
    """The tile parameters of a kernel's program on the device being traced for.

    Args:
      program: a kernel, or one of the programs it consists of, such as "attention" or "attention_dkv".
      default: a NamedTuple that is right everywhere; returned where the table has no entry.

    Raises:
      ValueError: the entry names a parameter that `default` has not: table and kernel disagree.
    """
    watch = _watch.get()
    entry = read(TUNING).get(target().kind, {}).get(program, {}).get(shape_class, {})
    if watch is not None:
        watch.programs[program] = shape_class
        entry = watch.instead.get(program, entry)
    fields = default._fields  # type: ignore[attr-defined]
    unknown = sorted(set(entry) - set(fields))
    if unknown:
        raise ValueError(f"{TUNING.name}: {program} {shape_class} has {unknown}; known: {', '.join(fields)}")
    return default._replace(**entry)  # type: ignore[attr-defined]


@dataclasses.dataclass
class Watch:
    """What a trace asked of the tables, and what it is answered instead (`watching`).

    Attributes:
      instead: tile parameters by program, instead of the table's.
      kernels: (kernel, implementation) -> shape class, of each implementation with one that was chosen.
      programs: program -> shape class, of each that asked for tile parameters.
    """

    instead: Mapping[str, Mapping[str, Any]]
    kernels: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    programs: dict[str, str] = dataclasses.field(default_factory=dict)


_watch: contextvars.ContextVar[Watch | None] = contextvars.ContextVar("watch", default=None)


@contextlib.contextmanager
def watching(instead: Mapping[str, Mapping[str, Any]] | None = None) -> Iterator[Watch]:
    """For benchmarks: see which classes a trace asks for, and try other tile parameters.

    Trace anew inside (a new function to `jit`): what was traced before asks nothing.
    """
    watch = Watch(instead or {})
    token = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(token)


def chosen(kernel: str, implementation: str, shape_class: str) -> None:
    """Tell a surrounding `watching` which implementation was taken for which class."""
    watch = _watch.get()
    if watch is not None:
        watch.kernels[kernel, implementation] = shape_class
