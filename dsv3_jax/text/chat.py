"""Conversations as token ids, in the chat format of the checkpoint.

A conversation is rendered piece by piece: control strings of the format become ids, contents go through
`encode_text`, where whatever they spell stays text. The checkpoint's Jinja template is never used for that.
It only tells which of the formats below is meant: it is rendered, in Jinja's sandbox, over the probe
conversations, and a format that gives the same strings is taken. A template that equals none is refused.

Formats: DeepSeek-V2 ("User: …\\n\\nAssistant: …"), and V2.5, V3, R1, V3.1 with their dialects (`DeepSeekV3`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv3_jax.errors import DataError
from dsv3_jax.text.tokenizer import NO_TEXT, Tokenizer

Message = Mapping[str, str]


class Piece(NamedTuple):
    """Part of a rendered conversation: a control string (one id) or text."""

    text: str
    control: bool = False


class ChatFormat(Protocol):
    """A way to write a conversation. `bos` and `eos` are the spellings of the checkpoint's tokens."""

    def pieces(self, messages: Sequence[Message], bos: str, eos: str, generate: bool) -> list[Piece]:
        """The conversation, followed by the opening of an answer if `generate`."""
        ...


@dataclass(frozen=True)
class DeepSeekV2:
    """`{bos}{system}\\n\\nUser: {user}\\n\\nAssistant: {answer}{eos}`; also the byte tokenizer's format."""

    def pieces(self, messages: Sequence[Message], bos: str, eos: str, generate: bool) -> list[Piece]:
        """See `ChatFormat.pieces`."""
        out = [Piece(bos, control=True)]
        for message in messages:
            content = message["content"]
            if message["role"] == "system":
                out.append(Piece(f"{content}\n\n"))
            elif message["role"] == "user":
                out.append(Piece(f"User: {content}\n\n"))
            else:
                out += [Piece(f"Assistant: {content}"), Piece(eos, control=True)]
        return [*out, Piece("Assistant:")] if generate else out


_USER, _ASSISTANT = Piece("<｜User｜>", control=True), Piece("<｜Assistant｜>", control=True)
_THINK, _END_THINK = Piece("<think>", control=True), Piece("</think>", control=True)
_NEWLINE = Piece("\n")


@dataclass(frozen=True)
class DeepSeekV3:
    """`{bos}{system}<｜User｜>{user}<｜Assistant｜>{answer}{eos}` in the dialects that were published.

    opens: what writes `<｜Assistant｜>`: the answer (V2.5, V3, R1), the question (V3-0324), or the answer if
      it follows a question (V3.1 and later). It decides what happens when roles do not alternate.
    strip: of an earlier answer keep what follows the "last" or "first" `</think>`, or all of it (None).
    history: what stands between `<｜Assistant｜>` and an earlier answer.
    start: what stands between `<｜Assistant｜>` and the answer to generate.
    systems: all system messages "joined" by a blank line, or the "last" one alone.
    """

    opens: Literal["answer", "question", "reply"] = "answer"
    strip: Literal["first", "last"] | None = None
    history: tuple[Piece, ...] = ()
    start: tuple[Piece, ...] = ()
    systems: Literal["joined", "last"] = "joined"

    def stripped(self, content: str) -> str:
        """What is kept of an earlier answer."""
        if self.strip is None or "</think>" not in content:
            return content
        return content.split("</think>", 1)[1] if self.strip == "first" else content.rsplit("</think>", 1)[1]

    def pieces(self, messages: Sequence[Message], bos: str, eos: str, generate: bool) -> list[Piece]:
        """See `ChatFormat.pieces`."""
        systems = [message["content"] for message in messages if message["role"] == "system"]
        joined = "\n\n".join(systems) if self.systems == "joined" else "".join(systems[-1:])
        out = [Piece(bos, control=True), Piece(joined)]
        asked = False  # the last turn is a question
        for message in messages:
            if message["role"] == "user":
                out += [_USER, Piece(message["content"])]
                out += [_ASSISTANT] if self.opens == "question" else []
                asked = True
            elif message["role"] == "assistant":
                if self.opens == "answer" or (self.opens == "reply" and asked):
                    out += [_ASSISTANT, *self.history]
                out += [Piece(self.stripped(message["content"])), Piece(eos, control=True)]
                asked = False
        if generate and {"answer": True, "question": not asked, "reply": asked}[self.opens]:
            out += [_ASSISTANT, *self.start]
        return out


def _dialects() -> list[ChatFormat]:
    starts: tuple[tuple[Piece, ...], ...] = (
        (),
        (_THINK, _NEWLINE),
        (_END_THINK,),
        (_THINK,),
        (_THINK, _END_THINK),
        (_THINK, _NEWLINE, _END_THINK, _NEWLINE),
    )
    strips: tuple[Literal["first", "last"] | None, ...] = (None, "last", "first")
    found: list[ChatFormat] = [DeepSeekV2()]
    systems: tuple[Literal["joined", "last"], ...] = ("joined", "last")
    for strip, start, system in itertools.product(strips, starts, systems):
        found.append(DeepSeekV3("answer", strip, (), start, system))
        found.append(DeepSeekV3("question", strip, (), start, system))
        for history in ((), (_END_THINK,), (_THINK, _END_THINK)):
            found.append(DeepSeekV3("reply", strip, history, start, system))
    return found


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# Conversations that tell all formats above apart.
_PROBES: tuple[list[dict[str, str]], ...] = (
    [_message("user", "ask one")],
    [_message("system", "rule"), _message("user", "ask one")],
    [_message("user", "ask one"), _message("assistant", "say one"), _message("user", "ask two")],
    [
        _message("system", "rule one"),
        _message("user", "ask one"),
        _message("assistant", "<think>a</think>b</think>say one"),
        _message("user", "ask two"),
        _message("user", "ask three"),
        _message("assistant", "say two"),
        _message("system", "rule two"),
        _message("assistant", "say three"),
    ],
)


def _join(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def special_text(tokenizer: Tokenizer, key: str) -> str | None:
    """Spelling of the token that tokenizer_config.json names under `key`, or None."""
    value = tokenizer.config.get(key)
    return value.get("content") if isinstance(value, dict) else value


def render_template(template: str, messages: Sequence[Message], bos: str, eos: str, generate: bool) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    compiled = environment.from_string(template)
    return compiled.render(messages=messages, bos_token=bos, eos_token=eos, add_generation_prompt=generate)


def chat_format(tokenizer: Tokenizer) -> ChatFormat:
    """The format of the tokenizer's chat template.

    Raises DataError for a tokenizer that cannot encode text, has no template, or an unsupported one.
    """
    origin = tokenizer.origin
    if not tokenizer.can_encode:
        raise DataError(f"{origin}: {NO_TEXT}")
    template = tokenizer.chat_template
    if template is None:
        raise DataError(f"{origin} has no chat template: give prompt or prompt_token_ids instead of messages")
    bos, eos = special_text(tokenizer, "bos_token"), special_text(tokenizer, "eos_token")
    problem = "it renders none of the known formats: DeepSeek-V2, V2.5, V3, R1, V3.1"
    cases = [(probe, generate) for probe in _PROBES for generate in (True, False)]
    try:
        wanted = [
            render_template(template, probe, bos or "", eos or "", generate) for probe, generate in cases
        ]
    except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        wanted, problem = [], f"rendering it failed: {error}"
    if wanted and bos is not None and eos is not None:
        for candidate in _dialects():
            given = (_join(candidate.pieces(probe, bos, eos, generate)) for probe, generate in cases)
            if all(have == want for have, want in zip(given, wanted, strict=True)):
                return candidate
    raise DataError(
        f"{origin} has a chat template that is not supported ({problem}): give prompt or prompt_token_ids "
        "instead of messages"
    )


def check_messages(messages: Any) -> list[Message]:
    """The conversation if it is one that can be rendered; DataError naming the message and key if not."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"messages must be a non-empty list of objects, found {_shown(messages)}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(f"messages[{number}] must have role and content, found {_shown(message)}")
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise DataError(f"messages[{number}].role is {role!r}; system, user and assistant are supported")
        if not isinstance(content, str):
            raise DataError(f"messages[{number}].content must be a string, found {_shown(content)}")
        extra = sorted(set(message) - {"role", "content"})
        if extra:
            raise DataError(f"messages[{number}].{extra[0]} is not supported; a message has role and content")
    return messages


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def render_messages(
    tokenizer: Tokenizer, messages: Any, *, fmt: ChatFormat | None = None, generate: bool = True
) -> list[int]:
    """Ids of a conversation, BOS first and, if `generate`, the opening of the answer last.

    `fmt`: the format, found from the tokenizer's template if not given (do that once for many conversations).
    Raises DataError for messages that are none and templates that are not supported.
    """
    conversation = check_messages(messages)
    fmt = fmt or chat_format(tokenizer)
    bos, eos = special_text(tokenizer, "bos_token"), special_text(tokenizer, "eos_token")
    assert bos is not None and eos is not None, "a format is only found for a tokenizer that names both"
    return encode_pieces(tokenizer, fmt.pieces(conversation, bos, eos, generate))


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> list[int]:
    """Ids of pieces: control strings as their ids, texts with whatever they spell as text."""
    ids: list[int] = []
    text = ""  # neighbouring texts are encoded as one, as a tokenizer would: merges cross their border
    for piece in pieces:
        index = tokenizer.control.get(piece.text) if piece.control else None
        if index is None:  # also a control string that this tokenizer does not have
            text += piece.text
            continue
        ids += [*(tokenizer.encode_text(text) if text else []), index]
        text = ""
    return ids + (tokenizer.encode_text(text) if text else [])
