"""Metrics are their definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from dsv3_jax.evaluation import metrics


def test_pass_at_k_is_the_share_of_subsets_with_a_pass() -> None:
    for n, c, k in [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (7, 1, 7), (4, 3, 2)]:
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        want = sum(any(subset) for subset in subsets) / len(subsets)
        assert metrics.pass_at_k(n, c, k) == pytest.approx(want, abs=1e-12)
    with pytest.raises(ValueError, match="pass@6 of 5"):
        metrics.pass_at_k(5, 2, 6)


def test_the_error_of_a_mean_is_the_sample_deviation_over_root_n() -> None:
    found = metrics.mean([0, 1, 1, 1])
    assert found.value == 0.75 and found.error == pytest.approx(0.5 / 2)
    assert metrics.mean([1.0]).error is None


def test_ratio_errors_are_what_redrawing_texts_gives() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 300, 400)
    nats = tokens * (2 + 0.3 * rng.normal(size=400))
    draws = rng.integers(0, 400, (3000, 400))
    redrawn = nats[draws].sum(1) / tokens[draws].sum(1)
    found = metrics.ratio(nats.tolist(), tokens.tolist())
    assert found.value == pytest.approx(nats.sum() / tokens.sum())
    assert found.error == pytest.approx(redrawn.std(), rel=0.05)
    perplexity = metrics.perplexity(nats.tolist(), tokens.tolist())
    assert perplexity.value == pytest.approx(math.exp(found.value))
    assert perplexity.error == pytest.approx(np.exp(redrawn).std(), rel=0.05)


def test_bits_per_byte_of_a_uniform_guess_over_bytes_is_eight() -> None:
    assert metrics.bits_per_byte([10 * math.log(256)], [10]).value == pytest.approx(8)


def test_length_decides_only_where_it_should() -> None:
    scores, choices = [-4.0, -6.0], ["ab", "abcdef"]
    assert metrics.best(scores) == 0
    assert metrics.best_per_unit(scores, [len(text) for text in choices]) == 1
    wide = ["é" * 4, "abcde"]  # 4 characters in 8 bytes
    assert metrics.best_per_unit([-8.0, -9.0], [len(text) for text in wide]) == 1
    assert metrics.best_per_unit([-8.0, -9.0], [len(text.encode()) for text in wide]) == 0


@pytest.mark.parametrize(
    ("text", "answer", "same"),
    [
        (" 42\n", "42", True),
        ("1,234", "1234", True),
        ("1,23", "123", False),
        ("Paris", "paris", False),
        ("a  b", "a b", True),
    ],
)
def test_exact_match_forgives_space_and_thousands_alone(text: str, answer: str, same: bool) -> None:
    assert metrics.exact_match(text, [answer]) is same


def test_paired_differences_lose_what_both_share() -> None:
    hard = np.linspace(-10, 10, 50)
    found = metrics.difference((hard + 1).tolist(), hard.tolist())
    assert found.value == pytest.approx(1) and found.error == pytest.approx(0, abs=1e-9)
