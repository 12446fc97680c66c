"""Random cases of the engine's promise: a request gives the same bits alone and in any company.

`python -m tests.inference.exactness --full` runs 200 cases of each model, of some also with a cache in codes, and
writes docs/results/engine.json.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import random
import time
from pathlib import Path

from dsv3_jax.inference import Engine, Request, Result, Sampling
from tests.inference import machine, tiny

LENGTHS = (1, 7, 8, 9, 16, 17, 31, 33, 48, 70, 100)
"""Around the edges of tiles of 8 and pages of 16 tokens."""

CODED = {"v3-int8": ("v3", "int8"), "v3-fp8": ("v3", "fp8"), "v32-fp8": ("v32", "fp8")}
"""Models whose cache holds codes."""


def draw(rng: random.Random, index: int, shared: list[int]) -> Request:
    """A random request; its prompt may begin like the others'."""
    ids = tiny.prompt(rng.choice(LENGTHS), rng.randrange(1000))
    if rng.random() < 0.5:
        ids = shared[: rng.choice((16, 32, 64))] + ids
    sampling = Sampling(
        max_new_tokens=rng.choice((1, 5, 20, 40)),
        temperature=rng.choice((0, 0, 0.8, 1.5)),
        top_k=rng.choice((0, 5)),
        top_p=rng.choice((1, 0.8)),
        seed=rng.randrange(3),
        ignore_eos=rng.random() < 0.7,
        logprobs=rng.choice((None, 0, 2)),
        prompt_logprobs=rng.choice((None, None, None, 1)),
    )
    return Request(ids, sampling, index, stream=rng.random() < 0.3)


def alone(engine: Engine, request: Request) -> Result:
    """The request with nobody else, nothing cached, and its log-probabilities."""
    engine.scheduler.pool.clear()
    return tiny.finish(engine, [request])[request.index]


def check_case(engine: Engine, seed: int) -> collections.Counter[str]:
    """One request alone, then among others that come, go and share its prefix, with its pages taken away at times.

    Returns what happened to it; raises AssertionError when a token or a bit of a log-probability differs.
    """
    rng = random.Random(seed)
    shared = tiny.prompt(64, seed)
    request = dataclasses.replace(draw(rng, 0, shared), index=0)
    sampling = dataclasses.replace(request.sampling, logprobs=2)
    request = dataclasses.replace(request, sampling=sampling)
    want = alone(engine, request)

    engine.scheduler.pool.clear()
    if rng.random() < 0.4:  # its own prefix is there already
        tiny.finish(engine, [Request(request.ids, Sampling(max_new_tokens=1))])
    company = [draw(rng, at, shared) for at in range(1, rng.randint(1, 9))]
    queue = [request, *company]
    rng.shuffle(queue)
    seen: collections.Counter[str] = collections.Counter(neighbours=len(company))
    tickets: dict[int, Request] = {}
    got = Result(request, [], "", logprobs=[])
    while not got.finish_reason:
        while queue and rng.random() < 0.6:
            one = queue.pop()
            tickets[engine.submit(one)] = one
        running = engine.scheduler.running
        if len(running) > 1 and rng.random() < 0.15:
            victim = running[-1]
            seen["preempted"] += tickets[victim.ticket] is request
            engine.scheduler._preempt(victim)
        others = [ticket for ticket, one in tickets.items() if one is not request]
        if others and rng.random() < 0.05:
            engine.cancel(rng.choice(others))
        for update in engine.step():
            if tickets[update.ticket] is not request:
                continue
            seen["prefix_hits"] += bool(update.finish_reason and update.cached_tokens)
            assert got.logprobs is not None
            got = dataclasses.replace(
                got,
                token_ids=got.token_ids + update.token_ids,
                logprobs=got.logprobs + (update.logprobs or []),
                prompt_logprobs=update.prompt_logprobs or got.prompt_logprobs,
                finish_reason=update.finish_reason or "",
                error=update.error,
            )
    for ticket in tickets:
        engine.cancel(ticket)
    engine.step()
    engine.scheduler.check()
    assert engine.idle and engine.scheduler.pool.used == 0
    assert got == want, f"case {seed}"
    seen["cases"] += 1
    seen["tokens"] += len(want.token_ids)
    return seen


def main() -> None:
    """All models, many cases; the figures of the docs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="200 cases a model and 100,000 rules")
    parts = [*tiny.CONFIGS, *CODED, "scheduler"]
    parser.add_argument(
        "--only", nargs="*", choices=parts, default=parts, help="the others stay as they were"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results/engine.json"))
    args = parser.parse_args()
    cases, rules = (200, 100_000) if args.full else (10, 2_000)
    result: dict[str, object] = {}
    if args.full and args.output.is_file():
        result = json.loads(args.output.read_text())
    for name in [name for name in parts[:-1] if name in args.only]:
        started = time.perf_counter()
        model, cache_dtype = CODED.get(name, (name, None))
        # Few pages, so that they run out by themselves too.
        engine = tiny.engine(model, pages=26, cache_dtype=cache_dtype)
        total: collections.Counter[str] = collections.Counter()
        for seed in range(cases):
            total += check_case(engine, seed)
        result[name] = {
            **total,
            "preemptions_of_all": engine.stats.preemptions,
            "prefix_hit_tokens_of_all": engine.stats.prefix_hit_tokens,
            "programs": engine.stats.programs,
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(name, result[name], flush=True)
        save(args, result)
    if "scheduler" in args.only:
        started = time.perf_counter()
        seen = machine.run(rules, seed=2026)
        result["scheduler"] = {**seen, "seconds": round(time.perf_counter() - started, 1)}
        print("scheduler", result["scheduler"], flush=True)
        save(args, result)


def save(args: argparse.Namespace, result: dict[str, object]) -> None:
    """The figures so far; a short run changes nothing on disk."""
    if args.full:
        args.output.parent.mkdir(exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
