"""Tiny models of the family, prompts and a checkpoint folder that the decoding tests share."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax.checkpoint import save_checkpoint
from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.inference import Engine, EngineOptions, Request, Result
from dsv3_jax.model import Transformer, init_variables
from dsv3_jax.text import Tokenizer

V3 = ModelConfig(
    vocab_size=270,
    hidden_size=48,
    intermediate_size=64,
    moe_intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    n_shared_experts=1,
    n_routed_experts=8,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_group=2,
    topk_group=1,
    max_position_embeddings=256,
    rope_scaling=RopeScaling(4.0, 64, mscale=1.0, mscale_all_dim=1.0),
    initializer_range=0.15,
    bos_token_id=256,
    eos_token_id=(11, 257),
)
V2 = dataclasses.replace(
    V3,
    model_type="deepseek_v2",
    topk_method="group_limited_greedy",
    scoring_func="softmax",
    routed_scaling_factor=1.0,
    norm_topk_prob=False,
    q_lora_rank=None,
)
V32 = dataclasses.replace(V3, model_type="deepseek_v32", index_n_heads=8, index_head_dim=16, index_topk=12)
CONFIGS = {"v3": V3, "v2": V2, "v32": V32}


@functools.cache
def variables(name: str) -> dict[str, Any]:
    """Random weights, the router's biases included."""
    tree = init_variables(CONFIGS[name], jax.random.key(7))
    bias = jax.tree.map(lambda x: 0.3 * jax.random.normal(jax.random.key(1), x.shape), tree["router"])
    return {"params": tree["params"], "router": bias}


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random ids of bytes."""
    return np.random.default_rng((seed, length)).integers(0, 256, length).tolist()


VOCAB_LIMIT = 258
"""Ids of the byte tokenizer; the models have a few more, which are never chosen."""


OPTIONS = EngineOptions(rows=4, page_size=16, prefill_tiles=4, tile=8, max_logprobs=2)
"""Small pages and tiles, so that short prompts have several of each."""


def engine(name: str, tree: dict[str, Any] | None = None, **options: Any) -> Engine:
    """An engine of four rows; all engines of one model and one set of options share their compiled programs."""
    eos_ids = options.pop("eos_ids", V3.eos_token_id)
    return Engine(
        CONFIGS[name],
        tree or variables(name),
        options=dataclasses.replace(OPTIONS, **options),
        eos_ids=eos_ids,
        vocab_limit=VOCAB_LIMIT,
    )


def finish(engine: Engine, requests: list[Request], watch: Any = None) -> dict[int, Result]:
    """Results by index."""
    return {result.request.index: result for found in engine.run(requests, watch) for result in found}


@functools.cache
def _logits(name: str) -> Any:
    model = Transformer(CONFIGS[name])
    return jax.jit(lambda tree, ids: model.apply(tree, model.apply(tree, ids).hidden_BTD, method="logits")[0])


def full_logits(name: str, ids: list[int]) -> np.ndarray:
    """Logits of every position from one pass without a cache."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(_logits(name)(variables(name), padded))[: len(ids)]


def save(folder: Path, name: str = "v3", tree: dict[str, Any] | None = None) -> Path:
    """A native checkpoint with the byte tokenizer."""
    Tokenizer.bytes().save(folder / "tokenizer-files")
    save_checkpoint(
        folder / "checkpoint",
        CONFIGS[name],
        tree or variables(name),
        tokenizer_dir=folder / "tokenizer-files",
    )
    return folder / "checkpoint"
