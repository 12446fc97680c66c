"""`train.py --dry-run`: the command from end to end, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.cli import parse_run_config
from dsv3_jax.errors import ConfigError
from dsv3_jax.planning.command import Options, plan_run, stated_devices, take_options

REPO = Path(__file__).resolve().parents[2]
TINY = str(REPO / "configs" / "tiny.yaml")
# A model small enough that compiling takes seconds; 8 experts over 2 devices, so tokens travel.
SMALL = [
    "--config", TINY, "--dry-run", "--devices", "8", "--mesh.data", "4", "--mesh.fsdp", "1", "--mesh.expert", "2",
    "--training.batch_size", "8", "--training.seq_len", "32", "--training.remat", "full", "--model.dtype", "bfloat16",
    "--model.num_hidden_layers", "3", "--model.num_nextn_predict_layers", "0",
]  # fmt: skip


def command(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """train.py as a user starts it: no set-up of simulated devices in the environment."""
    env = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(
        [sys.executable, str(REPO / "train.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=env,
        timeout=600,
    )


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict, list[str]]:
    """Text, JSON and files left by a dry run on 8 simulated devices."""
    folder = tmp_path_factory.mktemp("plan")
    result = command([*SMALL, "--hardware", "H200", "--output", "plan.json"], folder)
    assert result.returncode == 0, result.stderr
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return result.stdout, json.loads((folder / "plan.json").read_text()), left


def test_a_dry_run_plans_the_step_of_the_mesh(planned: tuple[str, dict, list[str]]) -> None:
    text, plan, _ = planned
    assert plan["mesh"] == {"data": 4, "fsdp": 1, "expert": 2, "tensor": 1} and plan["devices"] == 8
    assert plan["memory"]["fits"] and plan["hardware"] == "H200" and plan["knobs"] == []
    need = plan["memory"]
    parts = ("parameters", "optimizer", "other", "batch", "gradients", "copies", "activations", "workspace")
    assert sum(need[part] for part in parts) == need["peak"] == max(need["phases"].values())
    assert (
        need["parameters"] + need["optimizer"] + need["other"] + need["batch"]
        == plan["argument_bytes_compiled"]
    )
    assert 0 < plan["times"]["bound"] < plan["times"]["expected"] <= plan["times"]["exposed"]
    assert 0 < plan["model_flops_per_device"] < plan["executed_flops_per_device"]
    for word in ("FITS", "4 x fsdp 1 x expert 2", "Expected time", "MFU", "all-gather over 4"):
        assert word in text


def test_no_bfloat16_figure_of_the_cpu_is_given(planned: tuple[str, dict, list[str]]) -> None:
    assert "temporary_bytes_compiled" not in planned[1]


def test_experts_travel_once_a_step(planned: tuple[str, dict, list[str]]) -> None:
    """Over data alone: the bfloat16 copies of this device's experts come, their float32 gradients go. Dense weights are
    cut over the expert axis: groups of 2."""
    model = parse_run_config(["--config", TINY]).model
    layers, here = 2, model.n_routed_experts // 2
    experts = layers * here * 3 * model.hidden_size * model.moe_intermediate_size
    rows = planned[1]["collectives"]
    assert rows["all-gather over 4"]["bytes"] == experts * 2 * 3 // 4
    assert rows["reduce-scatter over 4"]["bytes"] == experts * 4 * 3 // 4


def test_a_dry_run_leaves_only_its_output(planned: tuple[str, dict, list[str]]) -> None:
    assert planned[2] == ["plan.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "h1000"], "--hardware is 'h1000'; did you mean 'h100'"),
        (["--devices", "0"], "--devices is '0'; expected a number of 1 or more"),
        (["--devices"], "--devices needs a value"),
        (["--output", "plan.png"], "expected a name that ends in .html, .svg or .json"),
        (["--output", "nowhere/plan.svg"], "there is no folder"),
    ],
)
def test_wrong_flags_are_told(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        take_options(["--dry-run", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "8", "--mesh.data", "3"], "= 6 devices; expected 8"),
        (["--devices", "4", "--mesh.expert", "3", "--mesh.fsdp", "1"], "= 3 devices; expected 4"),
        (["--devices", "3", "--training.batch_size", "3"], "not divisible by the mesh axes fsdp = 3"),
        (["--devices", "8"], "training.batch_size is 4; expected a multiple of 8 devices"),
        (["--devices", "8", "--mesh.preset", "64gpu"], "= 64 devices; expected 8"),
    ],
)
def test_what_does_not_fit_together_is_told(arguments: list[str], message: str) -> None:
    options, rest = take_options(["--config", TINY, "--dry-run", *arguments])
    assert options is not None
    with pytest.raises(ConfigError, match=message):
        plan_run(options, parse_run_config(rest))


def test_an_error_is_one_line_and_exit_2(tmp_path: Path) -> None:
    result = command(["--config", TINY, "--dry-run", "--devices", "8", "--mesh.data", "3"], tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: mesh: ") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_flags_of_the_run_pass_through() -> None:
    options, rest = take_options(["--config", "c", "--dry-run", "--devices=8", "--mesh.data", "2"])
    assert options == Options(8, "h100", None) and rest == ["--config", "c", "--mesh.data", "2"]
    assert take_options(["--config", "c", "--devices", "8"]) == (None, ["--config", "c", "--devices", "8"])


def test_devices_follow_from_the_mesh_keys() -> None:
    def devices(*flags: str) -> int:
        return stated_devices(parse_run_config(["--config", TINY, *flags]).mesh)

    assert devices() == 1
    assert devices("--mesh.data", "2", "--mesh.fsdp", "3") == 6
    assert devices("--mesh.preset", "2048gpu") == 2048
