"""Models that the GPU benchmarks and the compilation checks share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dsv3_jax.config import ModelConfig
from dsv3_jax.hf.any_config import load_model_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

# V3's structure at 1.75e9 parameters: width 2048, 8 layers, 32 experts, 4 a token, of 1024.
MODEL_2B = ModelConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=8192, moe_intermediate_size=1024, num_hidden_layers=8,
    num_attention_heads=16, n_shared_experts=1, n_routed_experts=32, num_experts_per_tok=4, first_k_dense_replace=1,
    q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_group=1,
    topk_group=1, max_position_embeddings=4096, num_nextn_predict_layers=0, dtype="bfloat16",
)  # fmt: skip

# V3's layer, whole in width, heads and routing, with 3 layers and 64 of its 256 experts: 8 devices hold 8 each.
MODEL_V3_SLICE = ModelConfig(
    vocab_size=32000, num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=64, n_group=8, topk_group=4,
    num_experts_per_tok=8, num_nextn_predict_layers=1, max_position_embeddings=4096, dtype="bfloat16",
)  # fmt: skip

# Everything small, for a first run of a benchmark's code on a CPU.
MODEL_TINY = dataclasses.replace(
    MODEL_2B, vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=4, v_head_dim=8, max_position_embeddings=256, dtype="float32",
)  # fmt: skip


def model_16b(layers: int | None = None) -> ModelConfig:
    """Moonlight-16B-A3B, whole or cut to its first layers."""
    model, _ = load_model_config(CONFIGS / "moonlight-16b-a3b.yaml")
    return model if layers is None else dataclasses.replace(model, num_hidden_layers=layers)
