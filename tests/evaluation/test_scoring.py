"""Log-likelihoods depend on a text alone, and are the engine's and a plain forward pass's."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from dsv3_jax.errors import DataError
from dsv3_jax.evaluation.scoring import BatchScorer, EngineScorer, Score, Text
from dsv3_jax.evaluation.windows import windows
from dsv3_jax.inference.weights import unstack_layers
from tests.inference import tiny


@pytest.fixture(scope="module")
def scorer() -> BatchScorer:
    return BatchScorer(tiny.V3, unstack_layers(tiny.V3, tiny.variables("v3")), rows=4)


TEXTS = [
    Text(tiny.prompt(n, seed), start) for n, seed, start in [(9, 0, 1), (40, 1, 30), (17, 2, 16), (31, 3, 5)]
]


@pytest.fixture(scope="module")
def scores(scorer: BatchScorer) -> list[Score]:
    return scorer.score(TEXTS)


def same_bits(a: Score, b: Score) -> bool:
    return a.logprobs.tobytes() == b.logprobs.tobytes() and a.likeliest.tolist() == b.likeliest.tolist()


def test_they_are_those_of_a_plain_forward_pass(scores: list[Score]) -> None:
    for text, found in zip(TEXTS, scores, strict=True):
        logits = tiny.full_logits("v3", list(text.ids))
        want = jax.nn.log_softmax(logits, axis=-1)[np.arange(len(text.ids) - 1), np.asarray(text.ids)[1:]]
        np.testing.assert_allclose(found.logprobs, want[text.start - 1 :], atol=3e-5)
        assert found.likeliest.tolist() == logits[text.start - 1 : -1].argmax(-1).tolist()


def test_they_are_the_engines_prompt_logprobs(scores: list[Score]) -> None:
    found = EngineScorer(tiny.engine("v3")).score(TEXTS)
    for ours, theirs in zip(scores, found, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=3e-5)
        assert ours.likeliest.tolist() == theirs.likeliest.tolist()


def test_company_and_order_change_no_bit(scorer: BatchScorer, scores: list[Score]) -> None:
    for text, found in zip(TEXTS, scores, strict=True):
        assert same_bits(scorer.score([text])[0], found)
    others = [Text(tiny.prompt(20, seed), 3) for seed in range(10, 17)]
    mixed = scorer.score([*others, *reversed(TEXTS), *others])
    for found, want in zip(mixed[7:11], reversed(scores), strict=True):
        assert same_bits(found, want)


def test_answers_of_one_token_share_a_row_and_keep_their_bits(scorer: BatchScorer) -> None:
    question = tiny.prompt(12)
    texts = [Text([*question, last], 12) for last in (3, 90, 200)]
    together = scorer.score(texts)
    assert all(same_bits(a, scorer.score([text])[0]) for a, text in zip(together, texts, strict=True))
    everything = scorer.score([Text([*question, last], 12) for last in range(tiny.V3.vocab_size)])
    assert np.exp([one.total for one in everything]).sum() == pytest.approx(1, abs=1e-5)


def test_texts_out_of_range_are_refused(scorer: BatchScorer) -> None:
    for text, message in [
        (Text([1], 1), "cannot be scored"),
        (Text([1, 2], 0), "cannot be scored"),
        (Text([1, 270], 1), "token id 270 is out of range"),
        (Text([1] * 258, 1), "257 tokens are more than the context of 256"),
    ]:
        with pytest.raises(DataError, match=message):
            scorer.score([text])


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 21])
def test_windows_predict_every_token_once_and_read_all_they_can(length: int) -> None:
    ids = list(range(100, 100 + length))
    found = list(windows(ids, 8, first=5))
    assert [i for window in found for i in window.ids[window.start :]] == ids
    assert all(len(window.ids) - 1 <= 8 for window in found)
    assert found[0].ids[0] == 5
    if length > 8:
        assert len(found[-1].ids) - 1 == 8
