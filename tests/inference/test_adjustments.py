"""Penalties, biases, least lengths and masks against formulas in numpy, and rows that do not see each other."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.errors import DataError
from dsv3_jax.inference.adjustments import (
    Adjustments,
    adjust,
    begin_count,
    counted,
    make_adjustments,
    needs_adjusting,
    needs_counts,
    pack_ids,
    unpack,
)
from dsv3_jax.inference.options import Sampling, check, check_ids
from dsv3_jax.inference.sampling import RowOptions, ending_ids, ends_row, row_options, sample

V = 70
"""Not a multiple of 32: the last word of a mask is partly used."""

EOS = np.array([3, 9], np.int32)
KEY = np.array([1, 2], np.uint32)
_adjust, _begin, _counted = jax.jit(adjust), jax.jit(begin_count), jax.jit(counted)
Row = tuple[Sampling, list[int], list[int]]


@functools.partial(jax.jit, static_argnums=5)
def _sample(
    logits: Any, options: RowOptions, positions: Any, changes: Adjustments, count: Any, top: int
) -> Any:
    adjusted = adjust(logits, changes, count, positions, ending_ids(options, jnp.asarray(EOS)))
    return sample(adjusted, options, positions, top)


def adjustments(rows: list[Row], masks: Any = None) -> tuple[Adjustments, Any]:
    """Of rows given as options, prompt and produced ids; counted as the engine would."""
    count_BV = jnp.full((len(rows), V), 77, jnp.int32)  # what other rows left there
    for b, (_, _, new) in enumerate(rows):
        count_BV = _begin(count_BV, b, new[0] if new else -1)
        for index in new[1:]:
            token_B = np.full(len(rows), -1, np.int32)
            token_B[b] = index
            count_BV = _counted(count_BV, token_B)
    return make_adjustments([(s, np.asarray(ids)) for s, ids, _ in rows], V, masks), count_BV


def oracle(
    logits: np.ndarray, sampling: Sampling, prompt: list[int], new: list[int], allowed: set[int]
) -> np.ndarray:
    """One row, one id after the other, in float64."""
    result = []
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(EOS.tolist()))
    early = len(new) < sampling.min_tokens
    for index in range(V):
        x = float(logits[index])
        if index in prompt or index in new:
            x = x / sampling.repetition_penalty if x > 0 else x * sampling.repetition_penalty
        count = new.count(index)
        x -= count * sampling.frequency_penalty + (count > 0) * sampling.presence_penalty
        x += dict(sampling.logit_bias).get(index, 0.0)
        forbidden = index not in allowed or (early and index in ends and not allowed <= ends)
        result.append(-np.inf if forbidden else x)
    return np.array(result)


def random_row(rng: np.random.Generator) -> tuple[Sampling, list[int], list[int]]:
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    ids = rng.choice(V, 3, replace=False).tolist()
    sampling = Sampling(
        presence_penalty=pick(0.0, 0.0, 1.5, -2.0),
        frequency_penalty=pick(0.0, 0.0, 0.7, -0.3),
        repetition_penalty=pick(1.0, 1.0, 1.3, 0.5),
        logit_bias=pick((), ((ids[0], -100.0), (ids[1], 2.5))),
        stop_token_ids=pick((), (ids[2],)),
        min_tokens=pick(0, 4),
        ignore_eos=pick(False, True),
    )
    prompt = rng.integers(0, V, rng.integers(1, 9)).tolist()
    return check(sampling, DataError), prompt, rng.integers(0, V, rng.integers(0, 9)).tolist()


@pytest.mark.parametrize("seed", range(12))
def test_adjusted_logits_are_those_of_the_formulas(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [random_row(rng) for _ in range(8)]
    logits = (4 * rng.normal(size=(8, V))).astype(np.float32)
    allowed = [set(rng.choice(V, 20, replace=False).tolist()) if b % 2 else set(range(V)) for b in range(8)]
    allowed[5] = {3}  # only an end-of-sequence id: a least length then gives way
    masks = [pack_ids(sorted(allowed[b]), V) if b % 2 else None for b in range(8)]
    positions = np.array([len(prompt) + len(new) for _, prompt, new in rows], np.int32)
    options = row_options([row[0] for row in rows], [KEY] * 8)
    ending = np.concatenate(
        [np.where(options.stop_at_eos_B[:, None], EOS[None], -1), options.stop_ids_BS], axis=1
    )
    found = np.asarray(_adjust(logits, *adjustments(rows, masks), positions, ending))
    for b, (sampling, prompt, new) in enumerate(rows):
        want = oracle(logits[b], sampling, prompt, new, allowed[b])
        assert (np.isneginf(found[b]) == np.isneginf(want)).all()
        np.testing.assert_allclose(found[b], want, rtol=1e-6, atol=1e-5)


def test_a_row_that_asks_for_nothing_keeps_its_bits_and_a_row_does_not_see_the_others() -> None:
    rng = np.random.default_rng(1)
    plain = (Sampling(), [5, 6], [7, 8])
    rows = [random_row(rng), plain, random_row(rng), random_row(rng)]
    logits = rng.normal(size=(4, V)).astype(np.float32)
    logits[1, :2] = [0.0, -0.0]
    none = np.full((4, 1), -1, np.int32)
    positions = np.full(4, 40, np.int32)
    found = np.asarray(_adjust(logits, *adjustments(rows), positions, none))
    assert found[1].tobytes() == logits[1].tobytes()
    turned = np.asarray(_adjust(logits[::-1], *adjustments(rows[::-1]), positions, none))
    assert turned[::-1].tobytes() == found.tobytes()


def test_counts_follow_what_is_produced_and_start_again_with_a_row() -> None:
    _, count = adjustments([(Sampling(), [1], [4, 4, 9]), (Sampling(), [1], [])])
    assert np.asarray(count)[0, [4, 9, 5]].tolist() == [2, 1, 0]
    count = _counted(count, jnp.asarray([4, -1]))
    assert np.asarray(count)[0, [4, 9]].tolist() == [3, 1]
    assert not np.asarray(count)[1].any(), "-1 produced nothing"
    again = np.asarray(_begin(count, 0, 9))
    assert again[0, [4, 9]].tolist() == [0, 1] and again.sum() == 1


def test_penalties_steer_a_greedy_row_step_by_step() -> None:
    """Logits 5, 4.4, 3 and a frequency penalty of 1: counted by hand."""
    logits = np.full((1, V), -9, np.float32)
    logits[0, [10, 11, 12]] = 5.0, 4.4, 3.0
    sampling = Sampling(frequency_penalty=1.0)
    changes, count = adjustments([(sampling, [10], [])])
    options = row_options([sampling], [KEY])
    produced = []
    for step in range(6):
        token = _sample(logits, options, jnp.asarray([1 + step]), changes, count, V)
        produced.append(int(token[0]))
        count = _counted(count, token)
    # The logits of 10, 11, 12 are in turn 5 4.4 3, 4 4.4 3, 4 3.4 3, 3 3.4 3, 3 2.4 3 (lowest id), 2 2.4 3.
    assert produced == [10, 11, 10, 11, 10, 12]


def test_min_tokens_forbids_every_id_that_ends_the_row_until_then() -> None:
    sampling = Sampling(min_tokens=2, stop_token_ids=(20,))
    logits = np.zeros((1, V), np.float32)
    logits[0, [3, 9, 20, 30]] = 9, 8, 7, 6
    options = row_options([sampling], [KEY])
    adjusted = adjustments([(sampling, [1, 1, 1], [])])
    tokens = [int(_sample(logits, options, jnp.asarray([p]), *adjusted, V)[0]) for p in (3, 4, 5)]
    assert tokens == [30, 30, 3]
    on = row_options([dataclasses.replace(sampling, ignore_eos=True)], [KEY])
    assert int(_sample(logits, on, jnp.asarray([3]), *adjusted, V)[0]) == 3  # that ends nothing there


def test_where_only_the_end_is_allowed_it_comes_before_min_tokens() -> None:
    sampling = Sampling(min_tokens=2)
    logits = np.zeros((2, V), np.float32)
    options = row_options([sampling] * 2, [KEY] * 2)
    adjusted = adjustments([(sampling, [1], [])] * 2, [pack_ids([9], V), None])
    tokens = _sample(logits, options, jnp.asarray([1, 1]), *adjusted, V).tolist()
    assert tokens == [9, 0]


def test_stop_ids_end_a_row_and_eos_only_where_it_is_not_ignored() -> None:
    samplings = [
        Sampling(stop_token_ids=(20, 21)),
        Sampling(ignore_eos=True, stop_token_ids=(20,)),
        Sampling(),
    ]
    options = row_options(samplings, [KEY] * 3)
    for token, want in ((20, [True, True, False]), (21, [True, False, False]), (9, [True, False, True])):
        assert ends_row(jnp.full(3, token), options, jnp.asarray(EOS)).tolist() == want
    nothing = jnp.asarray([-2], jnp.int32)  # an engine without end-of-sequence ids
    assert ends_row(jnp.full(3, 20), options, nothing).tolist() == [True, True, False]


def chi_square(found: np.ndarray, want: np.ndarray) -> float:
    """Of counts against probabilities, as a share of its mean + 5 sigma; ids of probability 0 must not occur."""
    assert not found[want == 0].any()
    kept = want > 0
    expected = want[kept] * found.sum()
    assert expected.min() > 5, "too few draws for the test"
    value = float(((found[kept] - expected) ** 2 / expected).sum())
    free = int(kept.sum()) - 1
    return value / (free + 5 * np.sqrt(2 * free))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_frequencies_follow_the_adjusted_distribution(top_p: float) -> None:
    rows = 6000
    rng = np.random.default_rng(5)
    logits = rng.normal(size=V).astype(np.float32)
    prompt, new, allowed = [1, 2], [0, 4, 4, 5], set(range(12))
    sampling = Sampling(
        temperature=0.8,
        top_p=top_p,
        presence_penalty=0.5,
        frequency_penalty=0.4,
        repetition_penalty=1.4,
        logit_bias=((7, 1.0),),
    )
    one = adjustments([(sampling, prompt, new)], [pack_ids(sorted(allowed), V)])
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), one)
    options = row_options([sampling] * rows, [np.array([b, 5], np.uint32) for b in range(rows)])
    tokens = _sample(jnp.broadcast_to(logits, (rows, V)), options, jnp.full(rows, 6), *many, V)
    x = oracle(logits, sampling, prompt, new, allowed) / sampling.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = order[np.cumsum(p[order]) - p[order] < top_p]
    want = np.zeros(V)
    want[kept] = p[kept] / p[kept].sum()
    ratio = chi_square(np.bincount(np.asarray(tokens), minlength=V), want)
    assert ratio < 1
    wrong = np.where(want > 0, np.exp(logits), 0)  # without the adjustments the test must fail
    with pytest.raises(AssertionError):
        assert chi_square(np.bincount(np.asarray(tokens), minlength=V), wrong / wrong.sum()) < 1


def test_a_penalty_cannot_make_a_logit_infinite() -> None:
    logits = np.full((1, V), -3e38, np.float32)
    logits[0, 5] = 3e38
    adjusted = adjustments([(Sampling(repetition_penalty=0.01), [5], []), (Sampling(), [5], [])])
    found = _adjust(np.repeat(logits, 2, axis=0), *adjusted, np.zeros(2, np.int32), np.full((2, 1), -1))
    assert np.isfinite(found).all() and int(jnp.argmax(found[0])) == 5


def test_masks_pack_and_unpack() -> None:
    ids = [0, 31, 32, 63, 64, 69]
    packed = pack_ids(ids, V)
    assert packed.dtype == np.uint32 and packed.shape == (3,)
    assert packed.tolist() == [1 | 1 << 31, 1 | 1 << 31, 1 | 1 << 5]
    assert np.flatnonzero(unpack(jnp.asarray(packed[None]), V)[0]).tolist() == ids


def test_only_rows_that_ask_need_the_other_program() -> None:
    plain = Sampling(temperature=0.7, top_p=0.5, stop_token_ids=(4,))
    assert not needs_adjusting(plain) and needs_adjusting(plain, guided=True)
    for name, value in (("presence_penalty", 1.0), ("frequency_penalty", -1.0), ("repetition_penalty", 1.1)):
        one = dataclasses.replace(plain, **{name: value})
        assert needs_counts(one) and needs_adjusting(one)
    for name, value in (("logit_bias", ((1, 1.0),)), ("min_tokens", 1)):
        one = dataclasses.replace(plain, **{name: value})
        assert needs_adjusting(one) and not needs_counts(one)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("presence_penalty", 2.1),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", "1"),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("logit_bias", ((1, 101.0),)),
        ("logit_bias", ((1, 1.0), (1, 2.0))),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((True, 1.0),)),
        ("logit_bias", tuple((index, 1.0) for index in range(301))),
        ("logit_bias", [(1, 1.0)]),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (1, 1)),
        ("stop_token_ids", tuple(range(17))),
        ("stop_token_ids", (1.0,)),
        ("min_tokens", -1),
        ("min_tokens", 257),
        ("min_tokens", True),
    ],
)
def test_a_bad_option_is_named(name: str, value: Any) -> None:
    with pytest.raises(DataError, match=f"^{name} is "):
        check(dataclasses.replace(Sampling(), **{name: value}), DataError)


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    check_ids(Sampling(logit_bias=((V - 1, 1.0),), stop_token_ids=(V - 1,)), V, DataError)
    for bad in (Sampling(logit_bias=((V, 1.0),)), Sampling(stop_token_ids=(V,))):
        with pytest.raises(DataError, match=f"names token id {V}; expected 0 <= id < vocab_size = {V}"):
            check_ids(bad, V, DataError)
