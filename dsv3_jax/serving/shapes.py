"""How each route writes its answers: OpenAI's chat and completion objects, and /generate's."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from dsv3_jax.serving.generation import Choice, News
from dsv3_jax.serving.tokens import TokenOffsets, token_text
from dsv3_jax.text import Tokenizer

_LEAST_LOGPROB = -9999.0
"""What is sent for a token that cannot be: JSON has no infinity."""


def usage(choices: Sequence[Choice], n: int) -> dict[str, Any]:
    """Token counts; the prompt of `n` choices is counted once."""
    prompt = sum(choice.prompt_tokens for choice in choices[::n])
    new = sum(choice.text.consumed for choice in choices)
    cached = sum(choice.cached_tokens for choice in choices[::n])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": min(cached, prompt)},
    }


class TokenNames:
    """Tokens as OpenAI names them: their text, their bytes, and where they are in a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def offsets(self) -> TokenOffsets:
        """Of a new text."""
        return TokenOffsets(self._tokenizer)

    def chat(self, entry: Any) -> dict[str, Any]:
        """An element of a chat's logprobs.content."""
        return {
            **self._one(entry["token_id"], entry["logprob"]),
            "top_logprobs": [self._one(*top) for top in entry["top"]],
        }

    def _one(self, index: int, logprob: float) -> dict[str, Any]:
        token = token_text(self._tokenizer, index)
        data = list(token.text.encode()) if token.bytes is None else token.bytes
        return {"token": token.text, "logprob": finite(logprob), "bytes": data}

    def completion(self, entries: Sequence[Any], offsets: TokenOffsets, top: int) -> dict[str, Any]:
        """A completion's logprobs; None stands for a prompt's first token when its id is not known."""
        tokens = offsets.push(entry["token_id"] for entry in entries)
        tops = [
            None
            if entry["logprob"] is None
            else {token_text(self._tokenizer, index).text: finite(value) for index, value in entry["top"]}
            for entry in entries
        ]
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [
                None if entry["logprob"] is None else finite(entry["logprob"]) for entry in entries
            ],
            "top_logprobs": tops if top else None,
            "text_offset": [token.offset for token in tokens],
        }


def finite(logprob: float) -> float:
    """A number JSON can carry."""
    return max(float(logprob), _LEAST_LOGPROB)


class OpenAIShape:
    """What chat and completion objects share."""

    done = b"data: [DONE]\n\n"

    def __init__(
        self, names: TokenNames, model: str, n: int, include_usage: bool, prefix: str, kind: str
    ) -> None:
        self.names, self.n, self.include_usage = names, n, include_usage
        self.head = {
            "id": f"{prefix}-{secrets.token_hex(16)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "choices": choices, **({"usage": None} if self.include_usage else {})}

    def last(self, choices: Sequence[Choice]) -> Iterable[dict[str, Any]]:
        """The usage, if it was asked for."""
        return [{**self.head, "choices": [], "usage": usage(choices, self.n)}] if self.include_usage else []

    def _whole(self, choices: Sequence[Choice], found: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "choices": found, "usage": usage(choices, self.n)}


class ChatShape(OpenAIShape):
    """chat.completion and chat.completion.chunk."""

    def __init__(
        self, names: TokenNames, model: str, n: int, *, stream: bool, include_usage: bool, logprobs: bool
    ):
        kind = "chat.completion.chunk" if stream else "chat.completion"
        super().__init__(names, model, n, include_usage, "chatcmpl", kind)
        self.logprobs = logprobs

    def _logprobs(self, entries: Sequence[Any]) -> dict[str, Any] | None:
        return (
            {"content": [self.names.chat(entry) for entry in entries], "refusal": None}
            if self.logprobs
            else None
        )

    def _choice(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def first(self) -> Iterable[dict[str, Any]]:
        """Says who speaks; sent with the first news of a choice instead."""
        return []

    def event(self, choice: Choice, news: News) -> Iterable[dict[str, Any]]:
        """A chunk a delta; log-probabilities ride on the first."""
        logprobs = self._logprobs(news.logprobs) if news.logprobs else None
        deltas: list[dict[str, Any]] = [delta.to_json() for delta in news.deltas]
        if not choice.opened:
            choice.opened = True
            deltas = [{"role": "assistant", "content": ""}, *deltas]
        for delta in deltas or ([{}] if logprobs and choice.finish_reason is None else []):
            yield self._chunk([self._choice(choice.index, delta, logprobs)])
            logprobs = None
        if choice.finish_reason is not None:
            yield self._chunk([self._choice(choice.index, {}, logprobs, choice.finish_reason)])

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The chat.completion object."""
        found = [
            {
                "index": choice.index,
                "message": {**choice.text.answer.to_json(), "refusal": None},
                "logprobs": self._logprobs(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return self._whole(choices, found)


class CompletionShape(OpenAIShape):
    """text_completion, whole or in chunks."""

    def __init__(
        self,
        names: TokenNames,
        model: str,
        n: int,
        *,
        include_usage: bool,
        logprobs: int | None,
        echo: list[str] | None,
    ) -> None:
        """`echo`: the text of each prompt, to come before its answers, or None."""
        super().__init__(names, model, n, include_usage, "cmpl", "text_completion")
        self.top, self.echo = logprobs, echo
        self._offsets: dict[int, TokenOffsets] = {}

    def first(self) -> Iterable[dict[str, Any]]:
        """Nothing."""
        return []

    def _choice(
        self, choice: Choice, text: str, entries: Sequence[Any], reason: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.top is not None and entries:
            offsets = self._offsets.setdefault(choice.index, self.names.offsets())
            logprobs = self.names.completion(entries, offsets, self.top)
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _echoed(self, choice: Choice) -> tuple[str, list[Any]]:
        """The prompt, once, and the log-probabilities of its tokens."""
        if self.echo is None or choice.opened:
            return "", []
        choice.opened = True
        known = choice.prompt_logprobs or []
        entries = [
            entry or {"token_id": int(index), "logprob": None, "top": []}
            for index, entry in zip(choice.request.ids, known, strict=False)
        ]
        return self.echo[choice.index // self.n], entries

    def event(self, choice: Choice, news: News) -> Iterable[dict[str, Any]]:
        """One chunk."""
        text, entries = self._echoed(choice)
        text += "".join(delta.content for delta in news.deltas)
        entries = [*entries, *news.logprobs]
        if text or entries or choice.finish_reason is not None:
            yield self._chunk([self._choice(choice, text, entries, choice.finish_reason)])

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The text_completion object."""
        found = []
        for choice in choices:
            text, entries = self._echoed(choice)
            text += choice.text.answer.content
            found.append(self._choice(choice, text, [*entries, *choice.logprobs], choice.finish_reason))
        return self._whole(choices, found)


class GenerateShape:
    """/generate: the same keys whole and in events; texts and ids of events add up to the whole."""

    done = b""

    def __init__(self, show_ids: bool = True) -> None:
        """`show_ids`: not beside a content filter: ids hold the text."""
        self._show_ids = show_ids

    def first(self) -> Iterable[dict[str, Any]]:
        """Nothing."""
        return []

    def last(self, choices: Sequence[Choice]) -> Iterable[dict[str, Any]]:
        """Nothing: the last event carries the finish reason."""
        return []

    def _object(self, choice: Choice, text: str, ids: list[int]) -> dict[str, Any]:
        return {
            "text": text,
            "token_ids": ids if self._show_ids else [],
            "finish_reason": choice.finish_reason,
            "prompt_tokens": choice.prompt_tokens,
            "completion_tokens": choice.text.consumed,
        }

    def event(self, choice: Choice, news: News) -> Iterable[dict[str, Any]]:
        """What is new."""
        yield self._object(choice, "".join(delta.content for delta in news.deltas), news.token_ids)

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """All of it."""
        (choice,) = choices
        return self._object(choice, choice.text.answer.content, choice.token_ids)
