"""What goes into the engine and what comes out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import DataError
from dsv3_jax.inference.options import Sampling
from dsv3_jax.inference.sampling import TokenLogprobs

Entry = dict[str, Any]


class Follower(Protocol):
    """Structured output, e.g. `guides.Guide`."""

    def mask(self) -> np.ndarray:
        """uint32 [W]: ids that may come next (`Adjustments.mask_BW`). Raises DataError when that cannot be said."""

    def accept(self, token_id: int) -> None:
        """Take the id that came. Raises DataError when it may not."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt as token ids and how to continue it.

    Attributes:
      index: the caller's.
      tenant: whose cached prefixes the prompt may use; no tenant can tell what another has cached.
      stream: every token is wanted as soon as it is known; else a step may bring several.
      guide: says which ids may come next, and is told what came; of this request alone.
    """

    ids: Sequence[int] | np.ndarray
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    index: int = 0
    tenant: str = ""
    stream: bool = False
    guide: Follower | None = None


@dataclasses.dataclass
class Update:
    """What a step brought for a request.

    Attributes:
      ticket: of the request.
      token_ids: new tokens, without the end-of-sequence id that ended them.
      logprobs: an entry for each of them, {"token_id", "logprob", "top": [[id, logprob], ...]}, or None if not
        asked for.
      prompt_logprobs: an entry per prompt token, the first None; once, with the first tokens; else None.
      finish_reason: None while it goes on; "stop", "length", "error" or "cancelled".
      error: the reason for "error".
      cached_tokens: prompt tokens that the prefix cache saved.
      queue_seconds, prefill_seconds: from submission to the first step that took it up (compiling included, where
        the engine is not warm), and from there to this update; once, with the first tokens (or the end, if it
        comes before any); else None.
    """

    ticket: int
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[Entry] | None = None
    prompt_logprobs: list[Entry | None] | None = None
    finish_reason: str | None = None
    error: str | None = None
    cached_tokens: int = 0
    queue_seconds: float | None = None
    prefill_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a request; the fields are those of its updates together."""

    request: Request
    token_ids: list[int]
    finish_reason: str
    error: str | None = None
    logprobs: list[Entry] | None = None
    prompt_logprobs: list[Entry | None] | None = None


def check_prompt(
    cfg: ModelConfig, ids: Sequence[int] | np.ndarray, max_new_tokens: int, context: int | None = None
) -> None:
    """Raises DataError unless the ids are in range and the prompt fits the context with its new tokens.

    Args: context: by default the model's.
    """
    if len(ids) == 0:
        raise DataError("the prompt has no tokens; at least one is needed")
    low, high = int(min(ids)), int(max(ids))
    if low < 0 or high >= cfg.vocab_size:
        bad = low if low < 0 else high
        raise DataError(f"token id {bad} is out of range; expected 0 <= id < vocab_size = {cfg.vocab_size}")
    context = context or cfg.max_position_embeddings
    if len(ids) + max_new_tokens > context:
        raise DataError(
            f"the prompt has {len(ids)} tokens and max_new_tokens is {max_new_tokens}: together more than the "
            f"context of {context} tokens"
        )


def entry(token: int, logprobs: TokenLogprobs, at: tuple[int, int], count: int) -> Entry:
    """The log-probabilities of one position in the form of the output; `count` of the likeliest ids."""
    ids, values = logprobs.top_ids[at][:count], logprobs.top[at][:count]
    top = [[int(i), float(v)] for i, v in zip(ids, values, strict=True)]
    return {"token_id": token, "logprob": float(logprobs.chosen[at]), "top": top}
