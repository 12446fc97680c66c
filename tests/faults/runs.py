"""Small real runs to be hurt: started, watched, ended at a chosen point, compared with one that nothing happened to."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3_jax.checkpoint import step_folder, steps_of, validate_step
from dsv3_jax.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    RunConfig,
    RunSection,
    TrainingConfig,
    dump_yaml,
    to_mapping,
)
from dsv3_jax.text import Tokenizer
from dsv3_jax.training.metrics import read_metrics
from dsv3_jax.training.prepare import prepare
from dsv3_jax.training.sources import Document
from tests.training import tiny

REPO = Path(__file__).resolve().parents[2]
STEPS, EVERY = 24, 3
MODEL = dataclasses.replace(
    tiny.MODEL,
    vocab_size=258,
    num_hidden_layers=2,
    num_nextn_predict_layers=0,
    bos_token_id=256,
    eos_token_id=(257,),
    initializer_range=0.05,
)


def make_data(folder: Path) -> Path:
    """Token shards of a few hundred made-up lines."""
    words = ["latent", "expert", "router", "token", "bias"]
    texts = [" ".join(words[(i * k) % 5] for k in range(1, 9)) + f" {i}" for i in range(1, 60)]
    prepare(
        (Document(str(i), text) for i, text in enumerate(texts)), folder, Tokenizer.bytes(), val_fraction=0.2
    )
    return folder


def config(data: Path, run: Path, keep: int = 3, **training: Any) -> RunConfig:
    """A run of 24 steps that saves every third."""
    values = dict(steps=STEPS, batch_size=8, seq_len=16, remat="none", eval_batches=1, spike_guard=50.0)
    return RunConfig(
        model=MODEL,
        run=RunSection(dir=str(run)),
        data=DataConfig(source=str(data)),
        training=TrainingConfig(**(values | training)),
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=6),
        checkpoint=CheckpointConfig(every=EVERY, keep=keep),
        logging=LoggingConfig(every=1),
        seed=5,
    )


class Started:
    """`python train.py` on a config, with its output as it comes."""

    def __init__(self, cfg: RunConfig) -> None:
        file = Path(f"{cfg.run.dir}.yaml")
        file.write_text(dump_yaml(to_mapping(cfg)))
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "train.py", "--config", str(file)],
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def until(self, happened: Callable[[], bool]) -> bool:
        """Wait for something; False when the process ended before."""
        while not happened():
            if self.process.poll() is not None:
                return False
            time.sleep(0.0005)
        return True

    def said(self, start: str, count: int = 1) -> bool:
        return sum(line.startswith(start) for line in self.lines) >= count

    def end(self, number: int | None = None) -> int:
        """Send a signal, if one is given, and wait; the exit code."""
        if number is not None and self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


def torn_steps(run: Path) -> list[str]:
    """Steps in the folder of which a byte is wrong: there must never be one after a kill."""
    return [
        problem
        for step in steps_of(run)
        for problem in validate_step(step_folder(run, step), hashes=True)[:1]
    ]


def leftovers(run: Path) -> list[str]:
    """What a killed writer left in checkpoints/."""
    folder = run / "checkpoints"
    return sorted(path.name for path in folder.glob(".*")) if folder.is_dir() else []


def differences(run: Path, whole: Path, step: int = STEPS) -> list[str]:
    """Where the last step (weights, biases, moments, data position, guard) or the metrics of two runs differ."""
    have, want = (step_folder(folder, step) for folder in (run, whole))
    found = []
    for part in ("weights", "optimizer"):
        files = sorted(path.relative_to(want) for path in (want / part).rglob("c.*") if path.is_file())
        files += sorted(path.relative_to(want) for path in (want / part).rglob("c") if path.is_file())
        assert len(files) > 30, files
        for file in files:
            if not (have / file).is_file() or (have / file).read_bytes() != (want / file).read_bytes():
                found.append(str(file))
    if (have / "train_state.json").read_bytes() != (want / "train_state.json").read_bytes():
        found.append("train_state.json")

    def lines(folder: Path) -> list[dict[str, Any]]:
        timed = {"tokens_per_s", "seconds", "tflops", "mfu", "mem_gib"}
        records = read_metrics(folder / "metrics.jsonl")
        for one in records:
            one["expert_counts"] = one["expert_counts"].tolist()  # compared as a whole
        return [{key: value for key, value in one.items() if key not in timed} for one in records]

    if lines(run) != lines(whole):
        found.append("metrics.jsonl")
    return found


MOMENTS = ("compile", "step", "save", "delete")


def kill_once(cfg: RunConfig, moment: str, rng: random.Random, first_step_s: float) -> dict[str, Any]:
    """Start a run and kill it -9 at a random point of `moment`; what was found in its folder."""
    run = Path(str(cfg.run.dir))
    started = Started(cfg)
    folder = run / "checkpoints"

    def hidden(removed: bool) -> bool:
        names = os.listdir(folder) if folder.is_dir() else []
        return any(name.startswith(".") and name.endswith("-removed") == removed for name in names)

    lines = rng.randint(1, 2 * EVERY)
    triggers: dict[str, tuple[Callable[[], bool], float]] = {
        "compile": (lambda: any("compiling the step" in line for line in started.lines), first_step_s),
        "step": (lambda: started.said("step ", lines), 0.03),
        "save": (lambda: started.said("step ", 1) and hidden(False), 0.3),
        "delete": (lambda: started.said("step ", 1) and hidden(True), 0.004),
    }
    trigger, spread = triggers[moment]
    delay = rng.random() * spread
    reached = started.until(trigger)
    time.sleep(delay)
    left = leftovers(run)
    code = started.end(signal.SIGKILL)
    return {
        "moment": moment,
        "delay_s": round(delay, 4),
        "killed": reached and code == -signal.SIGKILL,
        "steps": steps_of(run),
        "left": sorted({"removed" if name.endswith("-removed") else "writing" for name in left}),
        "torn": torn_steps(run),
    }


def seconds_to_first_step(started: Started) -> float:
    """From the line about compiling to the first step's."""
    started.until(lambda: any("compiling the step" in line for line in started.lines))
    begun = time.monotonic()
    started.until(lambda: started.said("step "))
    return time.monotonic() - begun
