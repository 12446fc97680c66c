"""Content filters: what may go into the model and what may come out of it. Off unless one is given.

A filter is any object with the methods of `Filter`. `load_filter` finds one: a YAML file of rules
(dsv3_jax/serving/rules.py), or "module:attribute", a `Filter` or a function without arguments that makes one.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
from collections.abc import Sequence
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
    content_filter: Filter, messages: Sequence[Any], tools: Any = None, *, request_id: str = ""
) -> tuple[list[Any], Any, bool]:
    """(messages and tools with what must not be seen replaced, whether any is blocked): the input stage of a chat.

    Looks at every text that is rendered: contents, text parts, reasoning, arguments of earlier calls, and in tools
    every text but names. Values that are no messages are passed on as they are, for `render` to refuse.
    """
    blocked = False

    def seen(text: Any) -> Any:
        nonlocal blocked
        if not isinstance(text, str):
            return text
        verdict = content_filter.check(text, where="input", request_id=request_id)
        blocked = blocked or verdict.blocked
        return verdict.text

    def through(value: Any, kept: tuple[str, ...] = ()) -> Any:
        if isinstance(value, dict):
            return {key: child if key in kept else through(child, kept) for key, child in value.items()}
        return [through(child, kept) for child in value] if isinstance(value, list) else seen(value)

    def message(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        new = dict(value)
        for key in ("content", "reasoning", "reasoning_content"):
            if key in new:
                new[key] = through(new[key], ("type",))
        if "tool_calls" in new:
            new["tool_calls"] = through(new["tool_calls"], ("id", "type", "name"))
        return new

    return [message(value) for value in messages], through(tools, ("type", "name", "required")), blocked
