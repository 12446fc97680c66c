"""The tiny model, run config and batches that the training tests share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from dsv3_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from dsv3_jax.model import init_variables
from dsv3_jax.parallel import make_mesh
from dsv3_jax.training.step import State, init_state

MODEL = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    n_shared_experts=1,
    n_routed_experts=8,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_group=2,
    topk_group=1,
    max_position_embeddings=64,
    num_nextn_predict_layers=1,
    initializer_range=0.1,
)
RUN = RunConfig(
    model=MODEL,
    training=TrainingConfig(
        steps=20, batch_size=8, seq_len=16, loss_chunk=24, balance_loss_alpha=0.01, remat="none"
    ),
    optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2),
    seed=3,
)


def replace(cfg: RunConfig, section: str, **values: Any) -> RunConfig:
    """`cfg` with some keys of a section changed."""
    return dataclasses.replace(cfg, **{section: dataclasses.replace(getattr(cfg, section), **values)})


def mesh(data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    """A mesh of the first simulated devices."""
    return make_mesh(MeshConfig(data, fsdp, expert, tensor), jax.devices()[: data * fsdp * expert * tensor])


def batch(cfg: RunConfig = RUN, seed: int = 0) -> dict[str, np.ndarray]:
    """Random packed rows: two segments and some padding, of another length in every row."""
    rng = np.random.default_rng(seed)
    B, T = cfg.training.batch_size, cfg.training.seq_len
    ids = rng.integers(0, cfg.model.vocab_size, (B, T + 1))
    first, end = rng.integers(2, T // 2, (B, 1)), rng.integers(T // 2 + 2, T + 1, (B, 1))
    at = np.arange(T)[None, :]
    segments = np.where(at < first, 1, 2) * (at < end)
    return {
        "tokens_BT": (ids[:, :-1] * (segments > 0)).astype(np.int32),
        "targets_BT": np.where(segments > 0, ids[:, 1:], -1).astype(np.int32),
        "segments_BT": segments.astype(np.int32),
        "positions_BT": (np.where(at < first, at, at - first) * (segments > 0)).astype(np.int32),
    }


@functools.cache
def _first_values(model: ModelConfig, seed: int) -> Any:
    return jax.device_get(jax.jit(init_variables, static_argnums=0)(model, jax.random.key(seed)))


def state(cfg: RunConfig, devices: jax.sharding.Mesh) -> State:
    """Step 0: first values drawn once a model, on one device. Drawing them is most of `init_state`'s compilation (tiny
    model: 19 CPU seconds, its step 17), and it compiles them for each mesh and each call."""
    return init_state(cfg, devices, jax.tree.map(np.array, _first_values(cfg.model, cfg.seed)))
