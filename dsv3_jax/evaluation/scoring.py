"""Log-likelihoods of given tokens, many texts at a time.

Promise: on one device what a text gets depends on its own ids alone: not on the texts beside it, their number or
order. What it rests on: a text is padded on the right to a length that its own length decides (32, 64, 128, ...), rows
are always as many, padding is masked, and experts add a token's parts in the order of choice (docs/decisions.md). The
engine's prompt log-probabilities (`EngineScorer`) are the same numbers by other programs, equal to rounding, and the
ones that a mesh computes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import AUTO_KERNELS, Kernels, ModelConfig
from dsv3_jax.errors import DataError
from dsv3_jax.inference import Engine, Request, Sampling
from dsv3_jax.inference.steps import SCORE_FLOATS, embed, head, prompt_context, score
from dsv3_jax.inference.weights import Weights, kinds
from dsv3_jax.model.attention import Context
from dsv3_jax.model.block import Block
from dsv3_jax.model.norm import rms_norm

SHORTEST = 32
"""Tokens of the shortest program."""


@dataclasses.dataclass(frozen=True)
class Text:
    """Ids of which those from `start` (1 or more) are scored, each given all before it."""

    ids: Sequence[int]
    start: int


@dataclasses.dataclass(frozen=True)
class Score:
    """Of each scored token: its log-probability (nats, all of the vocabulary), and the likeliest id."""

    logprobs: np.ndarray
    likeliest: np.ndarray

    @property
    def total(self) -> float:
        """The log-likelihood; float64 sum."""
        return float(self.logprobs.astype(np.float64).sum())


class Scorer(Protocol):
    """What scores texts."""

    def score(self, texts: Sequence[Text], done: Callable[[int, Score], None] | None = None) -> list[Score]:
        """Scores in order; `done` is told (index, score) as they come. Raises DataError for a text out of range."""


def check(cfg: ModelConfig, text: Text) -> None:
    """Raises DataError unless the text can be scored."""
    length = len(text.ids)
    if not 1 <= text.start < length:
        raise DataError(
            f"tokens from {text.start} of {length} cannot be scored: at least one must come before one"
        )
    low, high = int(min(text.ids)), int(max(text.ids))
    if low < 0 or high >= cfg.vocab_size:
        raise DataError(
            f"token id {low if low < 0 else high} is out of range; expected 0 <= id < vocab_size = {cfg.vocab_size}"
        )
    # The last token is only predicted, never read.
    if length - 1 > cfg.max_position_embeddings:
        raise DataError(
            f"{length - 1} tokens are more than the context of {cfg.max_position_embeddings} tokens"
        )


class BatchScorer:
    """Texts in batches of `rows`, attention in its expanded form, one program a length.

    Texts that differ in their last token alone (answers A, B, C, D after one question) are one row.
    """

    def __init__(
        self, cfg: ModelConfig, weights: Weights, rows: int = 8, kernels: Kernels = AUTO_KERNELS
    ) -> None:
        self._cfg, self._weights, self._rows, self._kernels = cfg, weights, rows, kernels

    def score(self, texts: Sequence[Text], done: Callable[[int, Score], None] | None = None) -> list[Score]:
        """See `Scorer`."""
        for text in texts:
            check(self._cfg, text)
        # Rows: what the model reads -> the texts that read it.
        readers: dict[tuple[int, ...], list[int]] = {}
        for index, text in enumerate(texts):
            readers.setdefault(tuple(int(i) for i in text.ids[:-1]), []).append(index)
        lengths: dict[int, list[tuple[int, ...]]] = {}
        for row in readers:
            lengths.setdefault(self._padded(len(row)), []).append(row)
        found: dict[int, Score] = {}
        for length in sorted(lengths, reverse=True):  # the largest first: memory runs out at once or never
            rows = lengths[length]
            for at in range(0, len(rows), self._rows):
                for index, result in self._batch(rows[at : at + self._rows], length, texts, readers):
                    found[index] = result
                    if done is not None:
                        done(index, result)
        return [found[index] for index in range(len(texts))]

    def _padded(self, length: int) -> int:
        return min(max(SHORTEST, 1 << (length - 1).bit_length()), self._cfg.max_position_embeddings)

    def _batch(
        self,
        rows: list[tuple[int, ...]],
        length: int,
        texts: Sequence[Text],
        readers: dict[tuple[int, ...], list[int]],
    ) -> Iterator[tuple[int, Score]]:
        tokens_BT = np.zeros((self._rows, length), np.int32)
        positions_BT = np.full((self._rows, length), -1, np.int32)
        for at, row in enumerate(rows):
            tokens_BT[at, : len(row)] = row
            positions_BT[at, : len(row)] = np.arange(len(row))
        last_B = np.array([len(row) - 1 for row in rows] + [0] * (self._rows - len(rows)), np.int32)
        chosen_BT, likeliest_BT, finite_BT, last_BV, best_B = jax.device_get(
            _run(self._cfg, self._kernels, self._weights, tokens_BT, positions_BT, last_B)
        )
        for at, row in enumerate(rows):
            if not finite_BT[at, : len(row)].all():
                raise DataError("what the model gives for a text is not finite")
            for index in readers[row]:
                text = texts[index]
                inside = slice(text.start - 1, len(row) - 1)
                logprobs = np.append(chosen_BT[at, inside], last_BV[at, int(text.ids[-1])])
                yield index, Score(logprobs, np.append(likeliest_BT[at, inside], best_B[at]))


class EngineScorer:
    """An engine's prompt log-probabilities, over a mesh if it has one. Made with `max_logprobs` of 1 or more."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def score(self, texts: Sequence[Text], done: Callable[[int, Score], None] | None = None) -> list[Score]:
        """See `Scorer`."""
        options = Sampling(max_new_tokens=0, prompt_logprobs=1)
        requests = []
        for index, text in enumerate(texts):
            check(self._engine.cfg, text)
            requests.append(Request(np.asarray(text.ids, np.int32), options, index))
        found: dict[int, Score] = {}
        for results in self._engine.run(requests):
            for result in results:
                if result.error is not None or result.prompt_logprobs is None:
                    raise DataError(result.error or "the engine gave no log-probabilities")
                index = result.request.index
                entries: list[Any] = result.prompt_logprobs[texts[index].start :]
                found[index] = Score(
                    np.array([entry["logprob"] for entry in entries], np.float32),
                    np.array([entry["top"][0][0] for entry in entries], np.int32),
                )
                if done is not None:
                    done(index, found[index])
        return [found[index] for index in range(len(texts))]


def _run(
    cfg: ModelConfig,
    kernels: Kernels,
    weights: Weights,
    tokens_BT: np.ndarray,
    positions_BT: np.ndarray,
    last_B: np.ndarray,
) -> tuple[Any, ...]:
    """Layer by layer, so that compile time does not grow with depth."""
    x_BTD, ctx = _begin(cfg, weights.top, tokens_BT, positions_BT)
    for kind, variables in zip(kinds(cfg), weights.layers, strict=True):
        x_BTD = _layer(cfg, kind, kernels, variables, x_BTD, ctx)
    return _end(cfg, weights.top, x_BTD, tokens_BT, last_B)


@functools.partial(jax.jit, static_argnums=0)
def _begin(cfg: ModelConfig, top: Any, tokens_BT: Any, positions_BT: Any) -> tuple[jax.Array, Context]:
    return embed(cfg, top, tokens_BT), prompt_context(cfg, positions_BT)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _layer(
    cfg: ModelConfig, kind: Any, kernels: Kernels, variables: Any, x_BTD: jax.Array, ctx: Context
) -> jax.Array:
    block = Block(cfg, kind, "expanded", kernels=kernels)
    carry: Any = block.apply(variables, (x_BTD, None), jnp.int32(0), ctx)
    return carry[0][0]


@functools.partial(jax.jit, static_argnums=0)
def _end(
    cfg: ModelConfig, top: Any, x_BTD: jax.Array, tokens_BT: jax.Array, last_B: jax.Array
) -> tuple[Any, ...]:
    """Of each next token: log-probability, likeliest id, soundness; of the last position: all log-probabilities."""
    hidden_BTD = rms_norm(x_BTD, top["params"]["final_norm_D"], cfg.rms_norm_eps)
    next_BT = jnp.roll(tokens_BT, -1, axis=1)
    found, finite_BT = score(cfg, 1, SCORE_FLOATS, top, hidden_BTD, next_BT)
    last_B1D = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)
    last_BV = jax.nn.log_softmax(head(cfg, top, last_B1D)[:, 0], axis=-1)
    return found.chosen, found.top_ids[..., 0], finite_BT, last_BV, jnp.argmax(last_BV, axis=-1)
