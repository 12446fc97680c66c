"""From generated ids to what a client reads: text, stop strings, reasoning, tool calls, content filter.

One `TextStream` a choice; streams share nothing that changes. The steps, each of them safe to cut anywhere:
ids -> text (UTF-8 whole) -> stop strings -> reasoning and tool calls -> content filter -> `Delta`s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

from dsv3_jax.serving.deltas import Answer, Delta, ToolDelta, merged
from dsv3_jax.serving.filter import Filter, FilterStream
from dsv3_jax.serving.marks import MARKS, MarkedDecoder
from dsv3_jax.serving.parse import AnswerParser
from dsv3_jax.text import StopChecker, Tokenizer

__all__ = ["Answer", "Delta", "TextStream", "ToolDelta"]


class TextStream:
    """Ids of one choice as they come -> `Delta`s.

    Without parser and filter the contents of all deltas add up to `tokenizer.decode` of the ids, cut before the
    stop string that is complete first. Only this is held back: a character without all of its bytes, an end that
    may still become a stop string or a control string, and what the filter may still have to hide.

      stream = TextStream(tokenizer, stop=["\\n\\n"])
      for update in updates:
          send(stream.push(update.token_ids))      # list[Delta]
          if stream.finish_reason:                 # "stop" (a stop string) or "content_filter":
              engine.cancel(ticket); break         # cancel the request; later ids are ignored
      send(stream.finish())                        # once, always
      reason = stream.final_reason(update.finish_reason)

    Attributes:
      finish_reason: "stop" once a stop string was found or the only call that may be ended, "content_filter" once the
        filter blocked, else None.
      consumed: ids read, up to and with the one that completed a stop string: what usage counts.
      answer: everything said so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        parser: AnswerParser | None = None,
        primer: Sequence[int] = (),
        content_filter: Filter | None = None,
        request_id: str = "",
    ) -> None:
        """
        Args:
          stop: stop strings, none empty (ValueError). One that is a control string also meets its token.
          parser: a fresh `AnswerParser` (`ChatTemplate.parser`), for chats; None for plain text.
          primer: the end of the prompt that belongs to the answer (`Prompt.primer`): the parser reads it first.
          content_filter: the output filter, or None. With one, send no log-probabilities: they hold the text.
          request_id: what the filter's log names.
        """
        self.finish_reason: Literal["stop", "content_filter"] | None = None
        self.consumed = 0
        self.answer = Answer()
        self._parser = parser
        self._decoder = MarkedDecoder(tokenizer, parser.marks if parser is not None else ())
        marks = [MARKS[s] for s in stop if parser is not None and s in parser.marks]
        self._stop = StopChecker([*stop, *marks])
        self._filter = content_filter
        self._request_id = request_id
        self._channel: tuple[str, FilterStream] | None = None
        self._finished = False
        self._waiting = self._parse(self._decoder.push(primer))

    def push(self, ids: Iterable[int]) -> list[Delta]:
        """What these ids add; nothing once `finish_reason` is set."""
        deltas, self._waiting = self._waiting, []
        for index in ids:
            if self.finish_reason is not None:
                break
            self.consumed += 1
            deltas += self._parse(self._stop.push(self._decoder.push((index,))))
            if self._stop.stopped or (self._parser is not None and self._parser.ended):
                self.finish_reason = "stop"
                deltas += self._parser.finish() if self._parser is not None else []
        return self._emit(deltas)

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the ids; nothing the second time."""
        if self._finished:
            return []
        self._finished = True
        deltas, self._waiting = self._waiting, []
        if self.finish_reason is None:
            text = self._stop.push(self._decoder.finish())
            if self._stop.stopped:
                self.finish_reason = "stop"
            deltas += self._parse(text + self._stop.finish())
            deltas += self._parser.finish() if self._parser is not None else []
        return self._emit(deltas, end=True)

    def final_reason(self, engine_reason: str) -> str:
        """The `finish_reason` to send, from the engine's; "tool_calls" for an answer that stopped with calls."""
        reason = self.finish_reason or engine_reason
        return "tool_calls" if reason == "stop" and self.answer.tool_calls else reason

    def _parse(self, text: str) -> list[Delta]:
        if not text:
            return []
        return [Delta(content=text)] if self._parser is None else self._parser.push(text)

    def _emit(self, deltas: list[Delta], end: bool = False) -> list[Delta]:
        if self._filter is not None:
            deltas = self._filtered(self._filter, deltas, end)
        deltas = merged(deltas)
        self.answer.add(deltas)
        return deltas

    def _filtered(self, content_filter: Filter, deltas: list[Delta], end: bool) -> list[Delta]:
        """The deltas with what the filter hides left out. Each kind of text, and each call, is a text of its own."""
        out: list[Delta] = []
        for delta in deltas:
            name, text = _channel_of(delta)
            if self._channel is not None and self._channel[0] != name:
                out += self._close_channel()
            if self.finish_reason == "content_filter":
                return out
            if self._channel is None:
                where = {"content": "content", "reasoning": "reasoning"}.get(name, "tool_call")
                self._channel = name, content_filter.stream(where=where, request_id=self._request_id)
            verdict = self._channel[1].push(text)
            out.append(_with_text(delta, verdict.text))
            if verdict.blocked:
                self.finish_reason = "content_filter"
                return out
        if end and self.finish_reason != "content_filter":
            out += self._close_channel()
        return out

    def _close_channel(self) -> list[Delta]:
        if self._channel is None:
            return []
        name, stream = self._channel
        self._channel = None
        verdict = stream.finish()
        if verdict.blocked:
            self.finish_reason = "content_filter"
        return [_in_channel(name, verdict.text)]


def _channel_of(delta: Delta) -> tuple[str, str]:
    if delta.tool is not None:
        return str(delta.tool.index), delta.tool.arguments
    return ("reasoning", delta.reasoning) if delta.reasoning else ("content", delta.content)


def _in_channel(name: str, text: str) -> Delta:
    if name == "content":
        return Delta(content=text)
    if name == "reasoning":
        return Delta(reasoning=text)
    return Delta(tool=ToolDelta(int(name), arguments=text)) if text else Delta()


def _with_text(delta: Delta, text: str) -> Delta:
    if delta.tool is not None:
        if delta.tool.name is None and not text:
            return Delta()
        return Delta(tool=dataclasses.replace(delta.tool, arguments=text))
    return Delta(reasoning=text) if delta.reasoning else Delta(content=text)
