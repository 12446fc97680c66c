"""What is evaluated: a model that scores texts and answers prompts. Tasks see this alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from dsv3_jax.errors import DataError
from dsv3_jax.evaluation.prompts import Prompt, TextEncoder
from dsv3_jax.evaluation.scoring import BatchScorer, EngineScorer, Score, Scorer, Text
from dsv3_jax.inference import Engine, EngineOptions, Request, Sampling
from dsv3_jax.inference.batch import Job, TextWatch
from dsv3_jax.inference.load import OpenedModel
from dsv3_jax.inference.settings import context_of
from dsv3_jax.inference.weights import Weights

Answer = tuple[str, str]
"""The text, and why it ended: "stop" or "length"."""


class Encoder(Protocol):
    """Prompts of any kind to what the model reads; ids, for a text model."""

    first: int | None

    def text(self, text: str) -> list[int]:
        """Ids of a text alone."""

    def prompt(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt, to go on from."""

    def pair(self, prompt: Prompt, continuation: str) -> tuple[list[int], int]:
        """Ids of both together, and how many are the prompt's."""


class Subject(Protocol):
    """What a task may ask of a model."""

    encoder: Encoder
    context: int

    def score(self, texts: Sequence[Text], done: Callable[[int, Score], None] | None = None) -> list[Score]:
        """Scores in order; `done` is told as they come."""

    def answer(
        self,
        prompts: Sequence[tuple[list[int], Sampling]],
        done: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """Continuations in order; `done` is told as they come."""


class Model:
    """A checkpoint as a `Subject`: weights are loaded at the first question, once for scoring and decoding."""

    def __init__(self, job: Job, opened: OpenedModel, *, chat: bool = False) -> None:
        """
        Args:
          job: how the model runs; its `sampling` is not used.
          chat: prompts are turns of a user, in the checkpoint's chat format.
        """
        self._job, self._opened = job, opened
        self.encoder: Encoder = TextEncoder(opened.tokenizer, opened.cfg, chat=chat)
        self.context = opened.cfg.max_position_embeddings
        self._weights: Weights | None = None
        self._scorer: Scorer | None = None
        self._engine: Engine | None = None

    def score(self, texts: Sequence[Text], done: Callable[[int, Score], None] | None = None) -> list[Score]:
        """See `Subject`. On a mesh by the engine, else in batches."""
        if self._job.devices is not None:
            longest = max((len(text.ids) for text in texts), default=1)
            return EngineScorer(self._engine_for(longest, logprobs=True)).score(texts, done)
        if self._scorer is None:
            rows, kernels = self._job.batch_size, self._job.kernels
            self._scorer = BatchScorer(self._opened.cfg, self._load(), rows, kernels)
        return self._scorer.score(texts, done)

    def answer(
        self,
        prompts: Sequence[tuple[list[int], Sampling]],
        done: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """See `Subject`; continuous batching, prompts that begin alike are read once."""
        if not prompts:
            return []
        longest = max(len(ids) + sampling.max_new_tokens for ids, sampling in prompts)
        engine = self._engine_for(longest, logprobs=False)
        tokenizer = self._opened.tokenizer
        requests = [
            Request(np.asarray(ids, np.int32), sampling, index)
            for index, (ids, sampling) in enumerate(prompts)
        ]
        watches = {request.index: TextWatch(tokenizer, request.sampling.stop) for request in requests}
        found: dict[int, Answer] = {}
        for results in engine.run(requests, lambda request, new: watches[request.index].push(new)):
            for result in results:
                if result.error is not None:
                    raise DataError(result.error)
                index = result.request.index
                watch = watches.pop(index)
                text = watch.finish()
                found[index] = (text, "stop" if watch.stopped else result.finish_reason)
                if done is not None:
                    done(index, found[index])
        return [found[index] for index in range(len(prompts))]

    def _load(self) -> Weights:
        if self._weights is None:
            self._weights = self._opened.load(host=self._job.devices is not None)
        return self._weights

    def _engine_for(self, longest: int, *, logprobs: bool) -> Engine:
        """The engine that is there if it is long enough and gives what is asked for, else another."""
        job, cfg = self._job, self._opened.cfg
        context = context_of(min(longest, cfg.max_position_embeddings), cfg)
        old = None if self._engine is None else self._engine.options
        if old is None or (old.context or 0) < context or (logprobs and old.max_logprobs is None):
            devices = 1 if job.devices is None else job.devices.size
            options = EngineOptions(
                rows=-(-job.batch_size // devices) * devices,
                page_size=job.page_size,
                pages=job.pages,
                context=context,
                max_logprobs=1 if logprobs else None,
                kernels=job.kernels,
                speculative=job.speculative,
            )
            self._engine = None  # its pages go before the new ones come
            self._engine = Engine(
                cfg,
                self._load(),
                options=options,
                eos_ids=self._opened.eos_ids,
                vocab_limit=self._opened.vocab_limit,
                mesh=job.devices,
            )
            print(f"note: engine of {options.rows} rows, {context} tokens each", file=sys.stderr)
        assert self._engine is not None
        return self._engine


def scored(encoder: Any, prompt: Prompt, continuation: str) -> Text:
    """The continuation's tokens to be scored after the prompt."""
    ids, before = encoder.pair(prompt, continuation)
    return Text(ids, before)
