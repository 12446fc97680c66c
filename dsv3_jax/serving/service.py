"""From a validated request to its sequences: prompts as ids, sampling options, limits, reservation."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from dsv3_jax.errors import DataError
from dsv3_jax.inference.options import RULES, Sampling
from dsv3_jax.inference.requests import Request
from dsv3_jax.serving.admission import Admission, Reservation
from dsv3_jax.serving.api_errors import ApiError, bad_request
from dsv3_jax.serving.chat import ChatTemplate, Prompt
from dsv3_jax.serving.filter import Filter, filter_messages
from dsv3_jax.serving.generation import Choice, Generation
from dsv3_jax.serving.guides import GuideMaker
from dsv3_jax.serving.metrics import Metrics
from dsv3_jax.serving.schemas import OpenAIOptions, Options
from dsv3_jax.serving.settings import Settings
from dsv3_jax.serving.text import TextStream
from dsv3_jax.serving.turns import ChatError
from dsv3_jax.serving.worker import Worker
from dsv3_jax.text import Tokenizer

T = TypeVar("T")
_OPTIONAL = (
    "temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty min_tokens ignore_eos"
).split()


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """What the server knows of the model.

    template: None where the checkpoint has no chat format.
    """

    tokenizer: Tokenizer
    vocab_size: int
    bos_id: int | None
    template: ChatTemplate | None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))


@dataclasses.dataclass(frozen=True)
class Ask:
    """One prompt of a request, and what is wanted of it.

    max_tokens: None for as many as the server's default and the context allow.
    """

    prompt: Prompt
    max_tokens: int | None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    guide: Callable[[], Any] | None = None


class Service:
    """Everything the routes share. Lives in the event loop's thread."""

    def __init__(
        self,
        model: ServedModel,
        settings: Settings,
        worker: Worker,
        metrics: Metrics,
        context: int,
        content_filter: Filter | None = None,
        guides: GuideMaker | None = None,
    ) -> None:
        """`context`: prompt and answer tokens of one sequence (see `size`)."""
        self.guides = guides
        self.model, self.settings, self.worker, self.metrics = model, settings, worker, metrics
        self.filter = content_filter
        self.admission = Admission(settings)
        self.context = context
        self.draining = False
        self._pool = ThreadPoolExecutor(
            2, thread_name_prefix="text"
        )  # tokenising a megabyte must not stop the loop

    def size(self, context: int, capacity: int) -> None:
        """Take the sizes of an engine that was made: its context, and the tokens its pages hold together."""
        self.context = min(context, capacity)
        if self.settings.max_reserved_tokens is None:
            self.admission.max_tokens = max(8 * self.context, 4 * capacity)

    def close(self) -> None:
        """End the threads that work on text."""
        self._pool.shutdown(wait=False)

    # --- state --------------------------------------------------------------------------------------------

    def unavailable(self) -> ApiError | None:
        """Why no work is taken now."""
        if self.draining:
            return ApiError(503, "the server is shutting down", code="draining", headers={"Retry-After": "5"})
        if self.worker.failure is not None:
            return ApiError(503, "the engine has failed", code="engine_failed")
        if not self.worker.ready:
            return ApiError(
                503, "the model is still being loaded", code="loading", headers={"Retry-After": "5"}
            )
        return None

    @property
    def dead(self) -> bool:
        """Whether only a new process can help."""
        return self.worker.failure is not None or self.worker.stuck_for() > self.settings.stuck_after

    # --- requests -----------------------------------------------------------------------------------------

    def check_model(self, name: str) -> None:
        """Raises the 404 of a model that is not served here."""
        if name != self.settings.model_id:
            told = "this model is not served here; GET /v1/models tells which one is"
            raise ApiError(404, told, param="model", code="model_not_found")

    async def text(self, function: Callable[[], T]) -> T:
        """Run work on text in a thread. Errors of what the client sent become a 400."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, function)
        except ChatError as error:
            raise bad_request(str(error), error.param) from None
        except DataError:
            raise bad_request("the text cannot be encoded by this model's tokenizer") from None

    async def encode(self, prompt: str | list[int], request_id: str = "", param: str = "prompt") -> Prompt:
        """A completion's prompt, what the filter hides replaced. `param`: the field that an error names."""
        if isinstance(prompt, str):
            bos, text = self.model.bos_id, await self._seen(prompt, request_id)
            return Prompt(
                await self.text(lambda: self.model.tokenizer.encode_prompt(text, bos)), [], tools=False
            )
        if max(prompt) >= self.model.vocab_size:
            raise bad_request(f"token ids must be below {self.model.vocab_size}", param)
        if self.filter is not None:
            text = self.model.tokenizer.decode(prompt)
            if await self._seen(text, request_id) != text:
                told = (
                    "the server's content filter would change this input, which it cannot in ids: send text"
                )
                raise bad_request(told, param, "content_filter")
        return Prompt(prompt, [], tools=False)

    async def render(
        self, messages: list[Any], tools: Any = None, request_id: str = "", **options: Any
    ) -> Prompt:
        """A conversation's prompt, what the filter hides replaced."""
        template = self.model.template
        if template is None:
            raise bad_request("this model has no chat format: use /v1/completions or /generate", "messages")
        given = messages, tools
        if (content_filter := self.filter) is not None:
            messages, tools, blocked = await self.text(
                lambda: filter_messages(content_filter, *given, request_id=request_id)
            )
            if blocked:
                raise _blocked()
        return await self.text(lambda: template.render(messages, tools=tools, **options))

    async def _seen(self, text: str, request_id: str) -> str:
        """`text` as the input filter lets it through. Raises the 400 of what it blocks."""
        content_filter = self.filter
        if content_filter is None:
            return text
        verdict = await self.text(lambda: content_filter.check(text, where="input", request_id=request_id))
        if verdict.blocked:
            raise _blocked()
        return verdict.text

    def sampling(
        self, options: Options, ask: Ask, *, defaults: dict[str, Any], max_new_tokens: int, seed: int
    ) -> Sampling:
        """The engine's options. Raises a 400 for one that is out of range."""
        given: dict[str, Any] = {**defaults}
        for name in _OPTIONAL:
            if (value := getattr(options, name)) is not None:
                given[name] = value
        if given.get("top_k") == -1:
            given["top_k"] = 0
        if options.stop_token_ids:
            given["stop_token_ids"] = tuple(options.stop_token_ids)
        if options.logit_bias:
            bias = tuple((int(index), value) for index, value in options.logit_bias.items())
            if any(index >= self.model.vocab_size for index, _ in bias):
                raise bad_request(f"token ids must be below {self.model.vocab_size}", "logit_bias")
            given["logit_bias"] = bias
        given |= {"max_new_tokens": max_new_tokens, "seed": seed}
        given |= {"logprobs": ask.logprobs, "prompt_logprobs": ask.prompt_logprobs}
        if given.get("min_tokens", 0) > max_new_tokens:
            raise bad_request("min_tokens is more than the answer may have", "min_tokens")
        sampling = Sampling(**given)
        for name, (good, expected) in RULES.items():
            if not good(getattr(sampling, name)):
                raise bad_request(f"{name}: expected {expected}", name)
        return sampling

    def length(self, ask: Ask) -> int:
        """New tokens a prompt may have. Raises the 400 of one that does not fit the context: nothing is cut."""
        context, prompt = self.context, len(ask.prompt.ids)
        if prompt == 0:
            raise bad_request("the prompt is empty", "prompt")
        wanted = ask.max_tokens
        if wanted is None:
            wanted = min(self.settings.default_max_tokens, max(context - prompt, 1))
        if prompt + wanted > context:
            raise bad_request(
                f"this model's context is {context} tokens; the prompt has {prompt} and the answer may have {wanted}",
                code="context_length_exceeded",
            )
        return wanted

    async def generate(
        self,
        options: Options,
        asks: Sequence[Ask],
        reservation: Reservation,
        *,
        began: float,
        request_id: str,
        defaults: dict[str, Any],
        seed: int | None,
    ) -> Generation:
        """Submit `n` sequences of every prompt; the caller must close what it gets, which keeps the reservation."""
        n = (options.n or 1) if isinstance(options, OpenAIOptions) else 1
        if any(index >= self.model.vocab_size for index in options.stop_token_ids or ()):
            raise bad_request(f"token ids must be below {self.model.vocab_size}", "stop_token_ids")
        lengths = [self.length(ask) for ask in asks]
        first_seed = secrets.randbits(62) if seed is None else seed & (2**62 - 1)
        choices = []
        for number, (ask, most) in enumerate(zip(asks, lengths, strict=True)):
            for own in range(n):
                sampling = self.sampling(
                    options, ask, defaults=defaults, max_new_tokens=most, seed=first_seed + own
                )
                text = TextStream(
                    self.model.tokenizer,
                    stop=options.stops,
                    parser=self._parser(ask),
                    primer=ask.prompt.primer,
                    content_filter=self.filter,
                    request_id=request_id,
                )
                request = self._request(options, ask, sampling)
                choices.append(Choice(number * n + own, request, text, bool(options.stream)))
        tokens = sum(len(choice.request.ids) + choice.request.sampling.max_new_tokens for choice in choices)
        reservation.add(tokens)
        generation = Generation(choices, self.worker, self.metrics, reservation, began, request_id)
        try:
            await generation.start()
        except BaseException:
            generation.close()
            raise
        reservation.kept = True
        return generation

    def _parser(self, ask: Ask) -> Any:
        if not isinstance(ask, ChatAsk) or self.model.template is None:
            return None
        return self.model.template.parser(ask.prompt.tools, ask.parallel)

    def _request(self, options: Options, ask: Ask, sampling: Sampling) -> Request:
        return Request(
            np.asarray(ask.prompt.ids, np.int32),
            sampling,
            tenant=options.cache_salt or "",
            stream=bool(options.stream),
            guide=None if ask.guide is None else ask.guide(),
        )


@dataclasses.dataclass(frozen=True)
class ChatAsk(Ask):
    """A conversation: its answer is parsed for reasoning and tool calls; several calls only if `parallel`."""

    parallel: bool = True


def _blocked() -> ApiError:
    return bad_request("the input was blocked by the server's content filter", code="content_filter")
