"""Several processes save into one folder and restore from it: the same bits, the same step, one failure for all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from dsv3_jax.checkpoint import load_checkpoint, step_folder, validate_step
from dsv3_jax.training.step import abstract_state
from tests.checkpoint import worker
from tests.training import tiny

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder that two processes of two devices leave, and what each of them found."""
    folder = tmp_path_factory.mktemp("run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={worker.DEVICES}",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    command = [sys.executable, "-m", "tests.checkpoint.worker"]
    started = [
        subprocess.Popen(
            [*command, str(index), str(port), str(folder)],
            cwd=REPO,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(worker.COUNT)
    ]
    outputs = [process.communicate(timeout=500)[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return folder, [json.loads((folder / f"found-{i}.json").read_text()) for i in range(worker.COUNT)]


def test_what_two_processes_wrote_is_one_checkpoint(run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = run
    assert all(one["devices"] == 4 and one["local"] == 2 and one["steps"] == [1, 2] for one in found)
    step = step_folder(folder, 1)
    assert validate_step(step, hashes=True) == []
    want = abstract_state(worker.CFG, tiny.mesh())
    loaded = load_checkpoint(step, {"params": want.params, "router": want.router})
    plain = ocp.load(
        step / "weights",
        jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            loaded.variables,
        ),
    )
    for tree in (loaded.variables, plain):
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            name = f".{path[0].key}{jax.tree_util.keystr(path[1:])}"
            np.testing.assert_array_equal(leaf, worker.value_of(name, leaf.shape, leaf.dtype), err_msg=name)


def test_a_full_disk_in_one_process_fails_the_save_in_all(run: tuple[Path, list[dict[str, Any]]]) -> None:
    _, found = run
    assert [one["full"] for one in found] == ["StorageError", "OSError"]
    assert [one["after"] for one in found] == [["1", "2"], ["1", "2"]]  # no third step, nothing half-written


def test_all_processes_restore_the_same_older_step(run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = run
    for one in found:
        assert one["restored"] == 1 and one["same"]
        assert any("checkpoint 2 is damaged and set aside as 2.corrupt" in line for line in one["said"])
    assert (folder / "checkpoints" / "2.corrupt").is_dir()


def test_a_stop_asked_of_one_process_stops_all_after_the_same_step(
    run: tuple[Path, list[dict[str, Any]]],
) -> None:
    _, found = run
    assert found[0]["stopped"] == found[1]["stopped"] == 8
