"""The command: flags to a run, a table and results."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from dsv3_jax.checkpoint.atomic import make_parent
from dsv3_jax.checkpoint.layout import RUN_CONFIG
from dsv3_jax.config import parse_kernels
from dsv3_jax.config.files import load_yaml
from dsv3_jax.errors import ConfigError
from dsv3_jax.evaluation import run
from dsv3_jax.evaluation.choose import choose_tasks
from dsv3_jax.evaluation.code import CodeOptions
from dsv3_jax.evaluation.flags import Flags
from dsv3_jax.evaluation.sandbox import Limits
from dsv3_jax.evaluation.subject import Model
from dsv3_jax.inference import Sampling
from dsv3_jax.inference.batch import Job
from dsv3_jax.inference.partial import PartialFile

WARNING = (
    "warning: --run-code runs programs that a model wrote on this machine. They are kept in a sandbox, which may have "
    "holes; use a machine that holds nothing of worth"
)
_NOT_THE_RUN = ("out", "items", "against", "force")
"""Flags that say what becomes of records, not what they are."""


def evaluate(flags: Flags) -> int:
    """Run the tasks of the flags; the exit code. Raises ConfigError and DataError before or between items."""
    if flags.checkpoint is None:
        raise ConfigError("--checkpoint DIR is missing")
    for name, low in (("limit", 1), ("shots", 0), ("window", 2), ("max_new_tokens", 1), ("seed", 0)):
        value = getattr(flags, name)
        if value is not None and value < low:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; expected {low} or more")
    if not 0 < flags.code_seconds <= 3600:
        raise ConfigError(f"--code-seconds is {flags.code_seconds}; expected above 0, 3600 at most")
    if flags.out is not None:
        if flags.out.is_dir() or (flags.out.exists() and not flags.force):
            raise ConfigError(f"--out {flags.out} exists; give --force to replace it")
        make_parent(flags.out)
    against = None if flags.against is None else _read(flags.against)
    code = CodeOptions(
        run_code=flags.run_code,
        samples=flags.samples,
        temperature=flags.temperature,
        top_p=flags.top_p,
        seed=flags.seed,
        limits=Limits(seconds=flags.code_seconds),
    )
    tasks = choose_tasks(
        flags.tasks,
        code,
        shots=flags.shots,
        window=flags.window,
        max_new_tokens=flags.max_new_tokens,
        limit=flags.limit,
        seed=flags.seed,
    )
    if against is not None:
        run.check_against(tasks, against)
    if any(task.spec.task == "code" for task in tasks):
        print(WARNING, file=sys.stderr)
    job = Job(
        flags.checkpoint,
        Sampling(temperature=flags.temperature, top_p=flags.top_p, seed=flags.seed),
        batch_size=flags.batch_size,
        dtype=flags.dtype,
        page_size=flags.page_size,
        pages=flags.pages,
        kernels=parse_kernels(flags.kernels),
        speculative=flags.speculative,
        quantize=flags.quantize,
        mesh=flags.mesh,
        adapter=flags.adapter,
    )
    opened = job.open()
    subject = Model(job, opened, chat=flags.chat)
    if flags.window is None and any(task.spec.task == "perplexity" for task in tasks):
        print(window_note(flags.checkpoint, subject.context), file=sys.stderr)
    shown = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(flags).items()
        if key not in _NOT_THE_RUN
    }
    begun = time.monotonic()
    if flags.out is None:
        records = run.evaluate(subject, tasks)
        found = run.results(tasks, records, run.about(shown, time.monotonic() - begun), against=against)
    else:
        with PartialFile(
            flags.out, run.fingerprint(opened.identity, tasks, shown), force=flags.force
        ) as partial:
            if partial.note:
                print(f"note: {partial.note}", file=sys.stderr)
            records = run.evaluate(subject, tasks, partial)
            found = run.results(
                tasks, records, run.about(shown, time.monotonic() - begun), items=flags.items, against=against
            )
            run.write(flags.out, found)
            partial.path.unlink()
    print(run.table(found))
    return 0


def window_note(checkpoint: Path, context: int) -> str:
    """That texts are read in windows of the whole context, and what a run folder says it was trained on."""
    note = f"note: texts are read in windows of {context} tokens, the model's context"
    for folder in (
        checkpoint,
        *checkpoint.absolute().parents[1:2],
    ):  # a run, or a step in its checkpoints folder
        if (folder / RUN_CONFIG).is_file():
            training = load_yaml(folder / RUN_CONFIG).get("training")
            trained = training.get("seq_len") if isinstance(training, dict) else None
            if isinstance(trained, int) and trained < context:
                return (
                    f"{note}; it was trained on {trained} tokens at a time, so expect a perplexity that is too high: "
                    f"give --window {trained}"
                )
    return f"{note} (--window: fewer, such as it was trained on)"


def _read(path: Path) -> dict[str, Any]:
    """Earlier results."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--against {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--against {path}: not valid JSON ({error})") from None
    if not isinstance(found, dict) or found.get("format") != run.FORMAT:
        raise ConfigError(f"--against {path}: not results of this command (format {run.FORMAT})")
    return found
