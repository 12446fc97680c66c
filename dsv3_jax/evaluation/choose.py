"""`--tasks` to tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_jax.config import nearest
from dsv3_jax.errors import ConfigError
from dsv3_jax.evaluation.code import Code, CodeOptions
from dsv3_jax.evaluation.packages import NAMED
from dsv3_jax.evaluation.records import Row, Spec, read_rows, read_spec
from dsv3_jax.evaluation.tasks import ExactMatch, MultipleChoice, Perplexity, Task

KINDS = ("perplexity", "multiple_choice", "exact_match", "code")
SHOWN = f"{', '.join(f'{kind}:FILE' for kind in KINDS)}, {', '.join(NAMED)}, or a task file FILE.yaml"


def choose_tasks(
    words: str,
    code: CodeOptions,
    *,
    shots: int | None = None,
    window: int | None = None,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Task]:
    """The tasks of a comma-separated list. Raises ConfigError and DataError for what cannot be, before any work.

    Args:
      shots, max_new_tokens: instead of what a task says.
      limit: only so many items of each, the first ones; examples are then of the others.
    """
    tasks: list[Task] = []
    for word in filter(None, (part.strip() for part in words.split(","))):
        spec, rows, examples = _read(word)
        changes = {"shots": shots, "max_new_tokens": max_new_tokens, "seed": seed or None}
        if spec.task in ("perplexity", "code"):
            changes["shots"] = None
        given: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
        spec = dataclasses.replace(spec, **given)
        if limit is not None and len(rows) > limit:
            examples = examples if examples is not None or not spec.shots else rows[limit:]
            rows = rows[:limit]
        tasks.append(_make(spec, rows, examples, code, window))
    if not tasks:
        raise ConfigError(f"--tasks is empty; expected {SHOWN}")
    names = [task.spec.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--tasks has two tasks of the name {name!r}; results are kept by name")
    return tasks


def _read(word: str) -> tuple[Spec, list[Row], list[Row] | None]:
    kind, colon, file = word.partition(":")
    if word in NAMED:
        return *NAMED[word](), None
    if word.endswith((".yaml", ".yml")):
        path = Path(word)
        if not path.is_file():
            raise ConfigError(f"--tasks {word}: no such file")
        spec = read_spec(path, KINDS)
        assert spec.data is not None
        examples = None if spec.shots_data is None else read_rows(spec.shots_data)
        return spec, read_rows(spec.data, text=spec.task == "perplexity"), examples
    if kind in KINDS and file:
        path = Path(file)
        return Spec(kind, f"{kind}:{path.stem}", path), read_rows(path, text=kind == "perplexity"), None
    if kind in KINDS:
        raise ConfigError(f"--tasks {word!r} names no file; expected {kind}:FILE")
    raise ConfigError(f"--tasks: unknown task {word!r}; {nearest(kind, [*KINDS, *NAMED])}; tasks are {SHOWN}")


def _make(
    spec: Spec, rows: Sequence[Row], examples: Sequence[Row] | None, code: CodeOptions, window: int | None
) -> Task:
    if spec.task == "perplexity":
        return Perplexity(spec, rows, window)
    if spec.task == "multiple_choice":
        return MultipleChoice(spec, rows, examples)
    if spec.task == "exact_match":
        return ExactMatch(spec, rows, examples)
    return Code(spec, rows, code)
