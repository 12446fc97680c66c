"""The whole train step of the 1.75e9-parameter model: tokens a second, share of the peak, memory."""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
import numpy as np

from benchmarks.shapes import MODEL_2B, MODEL_TINY
from dsv3_jax.config import MeshConfig, ModelConfig, RunConfig, TrainingConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.hardware import peak_flops
from dsv3_jax.hf.config import to_hf_config
from dsv3_jax.model.counts import train_flops_per_token
from dsv3_jax.parallel import make_mesh
from dsv3_jax.training.step import init_state, make_train_step

Row = dict[str, Any]


def run(small: bool, kernels: tuple[str, ...], steps: int, *, rival: bool = True) -> Row:
    """Ours with each choice of kernels, and transformers with torch.compile."""
    model, rows, length = (MODEL_TINY, 2, 32) if small else (MODEL_2B, 8, 4096)
    result: Row = {
        "model": "tiny" if small else "2B",
        "tokens": rows * length,
        "flops_per_token": train_flops_per_token(model, length),
        "ours": {name: ours(model, rows, length, name, steps) for name in kernels},
    }
    result["transformers"] = (
        theirs(model, rows, length, steps, "cpu" if small else "cuda")
        if rival
        else {"refused": "not asked for"}
    )
    peak = peak_flops(jax.devices()[0].device_kind)
    for row in (*result["ours"].values(), result["transformers"]):
        if "tokens_per_s" in row and peak:
            row["mfu"] = row["tokens_per_s"] * result["flops_per_token"] / peak
    return result


def _batch(model: ModelConfig, rows: int, length: int, seed: int) -> Row:
    tokens_BT = np.random.default_rng(seed).integers(0, model.vocab_size, (rows, length), dtype=np.int32)
    return {
        "tokens_BT": tokens_BT,
        "targets_BT": np.roll(tokens_BT, -1, axis=1),
        "segments_BT": np.ones((rows, length), np.int32),
        "positions_BT": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    }


def ours(model: ModelConfig, rows: int, length: int, kernels: str, steps: int) -> Row:
    """Whole steps, optimiser included, each waited for; another batch every step."""
    training = TrainingConfig(
        steps=1000, batch_size=rows, seq_len=length, loss_chunk=min(1024, rows * length)
    )
    cfg = RunConfig(model=model, training=training, mesh=MeshConfig(fsdp=1), kernels=kernels)
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    try:
        state = init_state(cfg, mesh)
        step = jax.jit(make_train_step(cfg, mesh), donate_argnums=0)
        start = time.perf_counter()
        state, metrics = step(state, _batch(model, rows, length, 0))
        first_loss = float(metrics["loss"])
    except ConfigError as error:
        return {"refused": str(error)}
    compile_s = time.perf_counter() - start
    seconds = []
    for n in range(1, steps + 1):
        batch = jax.device_put(_batch(model, rows, length, n))
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    memory = jax.devices()[0].memory_stats() or {}
    return _row(rows * length, seconds) | {
        "compile_s": round(compile_s, 1),
        "loss": first_loss,
        "peak_bytes": memory.get("peak_bytes_in_use"),
    }


def theirs(model: ModelConfig, rows: int, length: int, steps: int, device: str) -> Row:
    """The same architecture in transformers: bfloat16 by autocast, float32 weights, fused AdamW, torch.compile."""
    try:
        import torch
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    except ImportError as error:
        return {"refused": f"{error.name} is not installed"}
    if device == "cuda" and not torch.cuda.is_available():
        return {"refused": "torch sees no GPU"}
    theirs_config = DeepseekV3Config(**{k: v for k, v in to_hf_config(model).items() if k != "model_type"})
    theirs_config._attn_implementation, theirs_config._experts_implementation = "sdpa", "grouped_mm"
    with torch.device(device):
        net = DeepseekV3ForCausalLM(theirs_config).float()
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=device == "cuda")
    forward = torch.compile(net) if device == "cuda" else net
    seconds = []
    for n in range(steps + 1):
        tokens = torch.from_numpy(_batch(model, rows, length, n)["tokens_BT"]).long().to(device)
        start = time.perf_counter()
        try:
            with torch.autocast(device, torch.bfloat16, enabled=model.dtype == "bfloat16"):
                loss = forward(input_ids=tokens, labels=tokens).loss
            loss.backward()
        except torch.OutOfMemoryError as error:
            return {"refused": str(error).splitlines()[0]}
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    compile_s = round(seconds[0], 1)
    return _row(rows * length, seconds[1:]) | {
        "compile_s": compile_s,
        "loss": float(loss.detach()),
        "peak_bytes": peak,
    }


def _row(tokens: int, seconds: list[float]) -> Row:
    return {
        "seconds": [round(s, 5) for s in seconds],
        "tokens_per_s": tokens / statistics.median(seconds),
    }
