"""Conversations with tools as token ids, in the format of the checkpoint.

`ChatTemplate` is made once at start. `render` turns a request's messages and tools into ids; control ids come from the
format alone, never from what a client wrote (dsv3_jax/text/chat.py says how). Where a published Jinja template loses a
control string over several rounds of calls (R1's opens the list of calls and of results once in a whole
conversation), each list is opened and closed here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jinja2

from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.serving import describe_tools as tool_text
from dsv3_jax.serving.describe_tools import END_THINK, THINK, control
from dsv3_jax.serving.parse import AnswerParser
from dsv3_jax.serving.turns import ChatError, Tool, Turn, read_tool_choice, read_tools, read_turns
from dsv3_jax.text import ChatFormat, Tokenizer, chat_format
from dsv3_jax.text.chat import DeepSeekV2, DeepSeekV3, Piece, encode_pieces, render_template, special_text

USER, ASSISTANT = control("<｜User｜>"), control("<｜Assistant｜>")


@dataclasses.dataclass(frozen=True)
class DeepSeekV32:
    """V3.2: `{bos}{system}<｜User｜>{user}<｜Assistant｜></think>{answer}{eos}`, calls in DSML; no Jinja template."""


Format = DeepSeekV2 | DeepSeekV3 | DeepSeekV32
FORMATS: dict[str, Format] = {
    "deepseek-v2": DeepSeekV2(),
    "deepseek-v3": DeepSeekV3(),
    "deepseek-v3-0324": DeepSeekV3(opens="question"),
    "deepseek-r1": DeepSeekV3(strip="last", start=(THINK, Piece("\n"))),
    "deepseek-v3.1": DeepSeekV3("reply", "first", (END_THINK,), (END_THINK,)),
    "deepseek-v3.2": DeepSeekV32(),
}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A rendered conversation.

    ids: the prompt.
    primer: ids at its end that belong to the answer (an opened <think>, the beginning of a forced call):
      `TextStream(primer=...)` reads them before the generated ids.
    tools: whether the answer may hold tool calls: `ChatTemplate.parser(tools=prompt.tools)`.
    """

    ids: list[int]
    primer: list[int]
    tools: bool


class ChatTemplate:
    """The chat format of a checkpoint.

    template = ChatTemplate(tokenizer)                       # once; DataError without a usable format
    prompt = template.render(messages, tools=tools, tool_choice=choice)      # ChatError (a DataError), with .param
    stream = TextStream(tokenizer, stop=stop, parser=template.parser(prompt.tools), primer=prompt.primer)
    """

    def __init__(self, tokenizer: Tokenizer, name: str = "auto") -> None:
        """`name`: one of FORMATS, or "auto": what the checkpoint's Jinja template renders.

        Raises ConfigError for another name, DataError for a checkpoint without a template that is supported.
        """
        if name != "auto" and name not in FORMATS:
            raise ConfigError(f"chat format {name!r} is unknown; expected auto, {', '.join(FORMATS)}")
        self._tokenizer = tokenizer
        self.format: ChatFormat | DeepSeekV32 = chat_format(tokenizer) if name == "auto" else FORMATS[name]
        bos, eos = special_text(tokenizer, "bos_token"), special_text(tokenizer, "eos_token")
        if bos is None or eos is None:
            raise DataError(f"{tokenizer.origin} names no bos_token or eos_token, which a chat format needs")
        self._bos, self._eos = control(bos), control(eos)
        self._result_gap = _result_gap(tokenizer, bos, eos)

    @property
    def has_tools(self) -> bool:
        """Whether the format can call tools."""
        return not isinstance(self.format, DeepSeekV2)

    def parser(self, tools: bool, parallel: bool = True) -> AnswerParser:
        """A fresh parser for one answer of this format; `parallel`: whether it may hold several calls."""
        chat = not isinstance(self.format, DeepSeekV2)
        return AnswerParser(reasoning=chat, tools=chat and tools, parallel=parallel)

    def render(
        self,
        messages: Any,
        *,
        tools: Any = None,
        tool_choice: Any = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        thinking: bool | None = None,
    ) -> Prompt:
        """The ids of a conversation, followed by the opening of an answer.

        Args:
          messages, tools, tool_choice: as they came in the request's JSON.
          add_generation_prompt: open an answer.
          continue_final_message: the last message is the beginning of the answer: leave it open, open no other.
          thinking: whether the answer begins with reasoning, for formats that have the choice (V3.1, V3.2; V3 and R1
            can only be told to). None: the format's own way.
        Raises:
          ChatError: what is wrong, and in `param` where.
        """
        turns = read_turns(messages)
        given = read_tools(tools)
        choice = read_tool_choice(tool_choice, given)
        if choice == "none":
            given = []
        if given and not self.has_tools:
            raise ChatError("tools", "are not supported by this model's chat format")
        if continue_final_message:
            last = turns[-1]
            if last.role != "assistant" or last.calls:
                raise ChatError(
                    "messages", "must end with an assistant message without tool_calls to continue it"
                )
        forced = None if choice in ("none", "auto") else choice
        if forced is not None and (continue_final_message or not add_generation_prompt):
            raise ChatError("tool_choice", "can only be forced for an answer of its own")
        generate = add_generation_prompt and not continue_final_message
        if isinstance(self.format, DeepSeekV32):
            pieces, primer = self._v32(turns, given, generate, bool(thinking), continue_final_message)
        elif isinstance(self.format, DeepSeekV3):
            pieces, primer = self._v3(self.format, turns, given, generate, thinking, continue_final_message)
        else:
            pieces, primer = self._v2(turns, generate, thinking, continue_final_message)
        if forced is not None:
            forcing = self._forced(forced if isinstance(forced, Tool) else None)
            closing = [END_THINK] if primer else []
            pieces, primer = [*pieces, *closing, *forcing], [*primer, *closing, *forcing]
        return Prompt(
            encode_pieces(self._tokenizer, pieces), encode_pieces(self._tokenizer, primer), tools=bool(given)
        )

    def _forced(self, tool: Tool | None) -> list[Piece]:
        if isinstance(self.format, DeepSeekV32):
            return tool_text.dsml_forced(tool)
        return tool_text.forced_pieces(tool, self._fenced)

    @property
    def _fenced(self) -> bool:
        """Whether calls are written as V3 and R1 do: with their type, and the arguments in a fence."""
        return isinstance(self.format, DeepSeekV3) and self.format.opens != "reply"

    def _v2(
        self, turns: Sequence[Turn], generate: bool, thinking: bool | None, unfinished: bool
    ) -> tuple[list[Piece], list[Piece]]:
        if thinking is not None:
            raise ChatError("thinking", "is no choice of this model's chat format")
        if any(turn.calls for turn in turns):
            raise ChatError("messages", "have tool_calls, which this model's chat format does not support")
        assert isinstance(self.format, DeepSeekV2)
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        pieces = self.format.pieces(messages, self._bos.text, self._eos.text, generate)
        return pieces[:-1] if unfinished else pieces, []

    def _v3(
        self,
        fmt: DeepSeekV3,
        turns: Sequence[Turn],
        tools: Sequence[Tool],
        generate: bool,
        thinking: bool | None,
        unfinished: bool,
    ) -> tuple[list[Piece], list[Piece]]:
        systems = [turn.content for turn in turns if turn.role == "system"]
        joined = "\n\n".join(systems) if fmt.systems == "joined" else "".join(systems[-1:])
        out = [self._bos, Piece(joined)]
        if tools:
            out += [Piece("\n\n"), *tool_text.describe(tools, self._fenced)]
        asked = answered = False  # the last turn is a question; a result of a call
        for turn in turns:
            if turn.role == "system":
                continue
            if answered and turn.role != "tool" and self._fenced:
                out.append(tool_text.END_RESULTS)
            if turn.role == "user":
                out += [USER, Piece(turn.content)]
                out += [ASSISTANT] if fmt.opens == "question" else []
            elif turn.role == "assistant":
                if (fmt.opens == "answer" and not answered) or (fmt.opens == "reply" and asked):
                    out += [ASSISTANT, *fmt.history]
                if unfinished and turn is turns[-1]:
                    return _open_end(out, turn)
                out.append(Piece(fmt.stripped(turn.content)))
                out += tool_text.calls_pieces(turn.calls, self._fenced) if turn.calls else []
                out.append(self._eos)
            else:
                if self._fenced:
                    out.append(Piece(self._result_gap) if answered else tool_text.RESULTS)
                out += [tool_text.RESULT, Piece(turn.content), tool_text.END_RESULT]
            asked, answered = turn.role == "user", turn.role == "tool"
        if answered and self._fenced:
            out.append(tool_text.END_RESULTS)
        if not generate:
            return out, []
        if {"answer": not answered, "question": not asked and not answered, "reply": asked}[fmt.opens]:
            start = _start(fmt, thinking)
            out += [ASSISTANT, *start]
        elif asked and thinking:  # the question has opened the answer
            start = [THINK, Piece("\n")]
            out += start
        else:  # after results an answer goes on as it is
            start = []
        return out, start if THINK in start and END_THINK not in start else []

    def _v32(
        self, turns: Sequence[Turn], tools: Sequence[Tool], generate: bool, thinking: bool, unfinished: bool
    ) -> tuple[list[Piece], list[Piece]]:
        last_question = max((n for n, turn in enumerate(turns) if turn.role == "user"), default=-1)
        out = [self._bos]
        told = [Piece("\n\n"), *tool_text.dsml_describe(tools)] if tools else []
        if turns[0].role != "system":
            out += told
        number = 0
        while number < len(turns):
            turn = turns[number]
            thinks = THINK if thinking and number >= last_question else END_THINK
            if turn.role == "system":
                out += [Piece(turn.content), *(told if number == 0 else [])]
            elif turn.role == "user":
                out += [USER, Piece(turn.content)]
                if generate or number + 1 < len(turns):
                    out += [ASSISTANT, thinks]
            elif turn.role == "assistant":
                if unfinished and number + 1 == len(turns):
                    return _open_end(out, turn)
                out += [Piece(turn.reasoning), END_THINK] if thinks is THINK else []
                out.append(Piece(turn.content))
                out += tool_text.dsml_calls(turn.calls) if turn.calls else []
                out.append(self._eos)
            else:
                results = [turn]
                while number + 1 < len(turns) and turns[number + 1].role == "tool":
                    number += 1
                    results.append(turns[number])
                out += tool_text.dsml_results(results)
                out += [thinks] if generate or number + 1 < len(turns) else []
            number += 1
        return out, [THINK] if generate and out[-1] is THINK else []


def _start(fmt: DeepSeekV3, thinking: bool | None) -> list[Piece]:
    """What stands between `<｜Assistant｜>` and an answer that is to reason or not."""
    opened = THINK in fmt.start and END_THINK not in fmt.start
    if thinking is None or thinking == opened:
        return list(fmt.start)
    if not thinking:
        raise ChatError("thinking", "cannot be turned off in this model's chat format")
    return [THINK] if END_THINK in fmt.start else [THINK, Piece("\n")]


def _open_end(out: list[Piece], turn: Turn) -> tuple[list[Piece], list[Piece]]:
    """A conversation whose last answer is to be continued, in its reasoning if that is all there is."""
    if not turn.reasoning:
        return [*out, Piece(turn.content)], []
    if out[-1] in (THINK, END_THINK):
        out = out[:-1]
    if not turn.content:
        return [*out, THINK, Piece(turn.reasoning)], [THINK]
    return [*out, THINK, Piece(turn.reasoning), END_THINK, Piece(turn.content)], []


def _result_gap(tokenizer: Tokenizer, bos: str, eos: str) -> str:
    """What the checkpoint's template writes between two results: nothing (R1) or a newline (V3)."""
    template = tokenizer.chat_template
    messages: list[dict[str, Any]] = [{"role": "user", "content": "u"}]
    messages += [{"role": "tool", "content": "one"}, {"role": "tool", "content": "two"}]
    try:
        text = render_template(template or "", messages, bos, eos, False)
    except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError, AttributeError):
        return "\n"
    return "" if f"one{tool_text.END_RESULT.text}{tool_text.RESULT.text}two" in text else "\n"
