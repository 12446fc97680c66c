"""The engine's decode call on a 16B-A3B model with random weights: tokens a second at several batch sizes."""

from __future__ import annotations

import functools
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shapes import MODEL_TINY, model_16b
from dsv3_jax.config import ModelConfig, parse_kernels
from dsv3_jax.errors import ConfigError
from dsv3_jax.inference import steps
from dsv3_jax.inference.device import Device
from dsv3_jax.inference.settings import EngineOptions
from dsv3_jax.inference.table import RowTable
from dsv3_jax.inference.weights import Weights, unstack_layers
from dsv3_jax.model import abstract_variables

Row = dict[str, Any]
PAGE, NEW = 64, 16


def run(small: bool, kernels: tuple[str, ...], rounds: int, peaks: Row) -> Row:
    """Rows of (kernels, batch) at a context that is filled by the cache's own values."""
    model, context, batches = (MODEL_TINY, 128, (2,)) if small else (model_16b(), 1024, (1, 64, 256))
    weights = random_weights(model)
    rows = []
    for name in kernels:
        for batch in batches:
            row = one(model, weights, batch, context, name, rounds)
            if "tokens_per_s" in row:
                # Bytes that a step must read: weights of the experts that are touched, all others, and the cache.
                row["ceiling_tokens_per_s"] = batch * peaks["bytes_per_s"] / step_bytes(model, batch, context)
            rows.append({"kernels": name, "batch": batch} | row)
    return {"model": "tiny" if small else "16B-A3B", "context": context, "rows": rows}


def random_weights(model: ModelConfig) -> Weights:
    """Normal values of standard deviation 0.02, norms 1, made on the device leaf by leaf."""
    abstract = jax.eval_shape(functools.partial(unstack_layers, model), abstract_variables(model))

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return 0.02 * jax.random.normal(key, shape, dtype)

    leaves, tree = jax.tree.flatten(abstract)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    values = [
        jnp.ones(leaf.shape, leaf.dtype) if len(leaf.shape) == 1 else normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, values)


def one(model: ModelConfig, weights: Weights, batch: int, context: int, kernels: str, rounds: int) -> Row:
    """Tokens a second of calls that give every row NEW tokens at the end of its context."""
    pages = context // PAGE
    options = EngineOptions(
        rows=batch, page_size=PAGE, pages=batch * pages + 1, context=context, prefill_tiles=1, tile=PAGE,
        steps_per_call=NEW, max_logprobs=None, cache_dtype=model.dtype, kernels=parse_kernels(kernels),
    )  # fmt: skip
    try:
        device = Device(model, weights, options, eos_ids=[], vocab_limit=model.vocab_size)
        start = time.perf_counter()
        device.compile()
    except ConfigError as error:
        return {"refused": str(error)}
    compile_s = time.perf_counter() - start
    tables_BM = jnp.asarray(1 + np.arange(batch * pages, dtype=np.int32).reshape(batch, pages))
    row = np.ones(batch, np.int32)
    state = steps.State(row, row * (context - NEW - 1), row * 10 * NEW, row * steps.LIVE)
    known_TB = np.full((NEW, batch), steps.NO_TOKEN, np.int32)
    choosing = RowTable(batch, pages, model.vocab_size).choosing()
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        _, produced = device.decode(
            state, tables_BM, known_TB, choosing, wanted=False, limit=NEW, until_one_ends=False
        )
        produced = np.asarray(produced.token_TB)
        seconds.append(time.perf_counter() - start)
        assert (produced >= 0).all(), "a row ended early"
    per_s = batch * NEW / statistics.median(seconds[1:])
    return {
        "compile_s": round(compile_s, 1),
        "seconds": [round(s, 5) for s in seconds[1:]],
        "tokens_per_s": per_s,
    }


def step_bytes(model: ModelConfig, batch: int, context: int) -> float:
    """Bytes a decode step cannot do without: each weight that is used once, and the live cache."""
    size = 2 if model.dtype == "bfloat16" else 4
    experts = model.n_routed_experts * (1 - (1 - model.num_experts_per_tok / model.n_routed_experts) ** batch)
    expert = 3 * model.hidden_size * model.moe_intermediate_size
    leaves = jax.tree.leaves(abstract_variables(model)["params"])
    whole = sum(math.prod(leaf.shape) for leaf in leaves)
    routed = model.num_moe_layers * model.n_routed_experts * expert
    embedding = model.vocab_size * model.hidden_size
    used = whole - routed - embedding + model.num_moe_layers * experts * expert
    latent = model.kv_lora_rank + model.qk_rope_head_dim
    return size * (used + batch * context * model.num_hidden_layers * latent)
