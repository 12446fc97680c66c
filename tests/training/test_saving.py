"""Which steps are kept: the newest, the best, and never none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3_jax.checkpoint import save_checkpoint, step_folder, steps_of
from dsv3_jax.config import CheckpointConfig
from dsv3_jax.errors import DataError
from dsv3_jax.training.saving import drop_old, read_best
from tests.golden import cases

CASE = cases.CASES["v2-lite"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step") / "1"
    save_checkpoint(folder, CASE.config, cases.variables(CASE))
    return folder


def add(run: Path, whole: Path, step: int) -> None:
    """A committed step (of links to the same files)."""
    folder = step_folder(run, step)
    folder.mkdir(parents=True)
    (folder / "manifest.json").hardlink_to(whole / "manifest.json")


def test_the_newest_steps_are_kept(tmp_path: Path, whole: Path) -> None:
    for step in (1, 2, 3, 4):
        add(tmp_path, whole, step)
        drop_old(tmp_path, CheckpointConfig(keep=2), step, None)
    assert steps_of(tmp_path) == [3, 4]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    drop_old(tmp_path, CheckpointConfig(keep=0), 4, None)
    assert steps_of(tmp_path) == [3, 4]


def test_a_step_without_a_manifest_counts_for_nothing_and_is_left_alone(tmp_path: Path, whole: Path) -> None:
    for step in (1, 2, 3):
        add(tmp_path, whole, step)
    for step in (2, 3):
        (step_folder(tmp_path, step) / "manifest.json").unlink()
    drop_old(tmp_path, CheckpointConfig(keep=1), 1, None)
    assert steps_of(tmp_path) == [1, 2, 3]  # 1 is the last verified step
    add(tmp_path, whole, 4)
    drop_old(tmp_path, CheckpointConfig(keep=1), 4, None)
    assert steps_of(tmp_path) == [2, 3, 4]


def test_the_step_that_was_just_saved_stays_even_if_newer_ones_exist(tmp_path: Path, whole: Path) -> None:
    for step in (2, 8, 9):
        add(tmp_path, whole, step)
    drop_old(tmp_path, CheckpointConfig(keep=1), 2, None)
    assert steps_of(tmp_path) == [2, 9]


def test_the_best_steps_are_kept_and_named(tmp_path: Path, whole: Path) -> None:
    cfg = CheckpointConfig(keep=1, keep_best=2)
    for step, loss in ((1, 3.0), (2, 2.5), (3, 2.75), (4, 2.5), (5, 4.0), (6, None)):
        add(tmp_path, whole, step)
        drop_old(tmp_path, cfg, step, loss)
    assert steps_of(tmp_path) == [2, 4, 6]
    record = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert record == {"best": 2, "val_loss": {"2": 2.5, "4": 2.5}}
    # A best step that was lost makes room for another.
    (step_folder(tmp_path, 2) / "manifest.json").unlink()
    add(tmp_path, whole, 7)
    drop_old(tmp_path, cfg, 7, 3.5)
    assert read_best(tmp_path) == {4: 2.5, 7: 3.5}
    (tmp_path / "checkpoints" / "best.json").write_text("[]")
    with pytest.raises(DataError, match="best steps"):
        read_best(tmp_path)


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path: Path, whole: Path) -> None:
    cfg = CheckpointConfig(keep=1, keep_best=1)
    for step, loss in ((1, float("nan")), (2, 2.5), (3, float("-inf"))):
        add(tmp_path, whole, step)
        drop_old(tmp_path, cfg, step, loss)
    assert steps_of(tmp_path) == [2, 3] and read_best(tmp_path) == {2: 2.5}
