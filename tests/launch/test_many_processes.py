"""A run of two processes with four devices each, started by `--launch local:2`: the same run as one process with eight,
stopped by a signal, resumed, and ended by the death of one process."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.checkpoint import steps_of, validate_step
from dsv3_jax.config import (
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    RunSection,
    TrainingConfig,
    dump_yaml,
    load_yaml,
    to_mapping,
)
from dsv3_jax.text import Tokenizer
from dsv3_jax.training.metrics import read_metrics
from dsv3_jax.training.prepare import prepare
from dsv3_jax.training.sources import Document
from dsv3_jax.training.trainer import train
from dsv3_jax.training.watchdog import Watchdog
from tests.training import tiny

pytestmark = pytest.mark.slow  # four processes start and compile

REPO = Path(__file__).resolve().parents[2]
STEPS = 20
MODEL = dataclasses.replace(
    tiny.MODEL,
    vocab_size=258,
    num_hidden_layers=2,
    num_nextn_predict_layers=0,
    bos_token_id=256,
    eos_token_id=(257,),
    initializer_range=0.05,
)


def _config(folder: Path, run: Path, steps: int) -> RunConfig:
    return RunConfig(
        model=MODEL,
        run=RunSection(dir=str(run)),
        data=DataConfig(source=str(folder / "shards")),
        training=TrainingConfig(
            steps=steps, batch_size=8, seq_len=16, remat="none", eval_every=STEPS, eval_batches=1
        ),
        # Constant: the pair's run has no end, and is to have the learning rates of one with 20 steps.
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=2, schedule="constant"),
        checkpoint=CheckpointConfig(every=100_000),
        logging=LoggingConfig(every=1),
        mesh=MeshConfig(data=2, fsdp=2, expert=2),
        seed=5,
    )


@dataclasses.dataclass
class Ended:
    """A launcher that has ended: its exit code, the lines it printed, seconds since the signal was sent."""

    code: int
    lines: list[str]
    seconds: float

    def __str__(self) -> str:
        return "\n".join([f"exit code {self.code} after {self.seconds:.1f} s", *self.lines])


def launch(config: Path, until: str, number: int, *, child: int | None = None) -> Ended:
    """Start two processes, send a signal at the first line that begins with `until`, wait for the end.

    The signal goes to the launcher, or to one of its processes.
    """
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = {**os.environ, "XLA_FLAGS": " ".join([*flags, "--xla_force_host_platform_device_count=4"])}
    command = [sys.executable, "train.py", "--launch", "local:2", "--config", str(config)]
    lines, sent = [], 0.0
    with subprocess.Popen(
        command, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        limit = threading.Timer(240, process.kill)  # its processes then end by themselves
        limit.start()
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if not sent and line.startswith(until):
                sent = time.monotonic()
                os.kill(process.pid if child is None else _children(process.pid)[child], number)
        limit.cancel()
    return Ended(process.returncode, lines, time.monotonic() - sent)


def _children(pid: int) -> list[int]:
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and the pair's config."""
    folder = tmp_path_factory.mktemp("pair")
    words = ["latent", "expert", "router", "token", "bias"]
    texts = [" ".join([*(words[(i * k) % 5] for k in range(1, 9)), str(i)]) for i in range(1, 60)]
    prepare(
        (Document(str(i), text) for i, text in enumerate(texts)),
        folder / "shards",
        Tokenizer.bytes(),
        val_fraction=0.2,
    )
    config = to_mapping(_config(folder, folder / "pair", 100_000))
    (folder / "pair.yaml").write_text(dump_yaml(config))
    return folder


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Ended:
    """The pair, told to stop after step 20."""
    return launch(folder / "pair.yaml", "[0] step 000020/", signal.SIGTERM)


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict[str, Any]]:
    """The records of one process with eight devices; how often the watchdog was told of a step is checked, too."""
    beats: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watchdog, "beat", lambda self: beats.append(1.0))
        assert train(_config(folder, folder / "alone", STEPS)) == 0
    assert len(beats) > STEPS
    return read_metrics(folder / "alone" / "metrics.jsonl")


def test_two_processes_train_as_one(folder: Path, stopped: Ended, alone: list[dict[str, Any]]) -> None:
    pair = read_metrics(folder / "pair" / "metrics.jsonl")[:STEPS]
    assert [record["step"] for record in pair] == list(range(1, STEPS + 1)), stopped
    # The same rows in the same step: the same tokens go to the same experts before anything was learned.
    assert pair[0]["expert_counts"].tolist() == alone[0]["expert_counts"].tolist()
    assert [record["tokens"] for record in pair] == [record["tokens"] for record in alone]
    # gloo adds in another order than one process does.
    for mine, theirs in zip(pair, alone, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5), mine["step"]
    assert pair[-1]["val_loss"] == pytest.approx(alone[-1]["val_loss"], rel=1e-5)
    assert len({record["loss"] for record in pair}) == STEPS


def test_a_signal_to_the_launcher_stops_both_after_the_same_step_saved(folder: Path, stopped: Ended) -> None:
    assert stopped.code == 0, stopped
    [step] = steps_of(folder / "pair")
    assert STEPS < step < STEPS + 40
    assert validate_step(folder / "pair" / "checkpoints" / str(step), hashes=True) == []
    assert [record["step"] for record in read_metrics(folder / "pair" / "metrics.jsonl")] == list(
        range(1, step + 1)
    )
    assert sum("SIGTERM: saving after this step" in line for line in stopped.lines) == 2
    assert any(
        line.endswith(f"step {step} is saved; start again on the same folder to go on")
        for line in stopped.lines
    )


def test_each_says_who_it_is_and_the_first_alone_tells_the_rest(folder: Path, stopped: Ended) -> None:
    who = [line for line in stopped.lines if " (flags): " in line]
    assert sorted(re.sub(r" on \S+|cpu:\d+", "", line) for line in who) == [
        "[0] process 0 of 2 (flags): , , ,  of 8 devices",
        "[1] process 1 of 2 (flags): , , ,  of 8 devices",
    ]
    assert not [line for line in stopped.lines if re.match(r"\[1\] (step|saved|run folder|report)", line)]


def test_the_run_folder_does_not_say_where_the_run_was(folder: Path, stopped: Ended) -> None:
    saved = load_yaml(folder / "pair" / "config.yaml")
    assert saved["distributed"] == to_mapping(DistributedConfig())
    names = {path.name for path in (folder / "pair").iterdir()} - {".lock"}
    assert names == {"config.yaml", "metrics.jsonl", "report.html", "tokenizer", "checkpoints"}


def test_resumed_and_then_a_process_is_killed(folder: Path, stopped: Ended) -> None:
    """The launcher ends soon, with the killed one's code and name; the run had gone on where it was saved."""
    [step] = steps_of(folder / "pair")
    ended = launch(folder / "pair.yaml", f"[0] step {step + 2:06d}/", signal.SIGKILL, child=1)
    assert ended.code == 128 + signal.SIGKILL, ended
    assert ended.seconds < 20, ended
    assert any(line == f"[0] resuming after step {step}" for line in ended.lines), ended
    assert any(line.startswith("error: process 1 was ended by SIGKILL") for line in ended.lines), ended
    assert steps_of(folder / "pair") == [step]
