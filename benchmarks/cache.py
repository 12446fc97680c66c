"""The latent cache by storage type: what it costs a trained model, and how fast the CPU decodes over it.

    python -m benchmarks.cache quality --run DIR --text FILE .. [--name NAME]
    python -m benchmarks.cache speed                       the ~113M shape, random weights, on this machine
    python -m benchmarks.cache kv_b                        the same quantised, with kv_b in codes and whole

`quality` reads windows of held-out text through the model in the absorbed form over pages, every token attending to
what the pages hold, and compares with pages in float32; standard errors are over windows. `speed` decodes for 1 and
for 16 rows behind one prompt of 1,024 tokens that all share, storage types in turn. `kv_b` decodes with short contexts.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import environment, write
from benchmarks.quality import _trained
from convert import compare
from convert.calibrate import read_tokens
from dsv3_jax.checkpoint.source import open_source
from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.settings import token_bytes
from dsv3_jax.model import PagedCache, Transformer, abstract_variables, make_pages

DTYPES = ("float32", "bfloat16", "int8", "fp8")
PAGE, ROWS = 64, 4
PROMPT, NEW_TOKENS = 1024, 64


@functools.partial(jax.jit, static_argnums=(0, 1))
def log_probabilities(cfg: ModelConfig, dtype: str, variables: Any, tokens_BT: jax.Array) -> jax.Array:
    """float32 [B, T, V] over pages of a storage type."""
    B, T = tokens_BT.shape
    width = -(-T // PAGE)
    latent, index = make_pages(cfg, B * width, PAGE, dtype=dtype, exact_dtype="float32")
    tables_BM = jnp.arange(B * width, dtype=jnp.int32).reshape(B, width)
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    model: Any = Transformer(cfg, "absorbed")
    cache = PagedCache(latent, index, tables_BM, B * width)
    out = model.apply(variables, tokens_BT, positions_BT=positions_BT, cache=cache)
    return jax.nn.log_softmax(model.apply(variables, out.hidden_BTD, method="logits"), axis=-1)


def quality(run: Path, texts: list[Path], tokens: int, window: int) -> dict[str, Any]:
    """Perplexity, KL and agreement by storage type, and bytes of a token."""
    before = environment()
    source = open_source(run, abstract_variables)
    cfg = compare._main_model(source.cfg)
    variables = source.load("float32")
    variables["params"].pop("mtp", None)
    variables["router"].pop("mtp", None)
    rows: list[dict[str, Any]] = [{"dtype": dtype, "texts": []} for dtype in DTYPES]
    for text in texts:
        windows = read_tokens(source, text, tokens, window, "--text")
        found: dict[str, list[Any]] = {dtype: [] for dtype in DTYPES}
        for start in range(0, len(windows) // ROWS * ROWS, ROWS):
            ids = jnp.asarray(windows[start : start + ROWS])
            exact = log_probabilities(cfg, "float32", variables, ids)
            for dtype in DTYPES:
                other = log_probabilities(cfg, dtype, variables, ids)
                found[dtype].append(jax.device_get(compare._measure(exact, other, ids[:, 1:])))
        for row in rows:
            per_token = [np.concatenate(x).astype(float) for x in zip(*found[row["dtype"]], strict=True)]
            row["texts"].append(dataclasses.asdict(compare.Reference.measured(*per_token)))
            print(row["dtype"], row["texts"][-1], file=sys.stderr, flush=True)
    for row in rows:
        row["token_bytes"] = token_bytes(cfg, row["dtype"])
    return {
        "environment": before,
        "parameters": source.count_parameters(),
        "step": source.step,
        "trained": _trained(run),
        "window": window,
        "latent": cfg.kv_lora_rank,
        "rope": cfg.qk_rope_head_dim,
        "texts": [text.stem for text in texts],
        "rows": rows,
    }


SHAPE = ModelConfig(
    vocab_size=8192, hidden_size=512, intermediate_size=1536, moe_intermediate_size=256, num_hidden_layers=8,
    num_attention_heads=16, n_shared_experts=1, n_routed_experts=32, num_experts_per_tok=4, n_group=1, topk_group=1,
    first_k_dense_replace=1, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32,
    v_head_dim=64, max_position_embeddings=4096,
)  # fmt: skip


class Decoding:
    """An engine that decodes NEW_TOKENS for all its rows behind one shared prompt, over and over."""

    def __init__(self, weights: Any, rows: int, prompt: int, **options: Any) -> None:
        from dsv3_jax.inference import Engine, EngineOptions

        context = prompt + 2 * NEW_TOKENS
        sizes = EngineOptions(rows=rows, context=context, pages=rows * 20 + 40, max_logprobs=None, **options)
        self.engine = Engine(SHAPE, weights, options=sizes)
        self.engine.warm()
        self.ids = np.random.default_rng(0).integers(0, SHAPE.vocab_size, prompt, np.int32)
        self.rows = rows
        self.seconds()  # the prompt's pages are cached from now on

    def seconds(self) -> tuple[float, float]:
        """Of a step of all rows, by the clock; and of all threads together, a little of the prompt included."""
        from dsv3_jax.inference import Request, Sampling

        stats = self.engine.stats
        before, cpu = (stats.decode_seconds, stats.decode_tokens), time.process_time()
        sampling = Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        for _ in self.engine.run([Request(self.ids, sampling, at) for at in range(self.rows)]):
            pass
        stats = self.engine.stats
        steps = (stats.decode_tokens - before[1]) / self.rows
        return (stats.decode_seconds - before[0]) / steps, (time.process_time() - cpu) / steps


def take_turns(rivals: dict[str, Decoding], rounds: int, base: str) -> list[dict[str, Any]]:
    """Milliseconds of a step and speed against `base`, by rival; rivals in turn.

    On a machine that does other work the times of all threads tell more than those of the clock.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, one in rivals.items():
            seconds[name].append(one.seconds())
    rows = []
    for name, own in seconds.items():
        row: dict[str, Any] = {"name": name}
        for at, kind in enumerate(("clock", "threads")):
            ratios = [b[at] / a[at] for a, b in zip(own, seconds[base], strict=True)]
            row[kind] = {
                "step_ms": 1e3 * statistics.median(one[at] for one in own),
                "speed": statistics.median(ratios),
                "speed_min": min(ratios),
                "speed_max": max(ratios),
            }
        rows.append(row)
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def speed(rounds: int) -> dict[str, Any]:
    """Decoding by storage type of the cache."""
    from dsv3_jax.inference.weights import unstack_layers
    from dsv3_jax.model import init_variables

    before = environment()
    weights = unstack_layers(SHAPE, init_variables(SHAPE, jax.random.key(0)))
    result: dict[str, Any] = {"environment": before, "rounds": rounds, "prompt": PROMPT, "batches": {}}
    for rows in (1, 16):
        rivals = {d: Decoding(weights, rows, PROMPT, cache_dtype=d) for d in DTYPES if d != "bfloat16"}
        result["batches"][rows] = take_turns(rivals, rounds, "float32")
        for row in result["batches"][rows]:
            row["token_bytes"] = token_bytes(SHAPE, row["name"])
    return result


def kv_b(rounds: int, formats: list[str]) -> dict[str, Any]:
    """Decoding of quantised weights with kv_b in codes and whole, and the bytes of each."""
    import tempfile

    from dsv3_jax.checkpoint import save_checkpoint
    from dsv3_jax.inference.load import open_model
    from dsv3_jax.inference.weights import with_whole_kv_b
    from dsv3_jax.model import init_variables

    result: dict[str, Any] = {"environment": environment(), "rounds": rounds, "prompt": 8, "formats": {}}
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "model", SHAPE, init_variables(SHAPE, jax.random.key(0)))
        for name in formats:
            weights = open_model(Path(folder) / "model", "float32", name).load()
            nbytes = [
                sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
                for tree in (weights, with_whole_kv_b(weights, "float32"))
            ]
            own: dict[str, Any] = {"bytes_codes": nbytes[0], "bytes_whole": nbytes[1]}
            for rows in (1, 16):
                rivals = {
                    kind: Decoding(weights, rows, 8, keep_kv_b_codes=kind == "codes")
                    for kind in ("codes", "whole")
                }
                own[str(rows)] = take_turns(rivals, rounds, "codes")
                rivals.clear()
                gc.collect()
            result["formats"][name] = own
    return result


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    good = kinds.add_parser("quality")
    good.add_argument("--run", type=Path, required=True)
    good.add_argument("--text", type=Path, nargs="+", required=True)
    good.add_argument("--tokens", type=int, default=16384)
    good.add_argument("--window", type=int, default=256)
    good.add_argument("--name", default="cache_quality")
    fast = kinds.add_parser("speed")
    fast.add_argument("--rounds", type=int, default=7)
    whole = kinds.add_parser("kv_b")
    whole.add_argument("--rounds", type=int, default=7)
    whole.add_argument("--formats", nargs="+", default=["int8", "fp8", "int4:64"])
    args = parser.parse_args()
    if args.kind == "quality":
        print(write(args.name, quality(args.run, args.text, args.tokens, args.window)))
    elif args.kind == "speed":
        print(write("cache_speed", speed(args.rounds)))
    else:
        print(write("kv_b_speed", kv_b(args.rounds, args.formats)))


if __name__ == "__main__":
    main()
