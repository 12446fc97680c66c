"""Penalties, biases, least lengths and limits are transformers' own, where it defines them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dsv3_jax.inference.adjustments import adjust, counted, make_adjustments
from dsv3_jax.inference.options import Sampling
from dsv3_jax.inference.sampling import row_options, sample

V, EOS = 50, [3, 9]
ROWS = 8000


def theirs(logits: np.ndarray, ids: list[int], processors: list[LogitsProcessor]) -> np.ndarray:
    scores = LogitsProcessorList(processors)(torch.tensor([ids]), torch.tensor(logits[None].copy()))
    return scores[0].numpy()


@pytest.mark.parametrize("seed", range(10))
def test_logits_are_those_of_the_processors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (3 * rng.normal(size=V)).astype(np.float32)
    prompt, new = rng.integers(0, V, 6).tolist(), rng.integers(0, V, 4).tolist()
    penalty = float(rng.choice([0.6, 1.2, 2.0]))
    bias = {int(index): float(rng.normal()) for index in rng.choice(V, 3, replace=False)}
    least = int(rng.integers(2, 7))
    sampling = Sampling(repetition_penalty=penalty, logit_bias=tuple(bias.items()), min_tokens=least)
    changes, count = make_adjustments([(sampling, np.asarray(prompt))], V), jnp.zeros((1, V), jnp.int32)
    for index in new:
        count = counted(count, jnp.asarray([index]))
    position = np.array([len(prompt) + len(new)], np.int32)
    ours = np.asarray(adjust(logits[None], changes, count, position, np.array([EOS], np.int32)))[0]
    want = theirs(
        logits,
        prompt + new,
        [
            RepetitionPenaltyLogitsProcessor(penalty),
            SequenceBiasLogitsProcessor([[[index], value] for index, value in bias.items()]),
            MinNewTokensLengthLogitsProcessor(len(prompt), least, EOS),
        ],
    )
    assert np.isneginf(want).any() == (len(new) < least)
    np.testing.assert_allclose(ours, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "limits", [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9, "min_p": 0.05}]
)
def test_draws_follow_the_distribution_of_the_warpers(limits: dict[str, float]) -> None:
    rng = np.random.default_rng(0)
    logits = (1.5 * rng.normal(size=V)).astype(np.float32)
    sampling = Sampling(temperature=0.7, **limits)
    options = row_options([sampling] * ROWS, [np.array([row, 1], np.uint32) for row in range(ROWS)])
    many = jnp.broadcast_to(logits, (ROWS, V))
    tokens = np.asarray(jax.jit(sample, static_argnums=3)(many, options, jnp.full(ROWS, 4), V))
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(0.7)]
    if "top_k" in limits:
        warpers.append(TopKLogitsWarper(int(limits["top_k"])))
    if "top_p" in limits:
        warpers.append(TopPLogitsWarper(limits["top_p"]))
    if "min_p" in limits:
        warpers.append(MinPLogitsWarper(limits["min_p"]))
    scores = theirs(logits, [0], warpers).astype(np.float64)
    want = np.exp(scores - scores.max())
    want /= want.sum()
    found = np.bincount(tokens, minlength=V)
    assert not found[want == 0].any()
    often = want * ROWS >= 5  # the rest goes into one class
    classes = np.append(np.where(often, found, 0), found[~often].sum())
    expected = np.append(np.where(often, want, 0), want[~often].sum()) * ROWS
    classes, expected = classes[expected > 0], expected[expected > 0]
    chi, free = float(((classes - expected) ** 2 / expected).sum()), len(classes) - 1
    assert chi < free + 5 * np.sqrt(2 * free)
