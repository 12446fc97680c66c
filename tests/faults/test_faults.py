"""A sample of the fault harness: the whole of it is `python -m tests.faults --full`."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dsv3_jax.checkpoint import load_checkpoint, step_folder, steps_of
from dsv3_jax.errors import storage_error
from dsv3_jax.parallel import make_mesh
from dsv3_jax.training.metrics import read_metrics
from dsv3_jax.training.restore import restore_step
from dsv3_jax.training.trainer import train
from tests.faults import inject, runs
from tests.faults.__main__ import damage_trial

SEED = 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train(runs.config(data, run)) == 0
    return run


def test_kills_while_saving_and_deleting_change_nothing(data: Path, whole: Path, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    cfg = runs.config(data, tmp_path / "run")
    # Saves at every step make deletions frequent; the last steps are the same.
    found = [runs.kill_once(cfg, moment, rng, 1.0) for moment in ("save", "delete")]
    assert all(one["torn"] == [] for one in found), found
    assert any(one["killed"] for one in found), found
    last = runs.Started(cfg)
    assert last.end() == 0, last.lines[-20:]
    assert runs.leftovers(tmp_path / "run") == []
    assert runs.differences(tmp_path / "run", whole) == []


def test_every_damage_is_found_and_the_newest_good_step_used(whole: Path, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    trials = [damage_trial(whole, tmp_path / str(i), rng, inject.DAMAGES[i % 7]) for i in range(21)]
    assert [one for one in trials if not one["right"]] == []


def test_the_older_step_is_restored_whole(data: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    inject.link_copy(whole, run)
    inject.damage(step_folder(run, runs.STEPS), "bit flip", random.Random(SEED))
    cfg, said = runs.config(data, run), list[str]()
    restored = restore_step(run, cfg, make_mesh(cfg.mesh), said.append)
    assert restored is not None and restored[1]["step"] == runs.STEPS - runs.EVERY
    want = load_checkpoint(step_folder(whole, runs.STEPS - runs.EVERY))
    jax.tree.map(np.testing.assert_array_equal, restored[0].params, want.variables["params"])
    assert int(restored[0].guard.count) == runs.STEPS - runs.EVERY and len(said) == 2


def _without(whole: Path, run: Path, steps: tuple[int, ...]) -> None:
    """A copy of a run as it was before these steps were saved."""
    shutil.copytree(whole, run)
    for step in steps:
        shutil.rmtree(step_folder(run, step))


def test_a_full_disk_ends_the_run_with_74_and_leaves_the_old_steps(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    _without(whole, run, (21, 24))
    with inject.FullDisk(after=37) as disk, pytest.raises(OSError, match="No space") as caught:
        train(runs.config(data, run))
    assert storage_error(caught.value) is not None  # `run_main` makes it 74
    assert disk.refused and steps_of(run) == [18] and runs.leftovers(run) == []
    assert runs.torn_steps(run) == []
    assert train(runs.config(data, run)) == 0
    assert runs.differences(run, whole) == []


@pytest.fixture(scope="module")
def poisoned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with values that are not finite in warm-up (2), later (20), and in a step that is saved (21)."""
    run = tmp_path_factory.mktemp("runs") / "poisoned"
    with inject.not_finite_at((2, 20, 21)):
        assert train(runs.config(data, run)) == 0
    return run


def test_nothing_that_is_not_finite_is_applied_or_saved(poisoned: Path) -> None:
    records = read_metrics(poisoned / "metrics.jsonl")
    assert [record["step"] for record in records if record["skipped"]] == [2, 20, 21]
    assert [record["step"] for record in records if record["loss"] is None] == [2, 20, 21]
    for step in steps_of(poisoned):
        loaded = load_checkpoint(step_folder(poisoned, step))
        assert inject.all_finite(loaded.variables)
        state: Any = loaded.train_state
        assert state["guard"]["count"] == step - (1 if step < 20 else 3)
    moments = [np.fromfile(path, np.float32) for path in poisoned.rglob("optimizer/state/mu*/c.*")]
    assert len(moments) > 10 and all(np.isfinite(one).all() for one in moments)


def test_a_run_goes_on_from_a_step_that_was_not_finite_with_the_same_bits(
    data: Path, poisoned: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    _without(poisoned, run, (24,))
    assert train(runs.config(data, run)) == 0
    assert runs.differences(run, poisoned) == []
