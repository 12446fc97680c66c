"""Penalties, biases, least lengths, stop ids and structured output in the engine: what a request gets alone."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest

from dsv3_jax.errors import DataError
from dsv3_jax.inference import Engine, Request, Result, Sampling
from dsv3_jax.inference.guides import Guides
from dsv3_jax.text import Tokenizer
from tests.inference import tiny

LEAST_PAGES = 6
"""With the null page: four rows of these tests do not fit and take pages from each other."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    engine = tiny.engine("v3")
    engine.warm()
    return engine


@pytest.fixture(scope="module")
def guides() -> Guides:
    pytest.importorskip("llguidance", reason="structured output needs the `serve` extra")
    return Guides(Tokenizer.bytes(), tiny.V3.vocab_size, tiny.V3.eos_token_id)


def expected(ids: list[int], sampling: Sampling) -> list[int]:
    """Greedy tokens by the definitions, from whole passes without a cache."""
    new: list[int] = []
    ends = {*tiny.V3.eos_token_id, *sampling.stop_token_ids}
    if sampling.ignore_eos:
        ends = set(sampling.stop_token_ids)
    while len(new) < sampling.max_new_tokens:
        logits = tiny.full_logits("v3", ids + new)[-1].astype(np.float64)
        for index in {*ids, *new}:
            x, penalty = logits[index], sampling.repetition_penalty
            logits[index] = x / penalty if x > 0 else x * penalty
        for index in set(new):
            logits[index] -= sampling.frequency_penalty * new.count(index) + sampling.presence_penalty
        for index, bias in sampling.logit_bias:
            logits[index] += bias
        if len(new) < sampling.min_tokens:
            logits[sorted(ends)] = -np.inf
        token = int(np.argmax(logits[: tiny.VOCAB_LIMIT]))
        if token in ends:
            break
        new.append(token)
    return new


CASES = [
    Sampling(20, presence_penalty=1.0),
    Sampling(20, frequency_penalty=0.6, ignore_eos=True),
    Sampling(20, frequency_penalty=-2.0, ignore_eos=True),
    Sampling(20, repetition_penalty=1.5, ignore_eos=True),
    Sampling(20, logit_bias=((7, 3.0), (11, 100.0))),
    Sampling(20, logit_bias=((11, 100.0),), min_tokens=5),
    Sampling(20, presence_penalty=2.0, repetition_penalty=0.8, logit_bias=((3, -100.0),), ignore_eos=True),
]


def test_greedy_tokens_are_those_of_the_definitions(engine: Engine) -> None:
    requests = [Request(tiny.prompt(9, at), sampling, at) for at, sampling in enumerate(CASES)]
    found = tiny.finish(engine, requests)
    plain = tiny.finish(
        engine, [dataclasses.replace(r, sampling=Sampling(20, ignore_eos=True)) for r in requests]
    )
    for at, request in enumerate(requests):
        assert found[at].token_ids == expected(list(request.ids), request.sampling), request.sampling
    assert sum(found[at].token_ids != plain[at].token_ids for at in range(len(CASES))) >= 5


def test_a_stop_id_ends_a_row_and_min_tokens_keeps_it_off(engine: Engine) -> None:
    ids = tiny.prompt(6)
    whole = tiny.finish(engine, [Request(ids, Sampling(12, ignore_eos=True))])[0].token_ids
    at = next(at for at in range(3, 12) if whole[at] not in whole[:at])
    stop = Sampling(12, ignore_eos=True, stop_token_ids=(269, whole[at]), logprobs=1)
    result = tiny.finish(engine, [Request(ids, stop)])[0]
    assert (result.token_ids, result.finish_reason) == (whole[:at], "stop")
    assert result.logprobs is not None and len(result.logprobs) == at
    late = tiny.finish(engine, [Request(ids, dataclasses.replace(stop, min_tokens=at + 1))])[0].token_ids
    assert late[:at] == whole[:at] and late[at] != whole[at] and len(late) > at
    for count in (0, 1, 12):  # the least length is met exactly where an end is what the model wants
        sampling = Sampling(12, logit_bias=((11, 100.0),), min_tokens=count)
        assert len(tiny.finish(engine, [Request(ids, sampling)])[0].token_ids) == count


def random_requests(rng: random.Random, count: int, guides: Guides | None = None) -> list[Request]:
    requests = []
    for at in range(count):
        sampling = Sampling(
            max_new_tokens=rng.choice([3, 20, 40]),
            temperature=rng.choice([0, 1.0]),
            seed=rng.randrange(3),
            logprobs=1,
            presence_penalty=rng.choice([0, 0, 1.0]),
            frequency_penalty=rng.choice([0, 0, 0.5]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            logit_bias=rng.choice([(), ((5, 4.0),)]),
            min_tokens=rng.choice([0, 0, 3]),
        )
        if rng.random() < 0.4:
            sampling = Sampling(20, temperature=sampling.temperature, logprobs=1)
        guide = guides.regex("[a-f]{2,30}") if guides is not None and rng.random() < 0.3 else None
        requests.append(Request(tiny.prompt(rng.choice([1, 9, 30]), at), sampling, at, guide=guide))
    return requests


def with_fresh_guides(requests: list[Request], guides: Guides) -> list[Request]:
    return [
        r if r.guide is None else dataclasses.replace(r, guide=guides.regex("[a-f]{2,30}")) for r in requests
    ]


def same(one: Result, other: Result) -> bool:
    fields = [field.name for field in dataclasses.fields(Result) if field.name != "request"]
    return all(getattr(one, name) == getattr(other, name) for name in fields)


def test_a_request_gets_the_same_alone_with_any_neighbours_and_after_losing_its_pages(
    engine: Engine, guides: Guides
) -> None:
    requests = random_requests(random.Random(4), 16, guides)
    compiled = engine.stats.programs
    together = tiny.finish(engine, with_fresh_guides(requests, guides))
    assert sum(request.guide is not None for request in requests) >= 3
    plain = [r for r in requests if r.guide is None and r.sampling == Sampling(20, logprobs=1)]
    assert plain, "a row that asks for nothing is among those that do"
    backwards = tiny.finish(engine, with_fresh_guides(requests[::-1], guides))
    tight = tiny.engine("v3", pages=LEAST_PAGES)
    short = tiny.finish(tight, with_fresh_guides(requests, guides))
    assert tight.stats.preemptions > 0
    for at, request in enumerate(requests):
        (one,) = with_fresh_guides([request], guides)
        alone = tiny.finish(engine, [one])[at]
        for other in (together[at], backwards[at], short[at]):
            assert same(alone, other), (at, request.sampling)
    assert engine.stats.programs == compiled, "no option needs another program"


def test_guided_text_matches_and_ends_itself(engine: Engine, guides: Guides) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 999, "minimum": 0}, "b": {"enum": ["x", "yy"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    sampling = Sampling(
        max_new_tokens=150, temperature=1.0, logit_bias=((32, -100.0), (10, -100.0), (9, -100.0))
    )
    requests = [
        Request(
            tiny.prompt(7, at), dataclasses.replace(sampling, seed=at), at, guide=guides.json_schema(schema)
        )
        for at in range(6)
    ]
    found = tiny.finish(engine, requests)
    for result in found.values():
        assert result.finish_reason == "stop"
        value = json.loads(Tokenizer.bytes().decode(result.token_ids))
        assert 0 <= value["a"] <= 999 and value["b"] in ("x", "yy")
    assert len({tuple(result.token_ids) for result in found.values()}) > 1


class Failing:
    """A guide that cannot go on after two tokens."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def mask(self) -> np.ndarray:
        if len(self.seen) == 2:
            raise DataError("structured output: too complex")
        return np.full(9, 0xFFFFFFFF, np.uint32)

    def accept(self, token_id: int) -> None:
        self.seen.append(token_id)


def test_a_guide_that_fails_ends_its_row_alone(engine: Engine) -> None:
    sampling = Sampling(9, ignore_eos=True)
    good = Request(tiny.prompt(8), sampling, 0)
    bad = Request(tiny.prompt(9), dataclasses.replace(sampling, ignore_eos=False), 1, guide=Failing())
    found = tiny.finish(engine, [good, bad])
    assert (found[1].finish_reason, found[1].error) == ("error", "structured output: too complex")
    assert same(found[0], tiny.finish(engine, [good])[0]) and len(found[0].token_ids) == 9
    assert engine.scheduler.pool.used == 0


def test_options_that_name_no_id_are_refused(engine: Engine) -> None:
    for sampling in (Sampling(3, logit_bias=((270, 1.0),)), Sampling(3, stop_token_ids=(270,))):
        with pytest.raises(DataError, match="names token id 270"):
            engine.submit(Request([1], sampling))
    with pytest.raises(DataError, match="ignore_eos cannot be used with structured output"):
        engine.submit(Request([1], Sampling(3, ignore_eos=True), guide=Failing()))
    assert engine.idle
