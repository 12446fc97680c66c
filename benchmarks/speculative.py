"""Speculative decoding on a trained model: how many drafts are right, and what they bring.

`python -m benchmarks.speculative RUN`, RUN being a run folder of configs/tiny.yaml (or another model with a multi-token
module). The same prompts are decoded without drafts, with k drafts in every call, and with the engine deciding; rounds
take turns. Texts must be equal. The share of drafts that rejection sampling would keep is computed beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import environment, paired_ratio, write
from dsv3_jax.checkpoint.source import open_source
from dsv3_jax.inference import Engine, EngineOptions, Request, Sampling
from dsv3_jax.inference.load import OpenedModel, open_model
from dsv3_jax.inference.pace import Pace
from dsv3_jax.model import Transformer, abstract_variables

MODULES = (
    "argparse asyncio collections contextlib csv datetime decimal difflib email fractions heapq json logging"
)
MODULES += " pathlib random shutil statistics string tarfile textwrap"
PROMPT, NEW_TOKENS, TEMPERATURE = 48, 96, 0.7


class Always(Pace):
    """Drafts in every call."""

    def drafts_next(self) -> bool:
        return True


RIVALS = {"plain": (0, None), "1 draft": (1, Always), "2 drafts": (2, Always), "decides": (1, Pace)}


def prompts(model: OpenedModel) -> list[list[int]]:
    """The first ids of the documentation of modules of the standard library."""
    found = []
    for name in MODULES.split():
        text = __import__(name).__doc__ or ""
        if len(ids := model.tokenizer.encode_prompt(text, model.cfg.bos_token_id)) >= PROMPT:
            found.append(ids[:PROMPT])
    return found[:16]


def rounds_of(
    engines: dict[str, Engine], requests: list[Request], rounds: int
) -> tuple[dict[str, Any], list[list[int]]]:
    """Tokens a second of each engine over rounds in turn, drafts of the last round, and whether texts are equal."""
    rates: dict[str, list[float]] = {name: [] for name in engines}
    drafts, texts = {}, {}
    for round_ in range(rounds + 1):  # the first one warms up
        for name, engine in engines.items():
            stats = engine.stats
            before = (stats.decode_tokens, stats.decode_seconds, stats.drafted, stats.accepted)
            results = {r.request.index: r.token_ids for found in engine.run(requests) for r in found}
            stats = engine.stats
            tokens, seconds = stats.decode_tokens - before[0], stats.decode_seconds - before[1]
            if round_:
                rates[name].append(tokens / seconds)
            drafts[name] = (stats.drafted - before[2], stats.accepted - before[3])
            texts[name] = [results[at] for at in range(len(requests))]
    plain = rates["plain"]
    report: dict[str, Any] = {}
    for name, rate in rates.items():
        report[name] = {"tokens_per_second": statistics.median(rate)}
        if name != "plain":
            # Seconds a token: the inverse of the rate.
            report[name]["speed_up"] = paired_ratio([1 / r for r in rate], [1 / r for r in plain])
            same = sum(a == b for a, b in zip(texts[name], texts["plain"], strict=True))
            report[name]["equal_texts"] = f"{same} of {len(requests)}"
            drafted, accepted = drafts[name]
            report[name] |= {"drafted": drafted, "accepted": accepted}
            report[name]["acceptance"] = accepted / drafted if drafted else None
    return report, texts["plain"]


def overlap(model: OpenedModel, run: str, requests: list[Request], texts: list[list[int]]) -> float:
    """Mean of sum(min(p, q)): the share of first drafts that rejection sampling would keep on these texts."""
    source = open_source(run, abstract_variables)
    tree, limit = jax.tree.map(jnp.asarray, source.load()), model.vocab_limit
    net = Transformer(dataclasses.replace(model.cfg))

    @jax.jit
    def probabilities(ids_1T: Any) -> Any:
        hidden = net.apply(tree, ids_1T).hidden_BTD
        ahead = net.apply(tree, hidden, jnp.roll(ids_1T, -1, axis=1)[None], method="mtp").hidden_LBTD[0]
        main = net.apply(tree, hidden, method="logits")[0, 1:, :limit]
        module = net.apply(tree, ahead, method="mtp_logits")[0, :-1, :limit]
        p, q = (jax.nn.softmax(logits / TEMPERATURE, axis=-1) for logits in (main, module))
        return jnp.sum(jnp.minimum(p, q), axis=-1)

    shares = []
    for request, text in zip(requests, texts, strict=True):
        ids = np.zeros((1, PROMPT + NEW_TOKENS), np.int32)
        ids[0, : PROMPT + len(text)] = [*request.ids, *text]
        # The draft of token t + 2 is made at t, of tokens up to t + 1.
        shares += np.asarray(probabilities(ids))[PROMPT - 1 : PROMPT + len(text) - 2].tolist()
    return float(np.mean(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-write", action="store_true")
    arguments = parser.parse_args()
    before = environment()
    model = open_model(arguments.run, "float32", multi_token=True)
    weights, found = model.load(), prompts(model)
    cases: dict[str, Any] = {}
    for rows in (1, 16):
        engines = {}
        for name, (k, pace) in RIVALS.items():
            options = EngineOptions(
                rows=rows, context=256, max_logprobs=None, prefix_cache=False, speculative=k
            )
            engines[name] = engine = Engine(
                model.cfg, weights, options=options, eos_ids=model.eos_ids, vocab_limit=model.vocab_limit
            )
            engine.warm()
            if pace is not None:
                engine._pace = pace()
        for temperature in (0.0, TEMPERATURE):
            sampling = Sampling(NEW_TOKENS, temperature=temperature, ignore_eos=True)
            requests = [
                Request(ids, dataclasses.replace(sampling, seed=at), at)
                for at, ids in enumerate(found[: 4 if rows == 1 else 16])
            ]
            report, texts = rounds_of(engines, requests, arguments.rounds)
            name = f"{rows} rows, temperature {temperature}"
            report["decides"]["pays"] = bool(engines["decides"].stats.drafting_pays)
            if rows == 16 and temperature:
                report["kept_by_rejection_sampling"] = overlap(model, arguments.run, requests, texts)
            cases[name] = report
            print(name, report, flush=True)
    result = {
        "environment": before,
        "model": f"configs/tiny.yaml, trained: {model.cfg.num_hidden_layers} layers and the module, float32",
        "prompts": len(found),
        "prompt_tokens": PROMPT,
        "new_tokens": NEW_TOKENS,
        "rounds": arguments.rounds,
        "cases": cases,
    }
    if not arguments.no_write:
        print(write("speculative", result))


if __name__ == "__main__":
    main()
