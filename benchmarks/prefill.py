"""Where a prompt's time goes on the CPU: `python -m benchmarks.prefill` (needs the extra `parity`).

4 prompts of 512 tokens in the engine, a call each, the same through the plain model (expanded attention, no pages) and
through transformers, in turn; then one layer of the engine in parts. Each time is given by the clock and in CPU seconds
of this process, which say more on a machine that others use. Model, shapes and threads: `benchmarks.cpu`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.common import environment, paired_ratio, write
from benchmarks.cpu import CALL, PREFILL_SHAPE, SHAPE, THREADS, TILE, Ours, Theirs, make_model
from dsv3_jax.inference import Engine, EngineOptions, Request, Sampling
from dsv3_jax.inference.steps import prompt_context
from dsv3_jax.kernels.mla_decode import paged_latent_attention, write_pages
from dsv3_jax.model.attention import Attention
from dsv3_jax.model.cache import PagedCache
from dsv3_jax.model.experts import MoE, RoutedExperts
from dsv3_jax.model.mlp import MLP
from dsv3_jax.model.router import Router

LONG = 2048
"""Tokens of the prompt whose first token is waited for."""

Run = Callable[[], Any]


def clocks(rivals: dict[str, Run], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds and CPU seconds of each, in turn, after one call each."""
    for run in rivals.values():
        jax.block_until_ready(run())
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "cpu_seconds": []} for name in rivals}
    for _ in range(rounds):
        for name, run in rivals.items():
            cpu, wall = time.process_time(), time.perf_counter()
            jax.block_until_ready(run())
            found[name]["seconds"].append(time.perf_counter() - wall)
            found[name]["cpu_seconds"].append(time.process_time() - cpu)
    return found


def sub(variables: dict[str, Any], *path: str) -> dict[str, Any]:
    """The variables of a submodule."""
    result = dict(variables)
    for key in path:
        result = {name: tree.get(key, {}) for name, tree in result.items()}
    return result


def parts(ours: Ours) -> dict[str, Run]:
    """The last layer of the engine in parts, on the shapes of its prefill call."""
    cfg, rng = ours.cfg, np.random.default_rng(0)
    B, T = 1, CALL * TILE
    tiles, pages = B * T // TILE, B * T // TILE + 1
    positions_BT = jnp.asarray(np.tile(np.arange(T, dtype=np.int32).reshape(-1, TILE), (B, 1)))
    tables_BM = jnp.asarray(np.repeat(np.arange(1, pages).reshape(B, -1), T // TILE, axis=0), jnp.int32)
    ctx = prompt_context(cfg, positions_BT)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    C, J, H = cfg.kv_lora_rank, cfg.kv_lora_rank + cfg.qk_rope_head_dim, cfg.num_attention_heads
    x_BTD, q_BTHJ = normal(tiles, TILE, cfg.hidden_size), normal(tiles, TILE, H, J)
    new_BTJ, latent_NPJ = normal(tiles, TILE, J), normal(pages, TILE, J)
    layer = ours.weights.layers[-1]
    cache = PagedCache(latent_NPJ, None, tables_BM, pages)
    choice, _ = Router(cfg).apply(sub(layer, "mlp", "router"), x_BTD, ctx.token_mask_BT)
    flat_ND = x_BTD.reshape(B * T, -1)
    first = jnp.int32(0)

    attention = jax.jit(lambda v, x, cache: Attention(cfg, "absorbed").apply(v, x, ctx, cache, first)[0])
    visit = jax.jit(
        lambda q, pages: paged_latent_attention(q, pages, tables_BM, positions_BT, value_dim=C, scale=0.1)
    )
    write_new = jax.jit(lambda pages, new: write_pages(pages, new, tables_BM, positions_BT))
    moe = jax.jit(lambda v, x: MoE(cfg).apply(v, x, ctx.token_mask_BT)[0])
    router = jax.jit(lambda v, x: Router(cfg).apply(v, x, ctx.token_mask_BT)[0])
    routed = jax.jit(lambda v, x, choice: RoutedExperts(cfg).apply(v, x, choice)[0])
    shared = jax.jit(lambda v, x: MLP(cfg, "M").apply(v, x))
    return {
        "attention": lambda: attention(sub(layer, "attention"), x_BTD, cache),
        "attention: over the pages": lambda: visit(q_BTHJ, latent_NPJ),
        "attention: page writes": lambda: write_new(latent_NPJ, new_BTJ),
        "experts": lambda: moe(sub(layer, "mlp"), x_BTD),
        "experts: routed": lambda: routed(sub(layer, "mlp", "experts"), flat_ND, choice),
        "experts: shared": lambda: shared(sub(layer, "mlp", "shared"), x_BTD),
        "experts: router": lambda: router(sub(layer, "mlp", "router"), x_BTD),
    }


def plain(ours: Ours, tokens: np.ndarray) -> Run:
    """The model without a cache, and the logits of the last tokens."""

    def run(variables: Any, tokens: jax.Array) -> jax.Array:
        hidden_BTD = ours.model.apply(variables, tokens).hidden_BTD
        return ours.model.apply(variables, hidden_BTD[:, -1:], method="logits")

    jitted, tokens = jax.jit(run), jnp.asarray(tokens)
    return lambda: jitted(ours.variables, tokens)


def first_token(ours: Ours, rounds: int) -> dict[str, Any]:
    """Seconds until the first token of a long prompt, with the engine's own defaults and nobody else."""
    engine = Engine(ours.cfg, ours.weights, options=EngineOptions(context=LONG + 64, prefix_cache=False))
    rng = np.random.default_rng(1)
    for _ in range(rounds + 1):
        ids = rng.integers(2, SHAPE["vocab_size"], LONG).tolist()
        list(engine.run([Request(ids, Sampling(max_new_tokens=1, ignore_eos=True))]))
    seconds = list(engine.stats.first_token_seconds)[1:]
    options = engine.options
    return {"tokens": LONG, "call": [options.prefill_tiles, options.tile], "seconds": seconds}


def main() -> None:
    """Measure and write results/prefill.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", default="prefill")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    tokens = np.random.default_rng(0).integers(2, SHAPE["vocab_size"], PREFILL_SHAPE)
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name))
        ours = Ours(Path(name))
        theirs = {
            f"transformers ({attention}, grouped_mm)": Theirs(Path(name), attention, "grouped_mm").prefill(
                tokens
            )
            for attention in ("eager", "sdpa")
        }
        rivals = {"engine": ours.prefill(tokens), "plain model": plain(ours, tokens), **theirs}
        whole = clocks(rivals, args.rounds)
    layer = clocks(parts(ours), args.rounds)
    result = {
        "environment": environment(),
        "shape": SHAPE,
        "prompts": PREFILL_SHAPE,
        "whole": whole,
        "ratio_to_engine": {
            name: paired_ratio(whole["engine"]["seconds"], whole[name]["seconds"])
            for name in rivals
            if name != "engine"
        },
        "layer": layer,
        "first_token": first_token(ours, min(args.rounds, 5)),
    }
    for table in (whole, layer):
        for name, times in table.items():
            wall, cpu = (statistics.median(times[key]) * 1e3 for key in ("seconds", "cpu_seconds"))
            print(f"{name:36} {wall:8.1f} ms {cpu:8.1f} CPU ms")
    print("ratios:", result["ratio_to_engine"])
    print("first token:", result["first_token"])
    print("written:", write(args.output, result))


if __name__ == "__main__":
    main()
