"""Benchmark of the engine: `python -m benchmarks.engine` (the part `transformers` needs the extra `parity`).

The ~113M-parameter shape of benchmarks/cpu.py, float32, two threads, random weights. Rivals take turns; ratios are
per round.

- decode: tokens/s of 1, 16 and 64 requests that decode together, against a plain batched greedy loop of the same
  model over a cache in one piece, which knows no requests;
- overhead: a step of the engine that gives every request one token, against the device call inside it;
- tiles: prompt tokens/s and the wait of a short prompt for other sizes of the prefill call;
- first token: how long a new request waits for it while others decode;
- transformers: `generate` on as many prompts at once, end to end, with the fastest of its settings known from
  benchmarks/cpu.py.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import jax  # noqa: E402  (thread settings come first)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.common import environment, interleave, paired_ratio, write  # noqa: E402
from dsv3_jax.config import ModelConfig  # noqa: E402
from dsv3_jax.hf.any_config import load_model_config  # noqa: E402
from dsv3_jax.inference import Engine, EngineOptions, Request, Sampling  # noqa: E402
from dsv3_jax.inference.weights import Weights, kinds, unstack_layers  # noqa: E402
from dsv3_jax.model import Cache, Transformer, init_variables, make_cache  # noqa: E402
from dsv3_jax.model.attention import Context  # noqa: E402
from dsv3_jax.model.block import Block  # noqa: E402
from dsv3_jax.model.norm import rms_norm  # noqa: E402
from dsv3_jax.model.rope import rope_tables  # noqa: E402

CONFIG = Path(__file__).parent.parent / "configs" / "small-100m.yaml"
PROMPT, NEW_TOKENS = 128, 32
CONCURRENT = (1, 16, 64)
STEPS = 16
TILES = ((2, 32), (4, 32), (8, 32), (16, 32), (4, 64))

Run = Callable[[], None]


def plain_loop(
    cfg: ModelConfig, weights: Weights, cache: Cache, token_B: jax.Array, position_B: jax.Array
) -> tuple[Cache, jax.Array]:
    """STEPS greedy tokens of every row over a cache in one piece; no requests, no ends, no options."""
    top = weights.top["params"]

    def step(_: int, carry: tuple[Cache, jax.Array, jax.Array]) -> tuple[Cache, jax.Array, jax.Array]:
        cache, token_B, position_B = carry
        positions = position_B[:, None]
        ctx = Context(rope_tables(cfg, positions), positions, None, positions >= 0)
        x = top["embed_VD"][token_B][:, None]
        for layer, (kind, variables) in enumerate(zip(kinds(cfg), weights.layers, strict=True)):
            (x, cache), _ = Block(cfg, kind, "absorbed").apply(variables, (x, cache), jnp.int32(layer), ctx)
        hidden = rms_norm(x, top["final_norm_D"], cfg.rms_norm_eps)
        logits = Transformer(cfg).apply(weights.top, hidden, method="logits")[:, 0]
        return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32), position_B + 1

    cache, token_B, _ = jax.lax.fori_loop(0, STEPS, step, (cache, token_B, position_B))
    return cache, token_B


class Bench:
    """One model, engines of several sizes."""

    def __init__(self, cfg: ModelConfig, weights: Weights) -> None:
        self.cfg, self.weights = cfg, weights
        self.rng = np.random.default_rng(0)

    def prompt(self) -> np.ndarray:
        return self.rng.integers(2, self.cfg.vocab_size, PROMPT).astype(np.int32)

    def engine(self, rows: int) -> Engine:
        options = EngineOptions(
            rows=rows, context=512, steps_per_call=STEPS, max_logprobs=None, prefix_cache=False
        )
        engine = Engine(self.cfg, self.weights, options=options)
        engine.warm()
        return engine

    def full(self, rows: int) -> Engine:
        """An engine whose every row decodes, with room for many more tokens."""
        engine = self.engine(rows)
        sampling = Sampling(max_new_tokens=512 - PROMPT, ignore_eos=True)
        for _ in range(rows):
            engine.submit(Request(self.prompt(), sampling))
        while engine.scheduler.waiting or any(s.in_prompt for s in engine.scheduler.running):
            engine.step()
        engine.step()
        return engine

    def decode(self, engine: Engine, rounds: int) -> dict[str, Any]:
        """Tokens/s of the engine and of the plain loop."""
        rows = engine.options.rows
        cache = make_cache(self.cfg, rows, 512)
        position_B = jnp.full((rows,), PROMPT, jnp.int32)
        token_B = jnp.asarray(self.rng.integers(2, self.cfg.vocab_size, rows), jnp.int32)
        loop = jax.jit(functools.partial(plain_loop, self.cfg), donate_argnums=1)

        def plain() -> None:
            nonlocal cache
            cache, tokens = loop(self.weights, cache, token_B, position_B)
            jax.block_until_ready(tokens)

        def ours() -> None:
            found = engine.step()
            assert sum(len(update.token_ids) for update in found) == rows * STEPS

        seconds = interleave({"engine": ours, "plain": plain}, rounds)
        return {
            "tokens_per_s": {
                name: rows * STEPS / statistics.median(times) for name, times in seconds.items()
            },
            "ratio": paired_ratio(seconds["engine"], seconds["plain"]),
        }

    def overhead(self, engine: Engine, rounds: int) -> dict[str, Any]:
        """A step that gives each row one token: all of it, and what is not the device's call.

        The call is timed inside the step, so that both are of the same moment on a machine whose speed drifts.
        """
        for sequence in engine.scheduler.running:
            sequence.one_by_one = True  # as if every request were streamed
        device, shares, steps = engine._device, [], []
        call = device.decode

        def timed(*args: Any, **options: Any) -> Any:
            nonlocal inside
            started = time.perf_counter()
            found = jax.block_until_ready(call(*args, **options))
            inside = time.perf_counter() - started
            return found

        inside = 0.0
        device.decode = timed  # type: ignore[method-assign]
        for _ in range(rounds):
            started = time.perf_counter()
            engine.step()
            steps.append(time.perf_counter() - started)
            shares.append((steps[-1] - inside) / steps[-1])
        return {
            "step_ms": 1e3 * statistics.median(steps),
            "host_share": {
                "median": statistics.median(shares),
                "min": min(shares),
                "max": max(shares),
            },
        }

    def first_token(self, rows: int, rounds: int) -> dict[str, Any]:
        """Seconds from submit to first token of a request that comes while rows - 1 others decode."""
        engine = self.engine(rows)
        going: set[int] = set()
        waits = []
        sampling = Sampling(max_new_tokens=256, ignore_eos=True)
        for _ in range(rounds + 1):
            while len(going) < rows - 1:
                going.add(engine.submit(Request(self.prompt(), sampling, stream=True)))
                while any(s.in_prompt for s in engine.scheduler.running) or engine.scheduler.waiting:
                    going -= {update.ticket for update in engine.step() if update.finish_reason}
            started = time.perf_counter()
            ticket = engine.submit(Request(self.prompt(), Sampling(max_new_tokens=1), stream=True))
            while True:
                found = engine.step()
                going -= {update.ticket for update in found if update.finish_reason}
                if any(update.ticket == ticket for update in found):
                    break
            waits.append(time.perf_counter() - started)
        return {
            "others": rows - 1,
            "prompt": PROMPT,
            "median_s": statistics.median(waits[1:]),
            "max_s": max(waits[1:]),
        }

    def tiles(self, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
        """Reading prompts with another size of the prefill call: a long one, and a short one alone."""
        options = EngineOptions(
            rows=1, context=1024, prefill_tiles=shape[0], tile=shape[1], max_logprobs=None, prefix_cache=False
        )
        engine = Engine(self.cfg, self.weights, options=options)

        def read(length: int) -> Run:
            def run() -> None:
                ids = self.rng.integers(2, self.cfg.vocab_size, length).astype(np.int32)
                for _ in engine.run([Request(ids, Sampling(max_new_tokens=1))]):
                    pass

            return run

        seconds = interleave({"long": read(768), "short": read(20)}, rounds)
        return {
            "long_tokens_per_s": 768 / statistics.median(seconds["long"]),
            "short_s": statistics.median(seconds["short"]),
        }

    def whole(self, rows: int) -> Run:
        """As many prompts as rows, end to end."""
        engine = self.engine(rows)
        sampling = Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True)

        def run() -> None:
            requests = [Request(self.prompt(), sampling, at) for at in range(rows)]
            results = [result for found in engine.run(requests) for result in found]
            assert sum(len(result.token_ids) for result in results) == rows * NEW_TOKENS

        return run


def transformers_rivals(rounds: int) -> dict[str, Any]:
    """`generate` of transformers beside the engine, the same weights on both sides."""
    import torch

    from benchmarks.cpu import Theirs, make_model
    from dsv3_jax.checkpoint.source import open_source
    from dsv3_jax.model import abstract_variables

    torch.set_num_threads(THREADS)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name))
        source = open_source(name, abstract_variables)
        bench = Bench(
            source.cfg, unstack_layers(source.cfg, jax.tree.map(jnp.asarray, source.load("float32")))
        )
        theirs = Theirs(Path(name), "sdpa", "grouped_mm")
        for rows in CONCURRENT[:2]:

            def generate(rows: int = rows) -> None:
                ids = torch.from_numpy(np.stack([bench.prompt() for _ in range(rows)]).astype(np.int64))
                with torch.no_grad():
                    out = theirs.model.generate(
                        ids,
                        max_new_tokens=NEW_TOKENS,
                        min_new_tokens=NEW_TOKENS,
                        do_sample=False,
                        pad_token_id=0,
                    )
                assert out.shape == (rows, PROMPT + NEW_TOKENS)

            seconds = interleave({"engine": bench.whole(rows), "transformers": generate}, rounds)
            found[str(rows)] = {
                "seconds": {name: statistics.median(times) for name, times in seconds.items()},
                "ratio": paired_ratio(seconds["engine"], seconds["transformers"]),
            }
    return found


def main() -> None:
    """Run everything and write results/engine.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parts = ("first", "decode", "tiles", "transformers")
    parser.add_argument("--only", nargs="*", choices=parts, default=parts)
    parser.add_argument("--output", default="engine")
    args = parser.parse_args()
    cfg, _ = load_model_config(CONFIG)
    bench = Bench(cfg, unstack_layers(cfg, init_variables(cfg, jax.random.key(0))))
    result: dict[str, Any] = {
        "environment": environment(),
        "rounds": args.rounds,
        "decode": {},
        "overhead": {},
        "tiles": {},
    }
    if "first" in args.only:
        result["first_token"] = bench.first_token(16, args.rounds)
        print("first token", result["first_token"], flush=True)
        write(args.output, result)  # after each: what was measured survives a kill
    for rows in CONCURRENT if "decode" in args.only else ():
        engine = bench.full(rows)
        result["decode"][str(rows)] = bench.decode(engine, args.rounds)
        result["overhead"][str(rows)] = bench.overhead(engine, 10 * args.rounds)
        print(rows, result["decode"][str(rows)], result["overhead"][str(rows)], flush=True)
        write(args.output, result)
    for shape in TILES if "tiles" in args.only else ():
        result["tiles"][f"{shape[0]} x {shape[1]}"] = found = bench.tiles(shape, args.rounds)
        print("tiles", shape, found, flush=True)
    path = write(args.output, result)
    if "transformers" in args.only:
        result["transformers"] = transformers_rivals(args.rounds)
        print("transformers", result["transformers"], flush=True)
        path = write(args.output, result)
    print("written:", path)


if __name__ == "__main__":
    main()
