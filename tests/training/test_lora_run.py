"""LoRA runs: the pairs alone are trained, on a base that stays as it is stored, on every mesh and after a stop."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert import quantize
from dsv3_jax.checkpoint import load_checkpoint, save_checkpoint, step_folder
from dsv3_jax.checkpoint.source import open_source
from dsv3_jax.cli import parse_run_config
from dsv3_jax.config import LoraConfig, RunConfig, dump_yaml, to_mapping
from dsv3_jax.errors import ConfigError
from dsv3_jax.finetune.base import open_base
from dsv3_jax.hf.rules import flatten_paths
from dsv3_jax.model import abstract_variables, init_variables
from dsv3_jax.text import Tokenizer
from dsv3_jax.training.losses import loss_fn
from dsv3_jax.training.metrics import read_metrics
from dsv3_jax.training.prepare import prepare
from dsv3_jax.training.sources import Document
from dsv3_jax.training.step import abstract_state, init_lora_state, make_eval_step, make_train_step
from dsv3_jax.training.trainer import train
from tests.convert import folders
from tests.convert.test_quantized import fp8_folder
from tests.training import tiny
from tests.training.test_trainer import MODEL, _config

REPO = Path(__file__).resolve().parents[2]
STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    texts = (f"latent expert router {i % 7} token {i % 5} bias" for i in range(80))
    prepare(
        (Document(str(i), text) for i, text in enumerate(texts)), folder, Tokenizer.bytes(), val_fraction=0.2
    )
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model in float32, in bfloat16, and with int4 matrices (the head, too, in int8)."""
    folder = tmp_path_factory.mktemp("bases")
    variables = jax.jit(init_variables, static_argnums=0)(MODEL, jax.random.key(11))
    Tokenizer.bytes().save(folder / "tokenizer")
    save_checkpoint(folder / "float32", MODEL, variables, tokenizer_dir=folder / "tokenizer")
    half = {**variables, "params": jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"])}
    save_checkpoint(folder / "bfloat16", MODEL, half, tokenizer_dir=folder / "tokenizer")
    quantize.convert(folder / "float32", folder / "head", "int8", kinds=("head",))
    quantize.convert(folder / "head", folder / "int4", "int4", group_size=16)
    return {name: folder / name for name in ("float32", "bfloat16", "int4")}


def lora_config(base: Path, **values: Any) -> LoraConfig:
    return LoraConfig(**{"rank": 4, "alpha": 8.0, "targets": ("all-linear",), "base": str(base)} | values)


def step_config(base: Path, **training: Any) -> RunConfig:
    cfg = dataclasses.replace(tiny.RUN, model=MODEL, lora=lora_config(base))
    return tiny.replace(cfg, "training", **training)


def steps_on(cfg: RunConfig, mesh: jax.sharding.Mesh, steps: int = 2) -> tuple[Any, Any, Any]:
    """(losses, pairs, evaluation) of some steps."""
    base = open_base(cfg.lora, cfg.model)
    state = init_lora_state(cfg, mesh, base)
    step = jax.jit(make_train_step(cfg, mesh, base), donate_argnums=0)
    losses = []
    for seed in range(steps):
        state, metrics = step(state, tiny.batch(cfg, seed))
        losses.append(float(metrics["loss"]))
    sums = jax.jit(make_eval_step(cfg, mesh, base))(
        state.params, state.router, tiny.batch(cfg, 9), state.frozen
    )
    return losses, jax.device_get(state.params), float(sums.nats)


@functools.cache
def on_one_device(base: Path) -> tuple[Any, Any, Any]:
    return steps_on(step_config(base), tiny.mesh())


@pytest.mark.parametrize(
    ("name", "axes"),
    [("int4", {"data": 2, "expert": 4}), ("float32", {"fsdp": 2, "expert": 2, "tensor": 2})],
)
def test_a_step_on_eight_devices_is_that_on_one(
    bases: dict[str, Path], name: str, axes: dict[str, int]
) -> None:
    """Pairs of experts on their experts' devices; pairs of cut weights cut with them."""
    losses, pairs, nats = on_one_device(bases[name])
    got_losses, got, got_nats = steps_on(step_config(bases[name]), tiny.mesh(**axes))
    np.testing.assert_allclose(got_losses, losses, rtol=1e-5)
    np.testing.assert_allclose(got_nats, nats, rtol=1e-5)
    for path, leaf in flatten_paths(pairs).items():  # Adam's first steps are near the sign of the gradient
        np.testing.assert_allclose(flatten_paths(got)[path], leaf, rtol=0, atol=2e-4, err_msg=path)


def test_micro_batches_add_up(bases: dict[str, Path]) -> None:
    losses, pairs, _ = on_one_device(bases["int4"])
    got_losses, got, _ = steps_on(step_config(bases["int4"], accumulate=2, remat="latents"), tiny.mesh())
    np.testing.assert_allclose(got_losses, losses, rtol=1e-5)
    for path, leaf in flatten_paths(pairs).items():
        np.testing.assert_allclose(flatten_paths(got)[path], leaf, rtol=0, atol=2e-4, err_msg=path)


def test_the_first_loss_is_the_bases(bases: dict[str, Path]) -> None:
    cfg = step_config(bases["int4"])
    whole = open_source(bases["int4"], abstract_variables).load("float32")
    want, _ = jax.jit(loss_fn, static_argnums=(3, 4))(
        whole["params"], whole["router"], tiny.batch(cfg, 0), cfg.model, cfg.training
    )
    assert on_one_device(bases["int4"])[0][0] == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int4"])
def test_the_state_holds_the_base_as_it_is_stored_and_moments_of_the_pairs_alone(
    bases: dict[str, Path], name: str
) -> None:
    cfg = step_config(bases[name])
    base = open_base(cfg.lora, cfg.model)
    state = init_lora_state(cfg, tiny.mesh(), base)
    want = abstract_state(cfg, tiny.mesh(), base)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), want
    )
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(state.frozen)}
    assert kinds == {"int4": {"uint8", "int8", "float32"}}.get(name, {name})
    frozen = sum(leaf.nbytes for leaf in jax.tree.leaves(state.frozen))
    assert frozen == base.nbytes - sum(leaf.nbytes for leaf in jax.tree.leaves(state.router))
    pairs = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    moments = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    assert moments <= 2 * pairs + 16


def run_config(data: Path, run: Path, base: Path, **values: Any) -> RunConfig:
    cfg = _config(data, run, steps=STEPS)
    cfg = tiny.replace(cfg, "optimizer", lr=3e-2, decay_fraction=1.0)
    return dataclasses.replace(cfg, lora=lora_config(base, **values))


@pytest.fixture(scope="module")
def finished(data: Path, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train(run_config(data, run, bases["int4"])) == 0
    return run


def test_a_run_learns_and_keeps_pairs_alone(finished: Path, bases: dict[str, Path]) -> None:
    records = read_metrics(finished / "metrics.jsonl")
    assert records[-1]["val_loss"] < records[1]["val_loss"] < 6
    assert 0 < records[-1]["trainable_parameters"] < records[-1]["parameters"] / 2
    folder = step_folder(finished, STEPS)
    loaded = load_checkpoint(folder)
    pairs = flatten_paths(loaded.variables)
    assert pairs and all(path.rpartition("/")[2][:2] in ("a_", "b_") for path in pairs)
    assert loaded.manifest.kind == "adapter" and loaded.train_state is not None
    record = json.loads((folder / "lora.json").read_text())
    assert record["rank"] == 4 and record["base"]["path"] == str(bases["int4"])
    moments = {path.name for path in (folder / "optimizer" / "state").iterdir() if path.is_dir()}
    assert len(moments) == 2 * len(pairs) + 1  # mu, nu, count
    assert "trainable" in (finished / "report.html").read_text()
    with pytest.raises(ConfigError, match="an adapter, no model"):
        open_source(folder, abstract_variables)


def test_a_resume_gives_the_same_bits(
    finished: Path,
    data: Path,
    bases: dict[str, Path],
    tmp_path: Path,
    capsys: Any,
) -> None:
    cfg = run_config(data, tmp_path / "run", bases["int4"])
    short = tiny.replace(cfg, "training", steps=STEPS)
    (tmp_path / "moved").symlink_to(bases["int4"])  # a base may move
    shutil.copytree(finished, tmp_path / "run")
    for step in (6, 4):
        if step_folder(tmp_path / "run", step).exists() and step > 4:
            shutil.rmtree(step_folder(tmp_path / "run", step))
    moved = dataclasses.replace(short, lora=dataclasses.replace(short.lora, base=str(tmp_path / "moved")))
    assert train(moved) == 0
    out = capsys.readouterr().out
    assert "resuming after step 4" in out and "LoRA rank 4" in out and "| trains " in out
    for item in ("weights", "optimizer"):
        have, want = (step_folder(run, STEPS) / item / "state" for run in (tmp_path / "run", finished))
        files = [file for file in want.rglob("c*") if file.is_file()]
        assert files
        for file in files:
            assert (have / file.relative_to(want)).read_bytes() == file.read_bytes(), file


def test_a_resume_refuses_another_base(
    finished: Path,
    data: Path,
    bases: dict[str, Path],
    tmp_path: Path,
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"was trained on the weights of .*int4.*float32 has others"):
        train(run_config(data, tmp_path / "run", bases["float32"]))
    with pytest.raises(ConfigError, match=r"lora.rank = 4, not 2"):
        train(run_config(data, tmp_path / "run", bases["int4"], rank=2))


def test_what_is_refused(bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora.base is None; expected a checkpoint"):
        LoraConfig(rank=4)
    with pytest.raises(ConfigError, match=r"lora.base is 'x'; expected none where lora.rank is 0"):
        LoraConfig(base="x")
    cfg = step_config(bases["int4"])
    with pytest.raises(ConfigError, match=r"optimizer.name is 'muon'; expected adamw"):
        tiny.replace(cfg, "optimizer", name="muon")
    with pytest.raises(ConfigError, match=r"training.products is 'fp8'; expected compute where lora.rank"):
        tiny.replace(cfg, "training", products="fp8")
    with pytest.raises(ConfigError, match=r"mesh.tensor is 2; expected 1 with a quantised base"):
        make_train_step(cfg, tiny.mesh(tensor=2), open_base(cfg.lora, cfg.model))
    other = dataclasses.replace(MODEL, rope_theta=1.0)
    with pytest.raises(ConfigError, match=r"has model.rope_theta = 10000.0, the run's config 1.0"):
        open_base(cfg.lora, other)


@pytest.mark.parametrize("quantize", ["none", "fp8+act8"])
@pytest.mark.parametrize("scales", [np.float32, ml_dtypes.float8_e8m0fnu, folders.BF16])
def test_a_released_fp8_base_is_in_memory_what_its_shapes_say(
    tmp_path: Path, scales: Any, quantize: str
) -> None:
    """Scales of every type; with FP8 activations the stored codes stay."""
    fp8_folder(tmp_path / "hf", scales=scales)
    cfg = open_source(tmp_path / "hf", abstract_variables).cfg
    base = open_base(lora_config(tmp_path / "hf", base_quantize=quantize), cfg)
    loaded = base.source.load(formats=base.formats)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), loaded)
    assert jax.tree.flatten(shapes) == jax.tree.flatten(base.abstract)
    assert base.rounded_to == quantize and set(base.formats.values()) == {
        "fp8:16x16" + quantize.removeprefix("none").removeprefix("fp8")
    }


def test_the_model_is_the_bases(bases: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "lora.yaml"
    file.write_text(
        dump_yaml(
            {
                "lora": {"rank": 2, "base": "elsewhere"},
                "model": {"dtype": "bfloat16"},
                "training": {"seq_len": 16},
            }
        )
    )
    flags = ["--config", str(file), "--lora.base", str(bases["int4"])]
    cfg = parse_run_config(flags)
    assert cfg.model == dataclasses.replace(MODEL, dtype="bfloat16")
    assert (cfg.lora.rank, cfg.lora.base, cfg.lora.targets) == (2, str(bases["int4"]), ("attention",))
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump_yaml(to_mapping(cfg)))
    assert parse_run_config(["--config", str(saved)]) == dataclasses.replace(
        cfg, run=parse_run_config(["--config", str(saved)]).run
    )


@pytest.mark.parametrize("name", ["tiny-lora", "tiny-finetune"])
def test_the_ready_configs_run(bases: dict[str, Path], data: Path, tmp_path: Path, name: str) -> None:
    """Their recipes on the tests' model and data, two steps: warm-up, cosine, accumulation."""
    path = tmp_path / f"{name}.yaml"
    path.write_text((REPO / "configs" / f"{name}.yaml").read_text().replace("seq_len: 256", "seq_len: 16"))
    flags = ["--config", str(path), "--data.source", str(data), "--run.dir", str(tmp_path / "run")]
    flags += ["--training.steps", "2", "--training.batch_size", "16"]
    base = str(bases["float32"])
    if name == "tiny-lora":
        cfg = parse_run_config([*flags, "--lora.base", base, "--lora.base_quantize", "int4:16"])
        assert cfg.model == MODEL and cfg.lora.targets == ("all-linear",)
    else:
        cfg = parse_run_config([*flags, "--init.checkpoint", base])
        cfg = dataclasses.replace(cfg, model=MODEL)
    assert (cfg.training.accumulate, cfg.optimizer.schedule) == (2, "cosine")
    assert train(cfg) == 0
    first, last = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert 0 < first["lr"] < last["lr"] and last["val_loss"] > 0  # still warming up
    kind = load_checkpoint(step_folder(tmp_path / "run", 2)).manifest.kind
    assert kind == ("adapter" if name == "tiny-lora" else "training")
