"""Seconds to compile the train step as layers grow: `python -m benchmarks.compile_time`.

Layers are a scan, so depth should not matter. One device, V3's structure in small, the compilation cache off, rounds
in turn; lowering (tracing included) and compiling apart. Depths are those of small models, V2-Lite and V3.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax
import jax.numpy as jnp

from benchmarks.common import environment, write
from dsv3_jax.config import MeshConfig, ModelConfig, RunConfig, TrainingConfig
from dsv3_jax.parallel import make_mesh
from dsv3_jax.training.step import abstract_state, batch_sharding, make_train_step

DEPTHS = (8, 27, 61)
TARGET = 1.3  # the deepest over the shallowest


def seconds(layers: int) -> tuple[float, float]:
    """Seconds of lowering and of compiling one step."""
    jax.clear_caches()
    model = ModelConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
        first_k_dense_replace=1, q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16,
        v_head_dim=32, max_position_embeddings=512, num_nextn_predict_layers=1,
    )  # fmt: skip
    cfg = RunConfig(model=model, training=TrainingConfig(batch_size=4, seq_len=256))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    names = ("tokens_BT", "targets_BT", "segments_BT", "positions_BT")
    batch = {n: jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=batch_sharding(mesh)) for n in names}
    start = time.perf_counter()
    lowered = jax.jit(make_train_step(cfg, mesh), donate_argnums=0).lower(abstract_state(cfg, mesh), batch)
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle


def main() -> None:
    """Time all depths in turn and write results/compile_time.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    result = {"environment": environment(), "rounds": args.rounds, "target": TARGET, "rows": []}
    seconds(DEPTHS[0])  # warm-up: imports, first use of the compiler
    measured: dict[int, list[tuple[float, float]]] = {layers: [] for layers in DEPTHS}
    for _ in range(args.rounds):
        for layers in DEPTHS:
            measured[layers].append(seconds(layers))
    for layers in DEPTHS:
        lower, compile_ = (list(part) for part in zip(*measured[layers], strict=True))
        whole = [a + b for a, b in measured[layers]]
        first = [a + b for a, b in measured[DEPTHS[0]]]
        row = {
            "layers": layers,
            "lower_s": lower,
            "compile_s": compile_,
            "relative": statistics.median(b / a for a, b in zip(first, whole, strict=True)),
        }
        result["rows"].append(row)
        print(
            f"{layers:3} layers: lower {statistics.median(lower):.1f} s, compile {statistics.median(compile_):.1f} s, "
            f"{row['relative']:.2f} of {DEPTHS[0]} layers"
        )
    print("written:", write("compile_time", result))


if __name__ == "__main__":
    main()
