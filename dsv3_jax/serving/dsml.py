"""DSML, the tool calls of DeepSeek-V3.2: tags with the mark ｜DSML｜, parameters as they are or as JSON.

Format: `encoding/encoding_dsv32.py` of the published checkpoint. The functions read from the front of a buffer and
say None where more text is needed and False where the text is something else.
"""

from __future__ import annotations

import json
import re
from typing import Literal

from dsv3_jax.serving.marks import DSML

_LIMIT = 512  # longest tag
_BLOCK = re.compile(f"<{DSML}(?:function_calls|tool_calls)>")
_END_BLOCK = re.compile(f"</{DSML}(?:function_calls|tool_calls)>")
_INVOKE = re.compile(f'<{DSML}invoke name="([^\\s<>{{}}"\'`]{{1,128}})">')
_END_INVOKE = f"</{DSML}invoke>"
_PARAMETER = re.compile(f'<{DSML}parameter name="([^"<>]{{1,256}})" string="(true|false)">')
END_PARAMETER = f"</{DSML}parameter>"


def _tag(text: str, at: int) -> tuple[int, str] | Literal[False] | None:
    """(where it starts, tag) after blanks."""
    at += len(text[at:]) - len(text[at:].lstrip())
    window = text[at : at + _LIMIT]
    if not (window[:2] == f"<{DSML}" or f"</{DSML}".startswith(window[:3])):
        return False
    end = window.find(">")
    if end >= 0:
        return at, window[: end + 1]
    return None if len(window) < _LIMIT else False


def opening(text: str, at: int, inside: bool) -> tuple[int, str | None] | Literal[False] | None:
    """(length, name) of the tags that begin a call; (length, None) of the one that ends all, if `inside`."""
    found = _tag(text, at)
    if not isinstance(found, tuple):
        return found
    at, tag = found
    if inside and _END_BLOCK.fullmatch(tag):
        return at + len(tag), None
    if _BLOCK.fullmatch(tag):
        found = _tag(text, at + len(tag))
        if not isinstance(found, tuple):
            return found
        at, tag = found
    match = _INVOKE.fullmatch(tag)
    return (at + len(tag), match[1]) if match else False


def parameter(text: str) -> tuple[int, str | None, bool] | Literal[False] | None:
    """(length, name, is string) of the tag that begins a parameter; (length, None, False) at the end of the call."""
    found = _tag(text, 0)
    if not isinstance(found, tuple):
        return found
    at, tag = found
    if tag == _END_INVOKE:
        return at + len(tag), None, False
    match = _PARAMETER.fullmatch(tag)
    return (at + len(tag), match[1], match[2] == "true") if match else False


def value(text: str, end: bool) -> tuple[int, bool]:
    """(characters that can be taken, whether the closing tag is the last of them)."""
    at = text.find(END_PARAMETER)
    if at >= 0:
        return at + len(END_PARAMETER), True
    if end:
        return len(text), False
    held = next((n for n in range(len(END_PARAMETER) - 1, 0, -1) if text.endswith(END_PARAMETER[:n])), 0)
    return len(text) - held, False


def is_json(text: str) -> bool:
    """Whether the text is one JSON value (NaN and Infinity are none)."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):  # the latter for nesting beyond the reader's depth
        return False
    return True


def _refuse(name: str) -> None:
    raise ValueError(name)


class Value:
    """JSON of a call's arguments, from parameters as they come."""

    def __init__(self) -> None:
        self._open = "{"
        self._is_string = False
        self._raw = ""

    def begin(self, name: str, is_string: bool) -> str:
        """A parameter begins."""
        self._is_string, self._raw = is_string, ""
        text = f"{self._open}{json.dumps(name, ensure_ascii=False)}: " + ('"' if is_string else "")
        self._open = ", "
        return text

    def push(self, text: str, closed: bool) -> str:
        """More of its value. JSON is shown when it is whole; what is none becomes a string."""
        if self._is_string:
            return json.dumps(text, ensure_ascii=False)[1:-1] + ('"' if closed else "")
        self._raw += text
        if not closed:
            return ""
        return self._raw if is_json(self._raw) else json.dumps(self._raw, ensure_ascii=False)

    def close(self) -> str:
        """The call ends."""
        return "{}" if self._open == "{" else "}"
