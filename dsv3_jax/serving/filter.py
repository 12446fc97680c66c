"""Content filters: what may go into the model and what may come out of it. Off unless one is given.

A filter is any object with the methods of `Filter`. `load_filter` finds one: a YAML file of rules
(dsv3_jax/serving/rules.py), or "module:attribute", a `Filter` or a function without arguments that makes one.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from dsv3_jax.errors import ConfigError

LOG = logging.getLogger("dsv3_jax.serving.filter")
Where = Literal["input", "content", "reasoning", "tool_call"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a filter says to a text or a piece of one.

    text: what may be shown; what is hidden is left out or replaced.
    blocked: the text must not go on; `text` then ends before what was found.
    """

    text: str
    blocked: bool = False


class FilterStream(Protocol):
    """A filter on its way through one text."""

    def push(self, delta: str) -> Verdict:
        """What may be shown now. Holds back what later text may show to be forbidden."""
        ...

    def finish(self) -> Verdict:
        """What was held back, at the end of the text."""
        ...


@runtime_checkable
class Filter(Protocol):
    """Looks at texts. Must be safe to use from several threads; its streams are used by one at a time."""

    def check(self, text: str, *, where: str = "input", request_id: str = "") -> Verdict:
        """A whole text."""
        ...

    def stream(self, *, where: str = "content", request_id: str = "") -> FilterStream:
        """A text that comes in pieces: "content", "reasoning" or the arguments of a "tool_call"."""
        ...


def log_decision(
    *, where: str, request_id: str, action: str, rules: Sequence[str], offset: int, length: int
) -> None:
    """One line of JSON: everything but the text."""
    entry = {
        "event": "content_filter",
        "request_id": request_id,
        "where": where,
        "action": action,
        "rules": list(rules),
        "offset": offset,
        "length": length,
    }
    LOG.warning("%s", json.dumps(entry, ensure_ascii=False))


def load_filter(spec: str) -> Filter:
    """The filter named by `spec`: a path that ends in .yaml or .yml, or "module:attribute".

    Raises ConfigError, naming the file or the attribute and what was expected.
    """
    if spec.endswith((".yaml", ".yml")):
        from dsv3_jax.serving.rules import RuleFilter

        return RuleFilter.load(Path(spec))
    module, _, attribute = spec.partition(":")
    if not module or not attribute:
        raise ConfigError(f"content filter {spec!r}: expected a .yaml file of rules, or module:attribute")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(f"content filter {spec!r}: {error}") from None
    except AttributeError:
        raise ConfigError(f"content filter {spec!r}: {module} has no {attribute!r}") from None
    made = (
        found() if callable(found) and (isinstance(found, type) or not isinstance(found, Filter)) else found
    )
    if not isinstance(made, Filter):
        raise ConfigError(
            f"content filter {spec!r} gives {type(made).__name__}, which lacks check() or stream()"
        )
    return made


def filter_messages(
    content_filter: Filter, messages: Sequence[Mapping[str, Any]], *, request_id: str = ""
) -> tuple[list[dict[str, Any]], bool]:
    """(messages with what must not be seen replaced, whether any is blocked): the input stage of a chat.

    Looks at every text: contents, text parts, reasoning, arguments of earlier calls. To be called with messages that
    `render` accepts; other values are passed on as they are.
    """
    blocked = False

    def seen(text: Any) -> Any:
        nonlocal blocked
        if not isinstance(text, str):
            return text
        verdict = content_filter.check(text, where="input", request_id=request_id)
        blocked = blocked or verdict.blocked
        return verdict.text

    out: list[dict[str, Any]] = []
    for message in messages:
        new = dict(message)
        content = new.get("content")
        if isinstance(content, list):
            new["content"] = [
                {**part, "text": seen(part.get("text"))}
                if isinstance(part, dict) and "text" in part
                else part
                for part in content
            ]
        else:
            new["content"] = seen(content)
        for key in ("reasoning", "reasoning_content"):
            if key in new:
                new[key] = seen(new[key])
        if isinstance(new.get("tool_calls"), list):
            new["tool_calls"] = [_seen_call(call, seen) for call in new["tool_calls"]]
        out.append(new)
    return out, blocked


def _seen_call(call: Any, seen: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    return {**call, "function": {**function, "arguments": seen(function.get("arguments"))}}
