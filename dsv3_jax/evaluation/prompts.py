"""Prompts as parts, so that a task may one day ask with more than text; and how text becomes ids."""

from __future__ import annotations

import dataclasses
from typing import Any

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import DataError
from dsv3_jax.text import ChatFormat, Tokenizer, chat_format, render_messages

TEXT = "text"


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a prompt: of kind "text" a string. A model that reads other kinds brings an encoder for them."""

    kind: str
    value: Any


Prompt = tuple[Part, ...]


def text_prompt(text: str) -> Prompt:
    """A prompt of one text."""
    return (Part(TEXT, text),)


def joined(parts: Prompt) -> str:
    """The text of a prompt. Raises DataError for a part that is no text."""
    for part in parts:
        if part.kind != TEXT:
            raise DataError(f"the prompt has a part of type {part.kind!r}; this model reads text only")
    return "".join(part.value for part in parts)


class TextEncoder:
    """Prompts and continuations as ids for a text model.

    A continuation's ids are those that the whole text has beyond the prompt's own, and space at the end of a prompt
    counts to the continuation, as in lm-evaluation-harness (`TemplateLM._encode_pair`). A text begins with BOS, or with
    end-of-sequence where there is none, so that its first token can be scored too. In a chat the prompt is a user's
    turn.
    """

    def __init__(self, tokenizer: Tokenizer, cfg: ModelConfig, *, chat: bool = False) -> None:
        """Raises DataError when `chat` is asked for and the tokenizer has no chat template that is supported."""
        self._tokenizer = tokenizer
        self._format: ChatFormat | None = chat_format(tokenizer) if chat else None
        first = tokenizer.bos_id if tokenizer.bos_id is not None else cfg.bos_token_id
        ends = (*cfg.eos_token_id, *tokenizer.eos_ids)
        self.first = first if first is not None else ends[0] if ends else None

    def text(self, text: str) -> list[int]:
        """Ids of a text alone, without a beginning."""
        return self._tokenizer.encode_text(text)

    def prompt(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt, to go on from."""
        text = joined(prompt)
        if self._format is not None:
            return render_messages(self._tokenizer, [{"role": "user", "content": text}], fmt=self._format)
        return self._begin() + self.text(text)

    def pair(self, prompt: Prompt, continuation: str) -> tuple[list[int], int]:
        """Ids of both together, and how many are the prompt's. Raises DataError if the continuation has none."""
        if self._format is not None:
            before = self.prompt(prompt)
            ids = before + self.text(continuation)
        else:
            text = joined(prompt)
            bare = text.rstrip()
            text, continuation = bare, text[len(bare) :] + continuation
            before = self._begin() + self.text(text)
            ids = self._begin() + self.text(text + continuation)
        if len(ids) <= len(before):
            raise DataError(f"the continuation {continuation[:40]!r} has no tokens of its own")
        return ids, len(before)

    def _begin(self) -> list[int]:
        if self.first is None:
            raise DataError("the model names no id, of a beginning or an end, that a text could begin with")
        return [self.first]
