"""Drafts change how many calls a text takes, and never the text."""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.inference import Engine, Request, Result, Sampling
from dsv3_jax.inference.guides import Guides
from dsv3_jax.inference.pace import FEW, Pace
from dsv3_jax.model import Transformer, init_variables
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.text import Tokenizer
from tests.inference import tiny

CFG = dataclasses.replace(tiny.V3, num_nextn_predict_layers=1)
K = 2

SOMETIMES = (0.05, 0.5)
"""How much main layers and module add where a third of the drafts are right."""


def weakened(tree: dict[str, Any], main: float, module: float) -> dict[str, Any]:
    """Layers that add less, or nothing: what follows a token then depends on the token alone."""

    def scale(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        factor = module if name.startswith("mtp/") else main
        return factor * leaf if name.rsplit("/", 1)[-1].startswith(("o_", "down_")) else leaf

    return {**tree, "params": jax.tree_util.tree_map_with_path(scale, tree["params"])}


@functools.cache
def projecting(sign: float, main: float = 0.0, module: float = 0.0) -> dict[str, Any]:
    """A module that hands the embedding of the token on, so that it drafts what follows it; or, negated, never that."""
    tree = weakened(variables(), main, module)
    layers, D, X = tree["params"]["mtp"]["proj_DX"].shape
    proj = sign * jnp.concatenate([jnp.eye(D), jnp.zeros((D, X - D))], axis=1)[None]
    mtp = {**tree["params"]["mtp"], "proj_DX": proj}
    return {**tree, "params": {**tree["params"], "mtp": mtp}}


@functools.cache
def variables() -> dict[str, Any]:
    """Random weights; those of the main model are `tiny.variables("v3")`."""
    tree = init_variables(CFG, jax.random.key(7))
    bias = jax.tree.map(lambda x: 0.3 * jax.random.normal(jax.random.key(1), x.shape), tree["router"])
    return {"params": tree["params"], "router": bias}


class Always(Pace):
    """Drafts in every call, whatever it costs."""

    def drafts_next(self) -> bool:
        return True


def drafting(
    k: int = K, tree: dict[str, Any] | None = None, pace: Pace | None = None, mesh: Any = None, **options: Any
) -> Engine:
    made = Engine(
        CFG,
        tree or variables(),
        options=dataclasses.replace(tiny.OPTIONS, speculative=k, **options),
        eos_ids=CFG.eos_token_id,
        vocab_limit=tiny.VOCAB_LIMIT,
        mesh=mesh,
    )
    made._pace = pace or Always()
    return made


def random_requests(rng: random.Random, count: int, prefix: list[int] | None = None) -> list[Request]:
    return [
        Request(
            (prefix or []) + tiny.prompt(rng.choice([1, 2, 9, 16, 17, 40]), at),
            Sampling(
                max_new_tokens=rng.choice([1, 2, 7, 30, 60]),
                temperature=rng.choice([0, 0, 0.7, 1.2]),
                top_p=rng.choice([1.0, 0.8]),
                seed=rng.randrange(3),
                frequency_penalty=rng.choice([0, 0, 0.6]),
                repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
                logit_bias=rng.choice([(), ((7, 2.0),)]),
                ignore_eos=rng.choice([True, False]),
                logprobs=1,
            ),
            at,
        )
        for at in range(count)
    ]


def assert_same(found: dict[int, Result], wanted: dict[int, Result]) -> None:
    assert found.keys() == wanted.keys()
    for one, other in zip(found.values(), [wanted[at] for at in found], strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason), one.request
        # Products of [rows, k + 1] and [rows, 1] tokens may be rounded differently.
        for a, b in zip(one.logprobs or [], other.logprobs or [], strict=True):
            assert a["token_id"] == b["token_id"]
            assert a["logprob"] == pytest.approx(b["logprob"], abs=2e-5)


def test_texts_are_those_of_plain_decoding() -> None:
    requests = random_requests(random.Random(1), 64)
    engine = drafting()
    engine.warm()
    programs = engine.stats.programs
    assert_same(tiny.finish(engine, requests), tiny.finish(tiny.engine("v3"), requests))
    stats = engine.stats
    assert 0 < stats.accepted < stats.drafted and stats.drafting_calls == stats.decode_calls > 0
    assert stats.programs == programs, "no program is compiled later"


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["all right", "all wrong"])
def test_drafts_that_are_all_right_or_all_wrong(sign: float) -> None:
    tree, engine = projecting(sign), drafting(tree=projecting(sign))
    requests = [
        dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, repetition_penalty=1.0))
        for request in random_requests(random.Random(2), 24)
    ]
    plain = tiny.engine("v3", {**tree, "params": {k: v for k, v in tree["params"].items() if k != "mtp"}})
    found = tiny.finish(engine, requests)
    assert_same(found, tiny.finish(plain, requests))
    stats, tokens = engine.stats, sum(len(result.token_ids) for result in found.values())
    if sign > 0:
        # But for drafts behind the end of a text, which were never tokens.
        assert stats.drafted * 0.9 < stats.accepted <= stats.drafted
        assert stats.accepted > 0.55 * tokens, "of three tokens two are drafts"
    else:
        # Under a temperature the noise can make even the least likely token both draft and choice.
        assert stats.drafted > 0.9 * tokens and stats.accepted < 0.02 * stats.drafted


def test_rows_that_lost_their_pages_and_shared_prefixes() -> None:
    shared = tiny.prompt(48, 99)  # three pages
    requests = random_requests(random.Random(3), 20, shared)
    wanted = tiny.finish(tiny.engine("v3"), requests)
    engine = drafting(pages=12)
    found = {}
    for start in range(0, 20, 5):
        found |= tiny.finish(engine, requests[start : start + 5])
        engine.scheduler.check()
    assert_same(found, wanted)
    stats = engine.stats
    assert stats.preemptions > 0 and stats.prefix_hit_tokens > 0 and stats.accepted > 0
    assert stats.pages_used == 0


@functools.cache
def _ahead() -> Any:
    model = Transformer(CFG)

    def run(tree: Any, ids: Any, following: Any) -> tuple[Any, Any]:
        hidden = model.apply(tree, ids).hidden_BTD
        ahead = model.apply(tree, hidden, following[None], method="mtp").hidden_LBTD[0]
        logits = model.apply(tree, hidden, method="logits")[0]
        return logits, model.apply(tree, ahead, method="mtp_logits")[0]

    return jax.jit(run)


class Pattern(Pace):
    """Drafts in two calls of three."""

    calls = 0

    def drafts_next(self) -> bool:
        self.calls += 1
        return self.calls % 3 != 0


def expected_counts(tree: dict[str, Any], ids: list[int], new: list[int]) -> list[int]:
    """Drafts checked and right when `Pattern` drafts one at a time, by whole passes of model and module."""
    text = np.zeros((1, 64), np.int32)
    text[0, : len(ids) + len(new)] = ids + new
    _, ahead = _ahead()(tree, text, np.roll(text, -1, axis=1))
    drafts = np.asarray(ahead)[:, : tiny.VOCAB_LIMIT].argmax(-1)
    pattern, drafted, accepted = Pattern(), 0, 0
    given = 1  # the first token comes from the prompt
    while given < len(new):
        if pattern.drafts_next() and len(new) - given > 1:  # the last token needs no draft
            drafted += 1
            # The module at the position before the last token, which it is given, drafts the next.
            right = int(drafts[len(ids) + given - 2] == new[given])
            accepted += right
            given += right
        given += 1
    return [drafted, accepted]


def test_drafts_are_the_modules_own_whatever_was_refused_before() -> None:
    """Entries of refused drafts, of tiles, and of calls without drafts leave nothing wrong behind."""
    tree = projecting(1.0, *SOMETIMES)
    engine = drafting(1, tree, page_size=64)
    sampling = Sampling(max_new_tokens=24, ignore_eos=True)
    counts = np.zeros(2, int)
    for at in range(12):
        engine._pace = Pattern()
        ids = tiny.prompt(2 + 3 * at, at)
        before = np.array([engine.stats.drafted, engine.stats.accepted])
        # One round a call, so that a call without drafts is one token.
        new = tiny.finish(engine, [Request(ids, sampling, stream=True)])[0].token_ids
        found = np.array([engine.stats.drafted, engine.stats.accepted]) - before
        assert found.tolist() == expected_counts(tree, ids, new), at
        counts += found
    assert 0.2 * counts[0] < counts[1] < 0.9 * counts[0], "right and wrong drafts are both needed"


def test_a_guided_row_and_a_streamed_one_beside_drafting_ones() -> None:
    pytest.importorskip("llguidance", reason="structured output needs the `serve` extra")
    guides = Guides(Tokenizer.bytes(), CFG.vocab_size, CFG.eos_token_id)

    def requests() -> list[Request]:
        many = random_requests(random.Random(5), 8)
        many[2] = dataclasses.replace(many[2], stream=True)
        sampling = Sampling(max_new_tokens=40, temperature=1.0, logprobs=1)
        many[4] = Request(tiny.prompt(9), sampling, 4, guide=guides.regex("([a-f]{4} ){3}"))
        return many

    engine = drafting()
    found = tiny.finish(engine, requests())
    assert_same(found, tiny.finish(tiny.engine("v3"), requests()))
    assert found[4].finish_reason == "stop" and len(found[4].token_ids) == 15
    assert engine.stats.drafted > 0
    alone = drafting()
    tiny.finish(alone, [dataclasses.replace(requests()[4], index=0)])
    assert alone.stats.drafting_calls == 0, "a call without a row that may draft is a plain one"


def test_eight_devices_draft_the_same_texts() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, expert=4, tensor=1))
    sizes = {"rows": 8, "prefill_tiles": 8, "context": 128}
    requests = random_requests(random.Random(6), 16)
    found, stats = [], []
    for devices in (None, mesh):
        engine = drafting(1, projecting(1.0, *SOMETIMES), mesh=devices, **sizes)
        found.append(tiny.finish(engine, requests))
        stats.append((engine.stats.drafted, engine.stats.accepted))
    assert stats[0] == stats[1] and stats[0][1] > 20
    assert_same(*found)


def test_sampled_texts_follow_the_models_distribution() -> None:
    """The frequencies of two tokens drawn with drafts, against the softmax of whole passes; chi-square."""
    tree = projecting(1.0, *SOMETIMES)
    main = {**tree, "params": {name: leaf for name, leaf in tree["params"].items() if name != "mtp"}}
    model = Transformer(tiny.V3)
    forward = jax.jit(lambda ids: model.apply(main, model.apply(main, ids).hidden_BTD, method="logits"))
    ids, texts, kept = tiny.prompt(5), 1500, 4

    def probabilities(start: list[int]) -> tuple[np.ndarray, np.ndarray]:
        logits = np.asarray(forward(np.array([start]))[0, -1, : tiny.VOCAB_LIMIT], np.float64)
        top = np.argsort(-logits, kind="stable")[:kept]
        weights = np.exp((logits[top] - logits[top[0]]) / 0.9)
        return top, weights / weights.sum()

    wanted: dict[tuple[int, ...], float] = {}
    for first, p in zip(*probabilities(ids), strict=True):
        for second, q in zip(*probabilities([*ids, int(first)]), strict=True):
            for third, r in zip(*probabilities([*ids, int(first), int(second)]), strict=True):
                wanted[int(first), int(second), int(third)] = p * q * r
    engine = drafting(tree=tree)
    sampling = Sampling(3, temperature=0.9, top_k=kept, ignore_eos=True)
    requests = [Request(ids, dataclasses.replace(sampling, seed=at), at) for at in range(texts)]
    found = [tuple(result.token_ids) for result in tiny.finish(engine, requests).values()]
    assert engine.stats.accepted > 100 and set(found) <= set(wanted)
    often = [text for text, p in wanted.items() if p * texts >= 5]
    expected = np.array([wanted[text] * texts for text in often])
    counts = np.array([found.count(text) for text in often])
    expected, counts = np.append(expected, texts - expected.sum()), np.append(counts, texts - counts.sum())
    kept_classes = expected > 0.5
    chi = float(((counts - expected)[kept_classes] ** 2 / expected[kept_classes]).sum())
    free = int(kept_classes.sum()) - 1
    assert free >= 10 and chi < free + 5 * np.sqrt(2 * free)


def paced(pace: Pace, calls: int, plain: float, drafting_: float, tokens: float) -> list[bool]:
    """Which of some calls draft when calls take these seconds."""
    kinds = []
    for _ in range(calls):
        drafts = pace.drafts_next()
        kinds.append(drafts)
        pace.took(drafts, drafting_ if drafts else plain, 1, tokens if drafts else 1.0)
    return kinds


def test_drafting_goes_on_while_it_pays_and_is_tried_again() -> None:
    pace = Pace(again=20)
    assert pace.pays is None
    kinds = paced(pace, 200, plain=1.0, drafting_=1.5, tokens=1.8)
    assert pace.pays and kinds.count(False) <= FEW + 1 + 200 // 20
    kinds = paced(pace, 400, plain=1.0, drafting_=1.5, tokens=1.2)  # the text has become harder to guess
    assert pace.pays is False and kinds[-100:].count(True) <= 100 // 20 * FEW + FEW
    assert kinds[-100:].count(True) > 0, "it is tried again"
    kinds = paced(pace, 600, plain=1.0, drafting_=1.5, tokens=1.9)
    assert pace.pays and kinds[-50:].count(True) >= 45
    assert (pace.drafting + pace.plain) == 1200


def test_a_model_without_the_module_cannot_draft() -> None:
    with pytest.raises(ConfigError, match="no multi-token module that could draft"):
        tiny.engine("v3", speculative=1)
    with pytest.raises(ConfigError, match="speculative is 9; expected 0 to 8"):
        dataclasses.replace(tiny.OPTIONS, speculative=9)
