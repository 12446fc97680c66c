"""How a prompt is continued: the sampling options, their ranges, and the key of a row's random numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import numpy as np

from dsv3_jax.errors import UserError

MAX_LOGPROBS = 1024
"""Largest K of logprobs and prompt_logprobs."""

MAX_BIASES = 300
"""Most entries of logit_bias."""

MAX_STOP_IDS = 16
"""Most entries of stop_token_ids."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Options of one prompt. The field names are the keys of a .jsonl line and, with dashes, the flags.

    Log-probabilities are those of the model itself: before temperature, penalties, biases and masks.

    Attributes:
      presence_penalty, frequency_penalty: OpenAI's: taken from the logit of an id that was produced, once, and once
        for each time. The prompt does not count.
      repetition_penalty: transformers': divides positive and multiplies negative logits of ids in the prompt or
        produced; 1 is off.
      logit_bias: (id, bias) pairs, added to the logits after the penalties.
      stop_token_ids: further ids that end the row; like an end-of-sequence id, not part of the output.
      min_tokens: new tokens before which no id that would end the row is chosen.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0


def _integer(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: Any, low: float, high: float) -> bool:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and math.isfinite(value) and low <= value <= high


def _count(value: Any) -> bool:
    return value is None or _integer(value, 0, MAX_LOGPROBS)


def _ids(value: Any, most: int) -> bool:
    whole = isinstance(value, tuple) and len(value) <= most and len(set(map(repr, value))) == len(value)
    return whole and all(_integer(index, 0, 2**31 - 1) for index in value)


def _biases(value: Any) -> bool:
    if not isinstance(value, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        return False
    return _ids(tuple(index for index, _ in value), MAX_BIASES) and all(
        _number(bias, -100, 100) for _, bias in value
    )


# name -> (check, what is expected). Temperatures that float32 division cannot follow are refused, not rounded.
RULES: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (lambda v: _integer(v, 0, 2**31 - 1), "an integer of 0 or more"),
    "temperature": (
        lambda v: _number(v, 0, 100) and (v == 0 or v >= 1e-5),
        "0 (greedy), or a number from 1e-5 to 100",
    ),
    "top_p": (lambda v: _number(v, 0, 1) and v > 0, "a number above 0 and at most 1"),
    "top_k": (lambda v: _integer(v, 0, 2**31 - 1), "an integer of 0 (off) or more"),
    "min_p": (lambda v: _number(v, 0, 1), "a number from 0 to 1"),
    "seed": (lambda v: _integer(v, 0, 2**63 - 1), "an integer from 0 to 2**63 - 1"),
    "stop": (
        lambda v: isinstance(v, tuple) and all(isinstance(s, str) and s for s in v),
        "non-empty strings",
    ),
    "logprobs": (_count, f"an integer from 0 to {MAX_LOGPROBS}"),
    "prompt_logprobs": (_count, f"an integer from 0 to {MAX_LOGPROBS}"),
    "ignore_eos": (lambda v: isinstance(v, bool), "true or false"),
    "presence_penalty": (lambda v: _number(v, -2, 2), "a number from -2 to 2"),
    "frequency_penalty": (lambda v: _number(v, -2, 2), "a number from -2 to 2"),
    "repetition_penalty": (lambda v: _number(v, 0.01, 100), "a number from 0.01 to 100; 1 is off"),
    "logit_bias": (_biases, f"at most {MAX_BIASES} different token ids, each with a bias from -100 to 100"),
    "stop_token_ids": (lambda v: _ids(v, MAX_STOP_IDS), f"at most {MAX_STOP_IDS} different token ids"),
    "min_tokens": (lambda v: _integer(v, 0, 2**31 - 1), "an integer of 0 or more"),
}


def check(sampling: Sampling, error: type[UserError], prefix: str = "", dash: bool = False) -> Sampling:
    """`sampling` if every option is in range; else raises `error` naming the option, its value and the range.

    Args:
      prefix, dash: how the option is spelled in the message: "--" and True for flags.
    """
    for name, (good, expected) in RULES.items():
        value = getattr(sampling, name)
        if not good(value):
            raise error(f"{_shown(name, prefix, dash)} is {str(value)[:80]!r}; expected {expected}")
    if sampling.min_tokens > sampling.max_new_tokens:
        least, most = (_shown(name, prefix, dash) for name in ("min_tokens", "max_new_tokens"))
        raise error(f"{least} is {sampling.min_tokens}; expected at most {most} = {sampling.max_new_tokens}")
    return sampling


def check_ids(
    sampling: Sampling, vocab_size: int, error: type[UserError], prefix: str = "", dash: bool = False
) -> None:
    """Raises `error` when an option names an id that the vocabulary lacks."""
    for name, ids in (
        ("logit_bias", [index for index, _ in sampling.logit_bias]),
        ("stop_token_ids", sampling.stop_token_ids),
    ):
        for index in ids:
            if index >= vocab_size:
                shown = _shown(name, prefix, dash)
                raise error(f"{shown} names token id {index}; expected 0 <= id < vocab_size = {vocab_size}")


def _shown(name: str, prefix: str, dash: bool) -> str:
    return prefix + (name.replace("_", "-") if dash else name)


def row_key(seed: int, ids: np.ndarray) -> np.ndarray:
    """uint32 [2]: the key of a row's random numbers, from the seed and the hash of its prompt ids alone.

    The position of the new token is folded in on the device, so that a row's draws depend neither on its
    place in a batch nor on the other prompts.
    """
    digest = hashlib.sha256(b"dsv3_jax sampling" + seed.to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(ids, "<i4").tobytes())
    return np.frombuffer(digest.digest()[:8], "<u4").astype(np.uint32)
