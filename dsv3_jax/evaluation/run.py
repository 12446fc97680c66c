"""An evaluation from its tasks to its results; a run that was killed goes on with the items that it has."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import dsv3_jax
from dsv3_jax.errors import ConfigError
from dsv3_jax.evaluation import metrics
from dsv3_jax.evaluation.records import Record
from dsv3_jax.evaluation.subject import Subject
from dsv3_jax.evaluation.tasks import Task, agreement
from dsv3_jax.inference.partial import PartialFile

FORMAT = "dsv3_jax.evaluation/1"
PLAIN_SECONDS = 10.0


class Store:
    """Records by task and item: in memory, and in OUT.partial where there is an OUT."""

    def __init__(self, tasks: Sequence[Task], partial: PartialFile | None) -> None:
        self._partial = partial
        self._first = [sum(len(task.names) for task in tasks[:at]) for at in range(len(tasks))]
        self._names = [[_digest(name) for name in task.names] for task in tasks]
        self.records: list[dict[int, Record]] = [{} for _ in tasks]
        if partial is not None:
            for at, names in enumerate(self._names):
                for item, name in enumerate(names):
                    index = self._first[at] + item
                    if partial.done.get(index, ("",))[0] == name:
                        self.records[at][item] = partial.record(index)

    def add(self, at: int, item: int, record: Record) -> None:
        """Keep a record; on disk when this returns."""
        if self._partial is not None:
            self._partial.append([(self._first[at] + item, self._names[at][item], record)])
        self.records[at][item] = record


def evaluate(
    subject: Subject,
    tasks: Sequence[Task],
    partial: PartialFile | None = None,
) -> list[list[Record]]:
    """Records of every task's items, in order. Raises DataError naming an item's line."""
    store = Store(tasks, partial)
    for at, task in enumerate(tasks):
        todo = [item for item in range(len(task.names)) if item not in store.records[at]]
        total, begun, told = len(task.names), time.monotonic(), time.monotonic()
        if len(todo) < total:
            print(f"{task.spec.name}: {total - len(todo)} of {total} items are done", file=sys.stderr)

        def done(
            item: int, record: Record, at: int = at, name: str = task.spec.name, total: int = total
        ) -> None:
            nonlocal told
            store.add(at, item, record)
            if time.monotonic() - told >= PLAIN_SECONDS:
                told = time.monotonic()
                print(f"{name}: {len(store.records[at])}/{total} items", file=sys.stderr, flush=True)

        if todo:
            task.run(subject, todo, done)
        print(f"{task.spec.name}: {total} items in {time.monotonic() - begun:.1f} s", file=sys.stderr)
    return [[found[item] for item in sorted(found)] for found in store.records]


def results(
    tasks: Sequence[Task],
    records: Sequence[Sequence[Record]],
    about: Mapping[str, Any],
    *,
    items: bool = False,
    against: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The results as JSON; `items`: every record too; `against`: earlier results, after `check_against`."""
    found: dict[str, Any] = {"format": FORMAT, **about, "tasks": {}}
    for task, own in zip(tasks, records, strict=True):
        entry: dict[str, Any] = {
            "kind": task.spec.task,
            "items": len(own),
            "shots": task.spec.shots,
            "metrics": {
                name: {"value": metric.value, "stderr": metric.error}
                for name, metric in task.metrics(own).items()
            },
        }
        if task.missing:
            entry["sandbox_without"] = list(task.missing)
        compared = None if against is None else _against(task, own, against)
        if compared is not None:
            entry["against"] = compared
        if items:
            entry["data"] = _digest(repr(task.content))
            entry["records"] = [{"id": name, **record} for name, record in zip(task.names, own, strict=True)]
        found["tasks"][task.spec.name] = entry
    return found


def check_against(tasks: Sequence[Task], other: Mapping[str, Any]) -> None:
    """Raises ConfigError unless earlier results have the same items of every task; told before any work."""
    for task in tasks:
        name, theirs = task.spec.name, other.get("tasks", {}).get(task.spec.name, {})
        if "records" not in theirs:
            raise ConfigError(f"--against has no items of {name}; it must be a result of --items")
        same = [record.get("id") for record in theirs["records"]] == list(task.names)
        # Numbers as names are those of any file, so contents are compared too.
        if not same or (theirs.get("kind"), theirs.get("data")) != (
            task.spec.task,
            _digest(repr(task.content)),
        ):
            raise ConfigError(
                f"--against has other items of {name}; both must be of the same file and --limit"
            )
        try:
            for record in theirs["records"]:
                task.value(record)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ConfigError(f"--against: a record of {name} is not whole ({error})") from None


def _against(task: Task, own: Sequence[Record], other: Mapping[str, Any]) -> dict[str, Any] | None:
    """Paired difference of the items' values, and how many decisions are alike; None where tokens differ."""
    theirs = other["tasks"][task.spec.name]["records"]
    tokens = [[sum(record.get("window_tokens", [])) for record in records] for records in (own, theirs)]
    if tokens[0] != tokens[1]:
        print(
            f"note: {task.spec.name} is not compared: the other model cuts the texts into other tokens",
            file=sys.stderr,
        )
        return None
    change = metrics.difference([task.value(a) for a in own], [task.value(b) for b in theirs])
    entry: dict[str, Any] = {"difference": {"value": change.value, "stderr": change.error}}
    same = agreement(own, theirs)
    if same is not None:
        entry["agreement"] = {"value": same.value, "stderr": same.error}
    return entry


def table(found: Mapping[str, Any]) -> str:
    """The metrics for people."""
    rows = [("task", "items", "metric", "value", "std. error")]
    for name, task in found["tasks"].items():
        values = dict(task["metrics"])
        for key, value in task.get("against", {}).items():
            values[f"{key} (against)"] = value
        for metric, one in values.items():
            error = "" if one["stderr"] is None else f"{one['stderr']:.4f}"
            rows.append((name, str(task["items"]), metric, f"{one['value']:.4f}", error))
    widths = [max(len(row[at]) for row in rows) for at in range(5)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(lines)


def about(flags: Mapping[str, Any], seconds: float | None = None) -> dict[str, Any]:
    """Versions, device, date and what was asked for."""
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "dsv3_jax": dsv3_jax.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "flags": dict(flags),
    }
    if seconds is not None:
        found["seconds"] = round(seconds, 1)
    return found


def write(path: Path, found: Mapping[str, Any]) -> None:
    """The results under a name of their own, then renamed: never half a file."""
    writing = path.with_name(f".{path.name}.writing")
    with writing.open("w", encoding="utf-8") as file:
        json.dump(found, file, ensure_ascii=False, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(writing, path)


def fingerprint(identity: Any, tasks: Sequence[Task], flags: Mapping[str, Any]) -> dict[str, Any]:
    """What a run must have in common with the one that it continues."""
    return {
        "evaluation": FORMAT,
        "checkpoint": _digest(repr(identity)),
        "tasks": [[task.spec.name, _digest(repr(task.spec)), _digest(repr(task.names))] for task in tasks],
        "data": [_digest(repr(task.content)) for task in tasks],
        "settings": dict(flags),
        "software": [dsv3_jax.__version__, jax.__version__, jax.default_backend()],
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
