"""The first 5 losses on every mesh of 1, 2, 3, 4, 6 and 8 devices: `python -m benchmarks.meshes [--devices N ...]`.

Simulated CPU devices, float32, the real step: every way to write the number of devices as data x fsdp x expert x
tensor against one device. The default tests hold a few of these meshes; this is all of them.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
)

import jax
import numpy as np

from benchmarks.common import environment, write
from dsv3_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from dsv3_jax.parallel import make_mesh
from dsv3_jax.training.step import batch_sharding, init_state, make_train_step

STEPS, TOLERANCE = 5, 1e-5
# Every size has the divisors 2, 3, 4, 6 and 8 that it needs.
MODEL = ModelConfig(
    vocab_size=64, hidden_size=48, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=24, n_shared_experts=1, n_routed_experts=24, num_experts_per_tok=4, first_k_dense_replace=1,
    q_lora_rank=24, kv_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_group=4, topk_group=2,
    max_position_embeddings=64, num_nextn_predict_layers=1, initializer_range=0.1,
)  # fmt: skip
# A low rate: Adam's first steps are sign-like and would amplify rounding into another choice of experts.
RUN = RunConfig(
    model=MODEL,
    training=TrainingConfig(steps=20, batch_size=24, seq_len=16, balance_loss_alpha=0.01),
    optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2),
)


def batch(seed: int) -> dict[str, np.ndarray]:
    """Random rows of two documents each."""
    rng, (B, T) = np.random.default_rng(seed), (RUN.training.batch_size, RUN.training.seq_len)
    at, cut = np.arange(T)[None, :], rng.integers(2, T - 2, (B, 1))
    return {
        "tokens_BT": rng.integers(0, MODEL.vocab_size, (B, T), dtype=np.int32),
        "targets_BT": rng.integers(0, MODEL.vocab_size, (B, T), dtype=np.int32),
        "segments_BT": np.where(at < cut, 1, 2).astype(np.int32),
        "positions_BT": np.where(at < cut, at, at - cut).astype(np.int32),
    }


def run(axes: tuple[int, ...]) -> tuple[list[float], np.ndarray]:
    """Losses of the first steps and the expert counts of the first, on data x fsdp x expert x tensor."""
    mesh = make_mesh(MeshConfig(*axes), jax.devices()[: math.prod(axes)])
    step = jax.jit(make_train_step(RUN, mesh), donate_argnums=0)
    state, losses, counts = init_state(RUN, mesh), [], None
    for number in range(STEPS):
        state, metrics = step(state, jax.device_put(batch(number), batch_sharding(mesh)))
        losses.append(float(metrics["loss"]))
        counts = np.asarray(metrics["expert_counts_LE"]) if counts is None else counts
    return losses, counts


def main() -> int:
    """Run all meshes; write results/meshes.json; 1 when one of them differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="*", default=[1, 2, 3, 4, 6, 8])
    args = parser.parse_args()
    result: dict[str, Any] = {
        "environment": environment(),
        "steps": STEPS,
        "tolerance": TOLERANCE,
        "rows": [],
    }
    want, want_counts = run((1, 1, 1, 1))
    result.update(losses=want, worst=0.0)
    for devices in args.devices:
        factors = [n for n in range(1, devices + 1) if devices % n == 0]
        for axes in itertools.product(factors, repeat=4):
            if math.prod(axes) != devices:
                continue
            losses, counts = run(axes)
            jax.clear_caches()
            difference = max(abs(a - b) for a, b in zip(losses, want, strict=True))
            same = bool((counts == want_counts).all())
            result["rows"].append(
                {"axes": axes, "max_difference": difference, "same_counts_in_first_step": same}
            )
            result["worst"] = max(result["worst"], difference if same else math.inf)
            names = zip(("data", "fsdp", "expert", "tensor"), axes, strict=True)
            shown = " x ".join(f"{name} {n}" for name, n in names if n > 1) or "one device"
            path = write("meshes", result)  # after each mesh: what was run survives a kill
            print(f"{shown:40} {difference:.2e} {'' if same else 'OTHER COUNTS'}", flush=True)
    print(f"{len(result['rows'])} meshes, worst {result['worst']:.2e}; written:", path)
    return 0 if result["worst"] <= TOLERANCE else 1


if __name__ == "__main__":
    raise SystemExit(main())
