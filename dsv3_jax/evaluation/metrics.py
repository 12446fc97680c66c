"""Metrics in their usual definitions, each with its standard error.

A value is a mean over items unless it says otherwise, and its standard error is s / sqrt(n) with the sample's deviation
s (n - 1 below), as in lm-evaluation-harness (`lm_eval/api/metrics.py`: `mean_stderr`). Of a single item there is none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Metric(NamedTuple):
    """A value over so many items, and its standard error; None where one item, or the definition, gives none."""

    value: float
    error: float | None
    items: int


def mean(values: Sequence[float]) -> Metric:
    """The mean of one value an item; ratios of counts are means of zeros and ones."""
    x = np.asarray(values, np.float64)
    error = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None
    return Metric(float(x.mean()), error, len(x))


def ratio(over: Sequence[float], under: Sequence[float]) -> Metric:
    """sum(over) / sum(under), pairs drawn together: tokens of a text depend on each other, texts less.

    The standard error is the ratio estimator's (Cochran, Sampling Techniques, 1977, section 2.11 and 6.4):
    sqrt(n / (n - 1) * sum((a - r b)^2)) / sum(b).
    """
    a, b = np.asarray(over, np.float64), np.asarray(under, np.float64)
    value = a.sum() / b.sum()
    n = len(a)
    error = math.sqrt(n / (n - 1) * float(((a - value * b) ** 2).sum())) / b.sum() if n > 1 else None
    return Metric(float(value), None if error is None else float(error), n)


def perplexity(nats: Sequence[float], tokens: Sequence[int]) -> Metric:
    """exp(nats / tokens) over all tokens; the error by the delta method."""
    rate = ratio(nats, tokens)
    value = math.exp(rate.value) if rate.value < 700 else math.inf
    return Metric(value, None if rate.error is None else value * rate.error, rate.items)


def bits_per_byte(nats: Sequence[float], sizes: Sequence[int]) -> Metric:
    """nats / (bytes ln 2), bytes of the UTF-8 text: comparable between tokenizers (Gao et al., The Pile, 2020, 3.1)."""
    rate = ratio(nats, sizes)
    scale = 1 / math.log(2)
    return Metric(rate.value * scale, None if rate.error is None else rate.error * scale, rate.items)


def best(scores: Sequence[float]) -> int:
    """Index of the highest score, the first of equals."""
    return int(np.argmax(np.asarray(scores, np.float64)))


def best_per_unit(scores: Sequence[float], sizes: Sequence[int]) -> int:
    """Index of the highest score a unit of size: a character for acc_norm, a byte of UTF-8 for acc_bytes."""
    return best([score / size for score, size in zip(scores, sizes, strict=True)])


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Chance that one of k programs drawn from `samples` passes: 1 - C(n - c, k) / C(n, k).

    The unbiased estimator of Chen et al., Evaluating Large Language Models Trained on Code, 2021, equation 1.
    """
    if not 0 < k <= samples or not 0 <= passed <= samples:
        raise ValueError(
            f"pass@{k} of {samples} samples of which {passed} pass; expected k and passes up to samples"
        )
    if samples - passed < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(samples - passed + 1, samples + 1)))


def normalised(text: str, *, ignore_case: bool = False) -> str:
    """Text as exact match compares it: outer space off, each run of space one space; lower case on request."""
    text = re.sub(r"\s+", " ", text).strip()
    return text.lower() if ignore_case else text


def exact_match(text: str, answers: Sequence[str], *, ignore_case: bool = False) -> bool:
    """Whether the text is one of the answers, both `normalised`. Numbers with thousands' commas are the number."""

    def plain(x: str) -> str:
        x = normalised(x, ignore_case=ignore_case)
        return x.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", x) else x

    return plain(text) in {plain(answer) for answer in answers}


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Metric:
    """Mean of ours - theirs, item by item: paired, so that what an item is worth to both drops out of the error."""
    return mean([a - b for a, b in zip(ours, theirs, strict=True)])
