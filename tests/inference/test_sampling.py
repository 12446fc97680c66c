"""Choosing tokens: greedy ties, what each limit keeps, frequencies, and rows that do not see each other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference.options import row_key
from dsv3_jax.inference.sampling import RowOptions, sample, token_logprobs

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.25, 0.05], np.float32))


def options(rows: int, seed: int = 0, **values: float) -> RowOptions:
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | values
    return RowOptions(
        key_B2=np.random.default_rng(seed).integers(0, 2**32, (rows, 2), dtype=np.uint32),
        temperature_B=jnp.full(rows, full["temperature"], jnp.float32),
        top_k_B=jnp.full(rows, int(full["top_k"]), jnp.int32),
        top_p_B=jnp.full(rows, full["top_p"], jnp.float32),
        min_p_B=jnp.full(rows, full["min_p"], jnp.float32),
        stop_at_eos_B=jnp.ones(rows, bool),
        stop_ids_BS=jnp.full((rows, 2), -1, jnp.int32),
    )


_sample = jax.jit(sample, static_argnums=3)


def draw(
    logits: np.ndarray, rows: int, limit: int | None = None, seed: int = 0, **values: float
) -> np.ndarray:
    many = jnp.broadcast_to(jnp.asarray(logits)[None], (rows, len(logits)))
    return np.asarray(_sample(many, options(rows, seed, **values), jnp.arange(rows), limit or len(logits)))


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    assert draw(np.array([1, 7, 3, 7, 7], np.float32), 1, temperature=0) == [1]


def test_ids_from_the_limit_on_are_never_chosen() -> None:
    logits = np.array([0.0, 0.1, 50.0], np.float32)
    assert draw(logits, 1, limit=2, temperature=0) == [1]
    assert set(draw(logits, 500, limit=2, temperature=5.0)) == {0, 1}


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 1}, {1}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.3}, {1}),
        ({"top_p": 0.6}, {1, 3}),
        ({"top_p": 0.7}, {1, 2, 3}),
        ({"top_p": 1e-6}, {1}),
        ({"min_p": 0.45}, {1, 2, 3}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 3, "top_p": 0.7}, {1, 3}),  # of 0.4, 0.25, 0.2 the first two are 76 %
    ],
)
def test_limits_keep_exactly(values: dict[str, float], kept: set[int]) -> None:
    assert set(draw(LOGITS, 3000, **values).tolist()) == kept


def test_top_k_breaks_ties_by_id() -> None:
    assert set(draw(np.zeros(6, np.float32), 500, top_k=2).tolist()) == {0, 1}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    rows = 20000
    found = np.bincount(draw(LOGITS, rows, temperature=temperature), minlength=5) / rows
    weights = np.exp(LOGITS / temperature)
    # Five standard deviations of a proportion at this many draws.
    np.testing.assert_allclose(found, weights / weights.sum(), atol=5 * np.sqrt(0.25 / rows))


def test_lowest_temperature_is_greedy_and_finite() -> None:
    logits = np.array([-3e4, 5.0, 3e4, -np.float32(3e38)], np.float32)
    assert set(draw(logits, 50, temperature=1e-5).tolist()) == {2}


def test_a_row_does_not_see_the_others() -> None:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, 50)), jnp.float32)
    plain = options(6)
    token = np.asarray(_sample(logits, plain, jnp.arange(6), 50))
    mixed = RowOptions(
        key_B2=plain.key_B2,
        temperature_B=jnp.asarray([1, 0, 1, 0, 1, 1], jnp.float32),
        top_k_B=jnp.asarray([0, 0, 0, 3, 0, 2], jnp.int32),
        top_p_B=jnp.asarray([1, 1, 1, 0.5, 1, 0.9], jnp.float32),
        min_p_B=plain.min_p_B,
        stop_at_eos_B=plain.stop_at_eos_B,
        stop_ids_BS=plain.stop_ids_BS,
    )
    other = np.asarray(_sample(logits, mixed, jnp.arange(6), 50))
    assert other[[0, 2, 4]].tolist() == token[[0, 2, 4]].tolist()
    swapped = jax.tree.map(lambda x: x[::-1], mixed)
    backwards = np.asarray(_sample(logits[::-1], swapped, jnp.arange(6)[::-1], 50))
    assert backwards[::-1].tolist() == other.tolist()


def test_key_is_of_seed_and_ids_alone() -> None:
    ids = np.array([1, 2, 3], np.int32)
    assert row_key(5, ids).tolist() == row_key(5, ids.astype(np.int64)).tolist()
    assert row_key(5, ids).tolist() != row_key(6, ids).tolist()
    assert row_key(5, ids).tolist() != row_key(5, ids[::-1]).tolist()


def test_logprobs_are_natural_logs_over_all_ids() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 3, 40)).astype(np.float32) * 5
    tokens = np.array([[0, 5, 39], [7, 7, 7]])
    found = token_logprobs(jnp.asarray(logits), jnp.asarray(tokens), 4)
    wide = logits.astype(np.float64)
    want = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        found.chosen, np.take_along_axis(want, tokens[..., None], -1)[..., 0], atol=1e-5
    )
    best = np.argsort(-want, axis=-1, kind="stable")[..., :4]
    assert found.top_ids.tolist() == best.tolist()
    np.testing.assert_allclose(found.top, np.take_along_axis(want, best, -1), atol=1e-5)
    assert token_logprobs(jnp.asarray(logits), jnp.asarray(tokens), 0).top.shape == (2, 3, 0)
