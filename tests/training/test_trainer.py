"""Runs: a resume gives the same bits, whatever ended the run; what a run folder holds; exit codes."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from dsv3_jax.checkpoint import load_checkpoint, save_checkpoint, validate_step
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
from dsv3_jax.errors import ConfigError
from dsv3_jax.hf.rules import flatten_paths
from dsv3_jax.model import abstract_variables, init_variables
from dsv3_jax.parallel import make_mesh
from dsv3_jax.text import Tokenizer
from dsv3_jax.training import trainer
from dsv3_jax.training.metrics import read_metrics
from dsv3_jax.training.prepare import prepare
from dsv3_jax.training.restore import init_notes, init_weights, open_init
from dsv3_jax.training.run_folder import RunFolder
from dsv3_jax.training.saving import read_best
from dsv3_jax.training.sources import Document
from dsv3_jax.training.trainer import train
from tests.training import tiny

REPO = Path(__file__).resolve().parents[2]
MODEL = dataclasses.replace(
    tiny.MODEL,
    vocab_size=258,
    num_hidden_layers=2,
    bos_token_id=256,
    eos_token_id=(257,),
    initializer_range=0.05,
)
STEPS = 6
TIMED = {"tokens_per_s", "seconds", "tflops", "mem_gib"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    words = ["latent", "expert", "router", "token", "bias"]
    texts = [" ".join(words[(i * k) % 5] for k in range(1, 9)) for i in range(1, 60)]
    texts = [f"{text} {i}" for i, text in enumerate(texts)]
    prepare(
        (Document(str(i), text) for i, text in enumerate(texts)), folder, Tokenizer.bytes(), val_fraction=0.2
    )
    return folder


def _config(data: Path, run: Path, **training: Any) -> RunConfig:
    values: dict[str, Any] = dict(
        steps=STEPS, batch_size=8, seq_len=16, remat="none", eval_every=2, eval_batches=1
    )
    return RunConfig(
        model=MODEL,
        run=RunSection(dir=str(run)),
        data=DataConfig(source=str(data)),
        training=TrainingConfig(**(values | training)),
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=2),
        checkpoint=CheckpointConfig(every=2, keep=2, keep_best=1),
        logging=LoggingConfig(every=1),
        seed=5,
    )


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, never interrupted."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train(_config(data, run)) == 0
    return run


def _copy(finished: Path, to: Path) -> Path:
    shutil.copytree(finished, to)
    return to


def _chunks(item: Path) -> list[Path]:
    """The files that hold array elements."""
    leaves = [path for path in (item / "state").iterdir() if path.is_dir()]
    return sorted(
        path for leaf in leaves for path in leaf.rglob("*") if path.is_file() and path.name != "zarr.json"
    )


def _same_end(run: Path, whole: Path, steps: int = STEPS) -> None:
    """Weights, biases, moments, data position and metrics of the last step are the same to the bit."""
    have, want = (folder / "checkpoints" / str(steps) for folder in (run, whole))
    for part in ("weights", "optimizer"):
        files = [path.relative_to(want) for path in _chunks(want / part)]
        assert len(files) > 20
        for file in files:
            assert (have / file).read_bytes() == (want / file).read_bytes(), file
    assert (have / "train_state.json").read_bytes() == (want / "train_state.json").read_bytes()

    def lines(folder: Path) -> list[dict[str, Any]]:
        records = read_metrics(folder / "metrics.jsonl")
        for record in records:
            record["expert_counts"] = record["expert_counts"].tolist()  # compared as a whole
        return [{key: value for key, value in record.items() if key not in TIMED} for record in records]

    assert lines(run) == lines(whole)
    assert [record["step"] for record in lines(run)] == list(range(1, steps + 1))


def test_a_run_folder_holds_what_it_should(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()} - {".lock"}
    assert names == {"config.yaml", "metrics.jsonl", "report.html", "tokenizer", "checkpoints"}
    losses = {r["step"]: r["val_loss"] for r in read_metrics(finished / "metrics.jsonl") if "val_loss" in r}
    assert list(losses) == [2, 4, 6]
    best = min(losses, key=losses.__getitem__)
    assert read_best(finished) == {best: losses[best]}
    kept = {path.name for path in (finished / "checkpoints").iterdir()}
    assert kept == {"4", "6", str(best), "best.json"}
    record = read_metrics(finished / "metrics.jsonl")[-1]
    assert {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_s",
        "maxvio",
        "balanced_fraction",
        "bias_std",
        "tflops",
        "mem_gib",
        "val_bits_per_byte",
        "val_mtp_acceptance",
    } <= record.keys()
    assert 0 <= record["val_mtp_acceptance"] <= 1 and len(record["bias_std"]) == 2
    # The loss is a float32, printed so that it comes back exactly.
    assert float(np.float32(record["loss"])) == record["loss"]
    assert "http" not in (finished / "report.html").read_text().replace("http-equiv", "")


def test_four_steps_and_two_more_give_the_bits_of_six(data: Path, finished: Path, tmp_path: Path) -> None:
    # As if killed after step 5: the metrics are ahead of the checkpoint, the last line is half-written.
    run = _copy(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "6")
    log = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(log[:4]) + log[4][:30])
    assert train(_config(data, run)) == 0
    _same_end(run, finished)


def test_a_damaged_newest_step_is_set_aside_and_said(
    data: Path, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = _copy(finished, tmp_path / "run")
    victim = max(_chunks(run / "checkpoints" / "6" / "weights"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert train(_config(data, run)) == 0
    assert "WARNING: checkpoint 6 is damaged and set aside as 6.corrupt" in capfd.readouterr().out
    assert (run / "checkpoints" / "6.corrupt").is_dir()
    _same_end(run, finished)


def test_killed_and_stopped_runs_end_with_the_same_bits(data: Path, finished: Path, tmp_path: Path) -> None:
    run, config = tmp_path / "run", tmp_path / "config.yaml"
    config.write_text(dump_yaml(to_mapping(_config(data, run))))
    flags = [
        "--run.dir",
        str(run),
        "--checkpoint.every=1",
        "--checkpoint.keep",
        "0",
        "--checkpoint.keep_best",
        "0",
    ]

    def start(last_line: str, number: int | None) -> int:
        """Run until a line begins like `last_line`, then send the signal; the exit code."""
        command = [sys.executable, "train.py", "--config", str(config), *flags]
        with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if number is not None and line.startswith(last_line):
                    process.send_signal(number)
                    number = None
        return process.returncode

    assert start("step 00002", signal.SIGKILL) == -signal.SIGKILL
    assert start("step 00004", signal.SIGTERM) == 0  # saved
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
    assert steps[-1] in (4, 5) and validate_step(run / "checkpoints" / str(steps[-1]), hashes=True) == []
    assert start("", None) == 0
    _same_end(run, finished)


def test_muon_moments_in_bfloat16_and_a_growing_batch_resume_to_the_bit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # XLA:CPU runs independent collectives of a program on as many threads as there are cores, where each waits for all
    # devices: the many exchanges of Muon's update on eight simulated devices were seen to starve each other there.
    monkeypatch.setattr(trainer, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:2]))

    def config(run: Path) -> RunConfig:
        ramp = dict(steps=4, batch_size=16, batch_ramp_start=8, batch_ramp_sizes=2, batch_ramp_steps=3)
        cfg = tiny.replace(_config(data, run, **ramp), "checkpoint", every=1, keep=0)
        return tiny.replace(cfg, "optimizer", name="muon", moment_dtype="bfloat16")

    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(config(whole)) == 0
    shutil.copytree(whole, run)
    for step in ("3", "4"):  # as if killed after step 2, in the middle of the ramp
        shutil.rmtree(run / "checkpoints" / step)
    assert train(config(run)) == 0
    _same_end(run, whole, 4)
    # What was used: three batches of 8 and one of 16, in the order that a constant batch has.
    state = load_checkpoint(whole / "checkpoints" / "4").train_state
    assert state is not None and state["data"]["position"] == 3 * 8 + 16
    # The moments are stored as they are kept; only what AdamW updates has a second one.
    stored = whole / "checkpoints" / "4" / "optimizer" / "state"
    kinds = {json.loads(path.read_text())["data_type"] for path in stored.glob("mu.*/zarr.json")}
    assert kinds == {"bfloat16"}
    names = {path.name for path in stored.iterdir()}
    assert "nu.embed_VD" in names and "mu.mtp.proj_DX" in names and "nu.mtp.proj_DX" not in names


def test_a_hidden_copy_to_the_device_ends_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.jax, "device_put", lambda batch, _: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(_config(data, tmp_path / "run"))


def test_a_finished_run_started_again_changes_nothing(data: Path, finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert train(_config(data, finished)) == 0
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        (lambda cfg: dataclasses.replace(cfg, seed=6), "seed = 5, not 6"),
        (lambda cfg: tiny.replace(cfg, "optimizer", lr=1e-3), r"optimizer\.lr = 0\.003, not 0\.001"),
        (lambda cfg: tiny.replace(cfg, "model", rope_theta=5.0), r"model\.rope_theta"),
    ],
)
def test_on_resume_other_keys_are_refused_by_name(data: Path, finished: Path, changed: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        train(changed(_config(data, finished)))


def test_on_resume_steps_checkpoint_and_logging_may_differ(data: Path, finished: Path) -> None:
    cfg = tiny.replace(_config(data, finished, steps=9), "checkpoint", every=7, keep=0)
    RunFolder(tiny.replace(cfg, "logging", every=3)).close()


def test_without_a_held_out_row_there_is_no_evaluation_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = SimpleNamespace(in_order=lambda rows, batches: iter(()))
    cfg = SimpleNamespace(training=TrainingConfig(batch_size=8))
    monkeypatch.setattr(trainer, "shards_of", lambda mesh: 1)
    run: Any = SimpleNamespace(val_data=nothing, cfg=cfg, mesh=None)
    assert trainer.Trainer._evaluate(run) == {}
    assert "no held-out document was found: no evaluation" in capsys.readouterr().out


def test_one_process_writes_a_run_folder(data: Path, finished: Path, tmp_path: Path) -> None:
    run = _copy(finished, tmp_path / "run")
    first = RunFolder(_config(data, run))
    with pytest.raises(ConfigError, match="another process"):
        RunFolder(_config(data, run))
    first.close()


def test_a_folder_with_something_else_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"not a run folder .*thesis\.tex"):
        train(_config(data, tmp_path))
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_too_many_steps_in_a_row_that_are_not_finite_end_with_76_and_save_nothing(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "NOT_APPLIED_LIMIT", 4)
    variables = jax.jit(functools.partial(init_variables, MODEL))(jax.random.key(0))
    variables["params"]["final_norm_D"] = variables["params"]["final_norm_D"] * np.inf
    save_checkpoint(tmp_path / "weights", MODEL, variables)
    run = tmp_path / "run"
    cfg = tiny.replace(_config(data, run), "init", checkpoint=str(tmp_path / "weights"))
    cfg = tiny.replace(cfg, "checkpoint", every=100)
    assert train(cfg) == 76
    out = capfd.readouterr().out
    assert "not finite or a spike in " in out and "NOT APPLIED" in out
    assert not (run / "checkpoints").exists()
    records = read_metrics(run / "metrics.jsonl")
    assert 4 <= len(records) <= 5 and records[0]["loss"] is None and records[0]["skipped"] == 1


def test_init_takes_weights_and_initialises_an_absent_multi_token_module(tmp_path: Path, data: Path) -> None:
    without = dataclasses.replace(MODEL, num_nextn_predict_layers=0)
    variables = jax.device_get(jax.jit(functools.partial(init_variables, without))(jax.random.key(7)))
    variables["router"] = jax.tree.map(lambda bias: bias + np.float32(0.25), variables["router"])
    save_checkpoint(tmp_path / "weights", without, variables)
    cfg = tiny.replace(_config(data, tmp_path / "run"), "init", checkpoint=str(tmp_path / "weights"))
    source = open_init(cfg)
    assert source is not None and any("no multi-token module" in note for note in init_notes(cfg, source))
    have, want = flatten_paths(init_weights(cfg, source)), flatten_paths(variables)
    assert have.keys() == flatten_paths(abstract_variables(MODEL)).keys()
    for path, leaf in want.items():
        np.testing.assert_array_equal(have[path], leaf)
    assert np.abs(have["params/mtp/proj_DX"]).max() > 0
    wide = tiny.replace(cfg, "model", hidden_size=64)
    with pytest.raises(ConfigError, match=r"params/embed_VD: \[258, 32\], expected \[258, 64\]"):
        open_init(wide)


def test_moments_and_router_are_in_the_checkpoint(finished: Path) -> None:
    loaded = load_checkpoint(finished / "checkpoints" / "6")
    assert loaded.train_state is not None and loaded.train_state["data"]["position"] == STEPS * 8
    assert np.abs(np.asarray(loaded.variables["router"]["mtp"]["block"]["mlp"]["router"]["bias_E"])).max() > 0
