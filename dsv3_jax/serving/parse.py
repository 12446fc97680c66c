"""Answers taken apart as they come: reasoning, content and tool calls of the DeepSeek formats.

Input is marked text (marks.py): a control string is one character that text cannot forge. Understood, whatever the
prompt's format was:

  <think>reasoning</think>content           also where the prompt opened <think>
  CALLS CALL function SEP NAME\\n```json\\n{…}\\n``` END_CALL … END_CALLS               V3, R1
  CALLS CALL NAME SEP {…} END_CALL … END_CALLS                                         V3.1
  <DSML function_calls><DSML invoke name="NAME"><DSML parameter name="K" …>…           V3.2 (dsml.py)

A call is announced once its name and the beginning of its arguments are there; from then on its arguments stream as
the model wrote them, valid JSON or not. What never becomes a call stays text. How the text is cut into pieces changes
neither of the three.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from typing import Literal

from dsv3_jax.serving import dsml
from dsv3_jax.serving.deltas import Delta, ToolDelta
from dsv3_jax.serving.marks import (
    CALL,
    CALLS,
    DSML,
    END_CALL,
    END_CALLS,
    END_THINK,
    MARKS,
    SEP,
    THINK,
    spelled,
)

_LIMIT = 1024  # longest beginning of a call, from its first mark to its arguments
_MARK = re.compile("[\ud800-\ud807]")
_ENDS_REASONING = re.compile(f"[{END_THINK}{CALLS}{CALL}]|<{DSML}")
_NAME = re.compile(r"[^\s<>{}\"'`\ud800-\ud807]{1,128}")
_TEXT = "[^\ud800-\ud807{]"
_HEAD = re.compile(
    f"{CALL}(?P<kind>{_TEXT}*){SEP}"
    + r"\s*(?:(?P<name>[^\s`{\ud800-\ud807][^`\n{\ud800-\ud807]*?)\s*)?(?:```(?:json)?)?\s*(?P<arguments>\{.*)",
    re.DOTALL,
)
_HEAD_SO_FAR = re.compile(f"{CALL}{_TEXT}*(?:{SEP}{_TEXT}*)?")
_REASONING_MARKS = ("<think>", "</think>")


def new_call_id(index: int) -> str:
    """A random id, as clients send back to say which call a result belongs to."""
    return f"call_{secrets.token_hex(12)}"


class AnswerParser:
    """Marked text of one answer in, deltas out. One object an answer.

    Attributes:
      marks: the control strings that the text must have marked.
      calls: tool calls announced so far.
      ended: whether the one call that may be is complete; what follows is dropped.
    """

    def __init__(
        self,
        *,
        reasoning: bool = True,
        tools: bool = True,
        parallel: bool = True,
        new_id: Callable[[int], str] = new_call_id,
    ) -> None:
        """
        Args:
          reasoning: tell reasoning apart; else `<think>` is text.
          tools: tell tool calls apart (the request has tools and did not forbid them); else they are text.
          parallel: whether there may be several calls; else the answer ends with the first.
          new_id: the id of call number `index`.
        """
        self._reasoning, self._tools, self._new_id = reasoning, tools, new_id
        self.marks = tuple(s for s in MARKS if (reasoning if s in _REASONING_MARKS else tools))
        self.calls = 0
        self.ended = False
        self._parallel = parallel
        self._ends_reasoning = _ENDS_REASONING if tools else re.compile(END_THINK)
        self._buffer = ""
        self._state: Callable[[bool], list[Delta] | None] = self._start if reasoning else self._content
        self._in_calls = False  # an END_CALLS or a closing DSML tag is expected
        self._last = ""  # last character of the arguments so far
        self._value = dsml.Value()

    def push(self, text: str) -> list[Delta]:
        """What this text adds."""
        self._buffer += text
        return self._run(end=False)

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the answer."""
        return self._run(end=True)

    def _run(self, end: bool) -> list[Delta]:
        out: list[Delta] = []
        while self._buffer and not self.ended:
            deltas = self._state(end)
            if deltas is None:  # more text is needed
                break
            out += deltas
        return out

    def _take(self, count: int) -> str:
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    # --- states: each takes from a non-empty buffer and says what that gives, or None to wait ----------------

    def _start(self, end: bool) -> list[Delta] | None:
        """Before anything but blanks: only here an answer may begin to reason."""
        blank = _blanks(self._buffer)
        if blank == len(self._buffer) and not end:
            return None
        if self._buffer[blank : blank + 1] == THINK:
            self._take(blank + 1)
            self._state = self._before_reasoning
        else:
            self._state = self._content
        return []

    def _before_reasoning(self, end: bool) -> list[Delta] | None:
        self._take(_blanks(self._buffer))
        if self._buffer:
            self._state = self._reason
        return []

    def _reason(self, end: bool) -> list[Delta] | None:
        """Blanks around the reasoning are dropped. A tool call ends it too."""
        match = self._ends_reasoning.search(self._buffer)
        stop = len(self._buffer) if match is None else match.start()
        if match is None and self._tools and self._buffer.endswith("<") and not end:
            stop -= 1  # it may open a DSML tag
        text = self._buffer[:stop]
        kept = len(text.rstrip())
        out = [Delta(reasoning=spelled(text[:kept]))]
        if match is None:
            self._take(len(text) if end else kept)
            return out if kept or end else None
        self._take(stop)
        if self._buffer[0] == END_THINK:
            self._take(1)
            self._state = self._before_content
        else:
            self._state = self._content
        return out

    def _before_content(self, end: bool) -> list[Delta] | None:
        self._take(_blanks(self._buffer))
        if self._buffer:
            self._state = self._content
        return []

    def _content(self, end: bool) -> list[Delta] | None:
        """Text up to a mark; blanks before one wait, for those before a call are not content."""
        match = _MARK.search(self._buffer)
        at = len(self._buffer) if match is None else match.start()
        if self._tools and ((match is None and not end) or (match is not None and match.group() == DSML)):
            at -= _tag_at_end(self._buffer[:at])
        text = self._buffer[:at]
        kept = len(text.rstrip()) if self._tools else at
        if kept:
            return [Delta(content=self._take(kept))]
        if match is None and at == len(self._buffer):
            if not end:
                return None
            blanks = self._take(at)
            return [] if self.calls else [Delta(content=blanks)]
        if match is None:
            return None  # "<" or "</", which may begin a DSML tag
        return self._mark(end)

    def _mark(self, end: bool) -> list[Delta] | None:
        """Blanks and a mark: a call, the end of calls, or text."""
        opening = self._opening() if self._tools else False
        if opening is None and not end:
            return None
        if not opening:
            match = _MARK.search(self._buffer)
            assert match is not None
            return [Delta(content=spelled(self._take(match.end())))]
        length, name = opening
        self._take(length)
        if name is None:
            self._in_calls = False
            return []
        self._in_calls = True
        self.calls += 1
        return [Delta(tool=ToolDelta(self.calls - 1, self._new_id(self.calls - 1), name))]

    def _opening(self) -> tuple[int, str | None] | Literal[False] | None:
        """(length, name) of the beginning of a call, (length, None) of the end of calls; None: wait; False: neither."""
        text = self._buffer
        at = _blanks(text)
        if text[at] == "<":
            found = dsml.opening(text, at, self._in_calls)
            if isinstance(found, tuple) and found[1] is not None:
                self._state, self._value = self._parameters, dsml.Value()
            return found
        if text[at] == END_CALLS:
            return (at + 1, None) if self._in_calls else False
        if text[at] == CALLS:
            at += 1 + _blanks(text[at + 1 :])
        if at == len(text):
            return None
        head = text[at : at + _LIMIT]
        match = _HEAD.fullmatch(head)
        if match is None:  # so far: no second mark but SEP, no end of the window
            unfinished = _HEAD_SO_FAR.fullmatch(head) and len(head) < _LIMIT
            return None if unfinished else False
        kind, name = match["kind"].strip(), match["name"]
        if name is None:
            name = kind
        elif kind not in ("function", ""):
            return False
        if not _NAME.fullmatch(name):
            return False
        self._state, self._last = self._arguments, ""
        return at + match.start("arguments"), name

    def _arguments(self, end: bool) -> list[Delta] | None:
        """JSON up to the end of the call. Blanks and the fence after the last brace are not part of it."""
        match = next((m for m in _MARK.finditer(self._buffer) if m.group() in _ENDS_CALL), None)
        text = self._buffer if match is None else self._buffer[: match.start()]
        kept = len(text.rstrip(" \t\r\n`"))
        if match is None and not end:
            if not kept:
                return None
            return [self._argue(self._take(kept))]
        last = text[kept - 1] if kept else self._last
        self._take(len(text))
        if match is not None:
            if match.group() == END_CALL:
                self._take(1)
            self._end_call()
        return [self._argue(text[:kept] if last == "}" else text)]

    def _parameters(self, end: bool) -> list[Delta] | None:
        """Between two DSML parameters."""
        found = dsml.parameter(self._buffer)
        if found is None and not end:
            return None
        if not found:  # cut off, or something else: the call ends here
            if not end:
                self._end_call()
                return [self._argue(self._value.close())]
            self._take(len(self._buffer))
            return []
        length, name, is_string = found
        self._take(length)
        if name is None:
            self._end_call()
            return [self._argue(self._value.close())]
        self._state = self._parameter
        return [self._argue(self._value.begin(name, is_string))]

    def _parameter(self, end: bool) -> list[Delta] | None:
        """Inside the value of a DSML parameter."""
        length, closed = dsml.value(self._buffer, end)
        if not length:
            return None
        text = self._take(length)
        if closed:
            self._state = self._parameters
            text = text[: -len(dsml.END_PARAMETER)]
        return [self._argue(self._value.push(spelled(text), closed))]

    def _end_call(self) -> None:
        self._state = self._content
        self.ended = not self._parallel

    def _argue(self, arguments: str) -> Delta:
        self._last = arguments[-1:] or self._last
        return Delta(tool=ToolDelta(self.calls - 1, arguments=spelled(arguments)))


_ENDS_CALL = (END_CALL, END_CALLS, CALLS, CALL)


def _tag_at_end(text: str) -> int:
    return 2 if text.endswith("</") else 1 if text.endswith("<") else 0


def _blanks(text: str) -> int:
    return len(text) - len(text.lstrip())
