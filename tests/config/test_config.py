"""Typed configs: YAML in and out, unknown keys, wrong values, sizes of dimensions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.config import (
    LEGEND,
    ModelConfig,
    RunConfig,
    dims,
    dump_yaml,
    from_mapping,
    load_yaml,
    shape_of,
    to_mapping,
)
from dsv3_jax.errors import ConfigError


def run_config(tmp_path: Path, text: str) -> RunConfig:
    (tmp_path / "run.yaml").write_text(text)
    return from_mapping(RunConfig, load_yaml(tmp_path / "run.yaml"))


def test_a_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    scaling = "{factor: 4, original_max_position_embeddings: 16}"
    cfg = run_config(
        tmp_path, f"model: {{q_lora_rank: null, rope_scaling: {scaling}, eos_token_id: [1, 2]}}\nseed: 7\n"
    )
    assert cfg.model.q_lora_rank is None and cfg.model.eos_token_id == (1, 2) and cfg.seed == 7
    assert run_config(tmp_path, dump_yaml(to_mapping(cfg))) == cfg


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {hidden_sizes: 1}", "unknown key 'model.hidden_sizes'; did you mean 'hidden_size'"),
        ("trainning: {}", "unknown key 'trainning'; did you mean 'training'"),
        ("optimizer: {learning_rate: 1}", "unknown key 'optimizer.learning_rate'; valid keys: b1, "),
        ("training: {steps: many}", "training.steps is 'many'; expected an integer"),
        ("training: {steps: 1.5}", "training.steps is 1.5; expected an integer"),
        ("training: {steps: true}", "training.steps is True; expected an integer"),
        ("training: {steps: 0}", "training.steps is 0; expected 1 or more"),
        ("optimizer: {lr: .nan}", "optimizer.lr is nan; expected a finite number"),
        ("model: {norm_topk_prob: 1}", "model.norm_topk_prob is 1; expected true or false"),
        ("model: {dtype: float16}", "model.dtype is 'float16'; expected one of 'float32', 'bfloat16'"),
        ("model: 3", "model is 3; expected a mapping"),
        (
            "model: {rope_scaling: {factor: 4}}",
            "model.rope_scaling lacks the key 'original_max_position_embeddings'",
        ),
        ("model: {qk_rope_head_dim: 7}", "model.qk_rope_head_dim is 7; expected an even number"),
        ("model: {n_group: 3}", "model.n_group is 3; expected a divisor of n_routed_experts = 256"),
        ("model: {topk_group: 1, n_group: 64}", "model.topk_group is 1: the chosen groups hold 4 experts"),
        ("model: {index_topk: 4}", "model.index_* keys"),
        ("model: {model_type: deepseek_v32}", "model.index_n_heads is 0"),
        ("model: {bos_token_id: 129280}", "model.bos_token_id is 129280; expected 0 <= id < vocab_size"),
        (
            "training: {seq_len: 200000}",
            "training.seq_len is 200000; expected at most model.max_position_embeddings",
        ),
        ("seed: -1", "seed is -1"),
        ("kernels: fast", "kernels: 'fast' in 'fast'; expected one of auto, reference, mosaic"),
        ("kernels: 'mosaic,atention=auto'", "kernels: 'atention=auto'"),
        ("kernels: 'attention=auto,mosaic'", "kernels: 'mosaic' in"),
        ("kernels: 'attention=auto,attention=mosaic'", "attention is given twice"),
    ],
)
def test_a_problem_names_the_key_the_value_and_what_was_expected(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        run_config(tmp_path, text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "expected a mapping"),
        ("a: 1\na: 2", "'a' is given twice"),
        ("", "mapping"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml") as error:
        run_config(tmp_path, text)
    assert message in str(error.value)


def test_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    assert run_config(tmp_path, "optimizer: {lr: 1e-4}").optimizer.lr == 1e-4


def test_sizes_of_dimensions() -> None:
    cfg = ModelConfig()
    sizes = dims(cfg)
    assert set(sizes) | {"B", "T", "S", "L", "O"} == set(LEGEND)
    assert shape_of(cfg, "HQA") == (128, 192, 1536) and shape_of(cfg, "JD") == (576, 7168)
    assert (sizes["W"], sizes["X"], sizes["M"], sizes["P"]) == (256, 14336, 2048, 2)
    with pytest.raises(AssertionError, match="repeat"):
        shape_of(cfg, "DD")


@pytest.mark.parametrize(
    ("keys", "dense", "moe"),
    [
        ({}, 3, 58),
        ({"first_k_dense_replace": 0}, 0, 61),
        ({"first_k_dense_replace": 99}, 61, 0),
        ({"n_routed_experts": 0}, 61, 0),
    ],
)
def test_stacks(keys: dict[str, Any], dense: int, moe: int) -> None:
    cfg = dataclasses.replace(ModelConfig(), **keys)
    assert (cfg.num_dense_layers, cfg.num_moe_layers) == (dense, moe)
