"""`--launch local:N`: the flag, the commands it makes, GPUs shared among them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from dsv3_jax.cli import parse_run_config
from dsv3_jax.errors import ConfigError
from dsv3_jax.launch import Member, detect, local_commands, supervised_command, take_launch
from dsv3_jax.launch.local import visible_gpus

TINY = str(Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml")


def test_the_flag_is_taken_in_both_spellings() -> None:
    assert take_launch(["--config", "x", "--launch", "local:2", "--seed", "1"]) == (
        ["--config", "x", "--seed", "1"],
        2,
    )
    assert take_launch(["--launch=local:8"]) == ([], 8)
    assert take_launch(["--config", "x"]) == (["--config", "x"], None)


@pytest.mark.parametrize("value", ["local", "local:0", "local:x", "slurm:2", "2"])
def test_other_values_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=rf"--launch is '{value}'; expected local:N"):
        take_launch(["--launch", value])


def test_a_missing_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="--launch needs a value"):
        take_launch(["--launch"])


def test_each_process_gets_its_place_and_the_users_environment() -> None:
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    commands = local_commands("train.py", ["--config", TINY, "--seed", "4"], 3, environment)
    assert [command.label for command in commands] == ["[0] ", "[1] ", "[2] "]
    members = []
    for command in commands:
        assert command.arguments[:2] == (sys.executable, "train.py")
        assert command.environment.items() >= environment.items()
        assert "CUDA_VISIBLE_DEVICES" not in command.environment
        cfg = parse_run_config(command.arguments[2:])
        assert cfg.seed == 4
        members.append(
            detect(cfg.distributed, {**command.environment, "SLURM_JOB_ID": "1", "SLURM_NTASKS": "9"})
        )
    address = members[0].coordinator if members[0] else None
    assert address is not None and address.startswith("127.0.0.1:")
    assert members == [Member("flags", index, 3, address, "deactivate", ()) for index in range(3)]


def test_gpus_are_shared_in_order() -> None:
    commands = local_commands("train.py", [], 2, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"})
    assert [command.environment["CUDA_VISIBLE_DEVICES"] for command in commands] == ["4,5", "6,7"]
    with pytest.raises(
        ConfigError, match=r"local:3: 4 GPUs are visible; expected a number of processes that divides"
    ):
        local_commands("train.py", [], 3, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"})


def test_gpus_are_counted_by_nvidia_smi_where_the_environment_does_not_say(tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\necho 'GPU 1: NVIDIA H100'\n")
    tool.chmod(0o755)
    assert visible_gpus({"PATH": str(tmp_path)}) == ["0", "1"]
    assert visible_gpus({"PATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}) == []
    assert visible_gpus({"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}) == []
    tool.write_text("#!/bin/sh\necho 'no driver' >&2; exit 9\n")
    assert visible_gpus({"PATH": str(tmp_path)}) == []


def test_a_watched_process_keeps_its_command_and_is_not_watched_again() -> None:
    command = supervised_command("train.py", ["--seed", "1"], Member("SLURM", 3, 8), {"SLURM_JOB_ID": "7"})
    assert command.arguments == (sys.executable, "train.py", "--seed", "1")
    assert command.environment == {"SLURM_JOB_ID": "7", "DSV3_SUPERVISED": str(os.getpid())}
    assert command.name == "process 3 of 8" and command.label == ""
