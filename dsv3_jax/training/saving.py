"""Checkpoints of a run: a snapshot while the step waits, all else in the background, old steps dropped."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optax

from dsv3_jax.checkpoint import Background, read_manifest, snapshot_checkpoint, step_folder, steps_of
from dsv3_jax.config import CheckpointConfig, RunConfig
from dsv3_jax.errors import DataError
from dsv3_jax.parallel import processes
from dsv3_jax.training.guards import guard_to_json
from dsv3_jax.training.run_folder import HF, TOKENIZER, write_whole
from dsv3_jax.training.step import State

MOMENTS = ("count", "mu", "nu")
BEST = (
    "best.json"  # in checkpoints/: {"best": step, "val_loss": {step: loss}} of the steps that are kept for it
)
Say = Callable[[str], None]


class Saver:
    """Writes the checkpoints of a run, one at a time.

    A step appears in checkpoints/ when every byte of it is on the disk; only then are older ones dropped. An error of
    a save is raised by the next `check`, `save` or `wait`.
    """

    def __init__(self, run: Path, cfg: RunConfig, say: Say, adapter: Mapping[str, Any] | None = None) -> None:
        """`adapter`: what a LoRA run's checkpoints say about its pairs and their base."""
        self._run, self._cfg, self._say, self._adapter = run, cfg, say, adapter
        self._jobs = Background()
        self.saved = False

    @property
    def failed(self) -> bool:
        return self._jobs.failed

    def check(self) -> None:
        """Raises the error of a save that has failed."""
        self._jobs.check()

    def wait(self) -> None:
        """Return when the last step that was given to `save` is in its place. Raises its error."""
        self._jobs.wait()

    def save(
        self,
        state: State,
        train_state: dict[str, Any],
        *,
        before: Callable[[], None],
        val_loss: float | None = None,
    ) -> None:
        """Save a state; returns when the state may be overwritten. Every process of the run calls it.

        Args:
          before: called before the step appears (what is to be on the disk first).
          val_loss: held-out loss, for `checkpoint.keep_best`.
        """
        self._jobs.wait()
        run, cfg, step = self._run, self._cfg, int(train_state["step"])
        snapshot = snapshot_checkpoint(
            cfg.model,
            {"params": state.params, "router": state.router if self._adapter is None else {}},
            step=step,
            optimizer={name: optax.tree_utils.tree_get(state.opt_state, name) for name in MOMENTS},
            train_state={**train_state, "guard": guard_to_json(state.guard)},
            tokenizer_dir=run / TOKENIZER if (run / TOKENIZER).is_dir() else None,
            hf_dir=run / HF if (run / HF).is_dir() else None,
            adapter=self._adapter,
            copy=cfg.checkpoint.asynchronous,
        )

        def commit() -> None:
            before()
            snapshot.commit(step_folder(run, step))
            if processes().first:
                drop_old(run, cfg.checkpoint, step, val_loss)
            self.saved = True
            self._say(f"saved {step_folder(run, step)}")

        self._jobs.start(commit, f"checkpoint {step}")
        if not cfg.checkpoint.asynchronous:
            self._jobs.wait()


def drop_old(run: Path, cfg: CheckpointConfig, step: int, val_loss: float | None) -> None:
    """Remove steps that need not be kept, after `step` was committed.

    Kept are: that step, which has just been verified; the newest `cfg.keep` with a valid manifest; the best
    `cfg.keep_best` by held-out loss. A folder without a valid manifest is left to the next restore, which sets it
    aside.
    """
    whole = [number for number in steps_of(run) if _has_manifest(step_folder(run, number))]
    best: list[int] = []
    if cfg.keep_best:
        losses = {number: loss for number, loss in read_best(run).items() if number in whole}
        if val_loss is not None and math.isfinite(val_loss):
            losses[step] = val_loss
        best = sorted(losses, key=lambda number: (losses[number], number))[: cfg.keep_best]
        record = {"best": best[0] if best else None, "val_loss": {str(n): losses[n] for n in best}}
        write_whole(step_folder(run, step).parent / BEST, json.dumps(record, indent=1) + "\n")
    if cfg.keep:
        kept = {step, *whole[-cfg.keep :], *best}
        for number in whole:
            if number not in kept:
                _remove(step_folder(run, number))


def read_best(run: Path) -> dict[int, float]:
    """Held-out loss of the steps that are kept for it; {} where none is recorded."""
    file = run / "checkpoints" / BEST
    if not file.is_file():
        return {}
    try:
        return {int(step): float(loss) for step, loss in json.loads(file.read_text())["val_loss"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: not a record of the best steps ({error!r})") from None


def _has_manifest(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except DataError:
        return False
    return True


def _remove(folder: Path) -> None:
    # First out of sight, so that a kill in the middle leaves no half of a step.
    doomed = folder.with_name(f".{folder.name}.writing-removed")
    folder.rename(doomed)
    shutil.rmtree(doomed)
