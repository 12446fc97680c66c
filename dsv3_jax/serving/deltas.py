"""Parts of an answer: what a stream sends, and what they add up to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class ToolDelta:
    """A part of tool call number `index`: OpenAI's `delta.tool_calls[]`. False where it says nothing.

    id and name come once, with the first part of a call; `arguments` are to be joined.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    def __bool__(self) -> bool:
        return self.name is not None or bool(self.arguments)

    def to_json(self) -> dict[str, object]:
        """The object of OpenAI's stream."""
        if self.name is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


@dataclasses.dataclass(frozen=True)
class Delta:
    """What new ids add to an answer: one of the three."""

    content: str = ""
    reasoning: str = ""
    tool: ToolDelta | None = None

    def to_json(self) -> dict[str, object]:
        """Keys of OpenAI's `choices[].delta`; reasoning under both names in use."""
        if self.tool is not None:
            return {"tool_calls": [self.tool.to_json()]}
        if self.reasoning:
            return {"reasoning": self.reasoning, "reasoning_content": self.reasoning}
        return {"content": self.content}


@dataclasses.dataclass
class Answer:
    """An answer as a whole: the deltas added up."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolDelta] = dataclasses.field(default_factory=list)

    def add(self, deltas: Iterable[Delta]) -> None:
        """Take the next deltas."""
        for delta in deltas:
            self.content += delta.content
            self.reasoning += delta.reasoning
            tool = delta.tool
            if tool is None:
                continue
            if tool.index == len(self.tool_calls):
                self.tool_calls.append(tool)
            else:
                self.tool_calls[tool.index] = joined(self.tool_calls[tool.index], tool)

    def to_json(self) -> dict[str, object]:
        """OpenAI's `message`: content is null beside tool calls when there is none."""
        empty = self.tool_calls and not self.content
        message: dict[str, object] = {"role": "assistant", "content": None if empty else self.content}
        if self.reasoning:
            message |= {"reasoning": self.reasoning, "reasoning_content": self.reasoning}
        if self.tool_calls:
            calls = [call.to_json() for call in self.tool_calls]
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in calls]
        return message


def joined(first: ToolDelta, second: ToolDelta) -> ToolDelta:
    """Two parts of the same call as one."""
    return dataclasses.replace(first, arguments=first.arguments + second.arguments)


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """The same deltas with neighbours of a kind joined and empty ones left out."""
    out: list[Delta] = []
    for delta in deltas:
        if not (delta.content or delta.reasoning or delta.tool):
            continue
        last = out[-1] if out else None
        if last is None or _kind(last) != _kind(delta):
            out.append(delta)
        elif last.tool is not None and delta.tool is not None:
            out[-1] = Delta(tool=joined(last.tool, delta.tool))
        else:
            out[-1] = Delta(last.content + delta.content, last.reasoning + delta.reasoning)
    return out


def _kind(delta: Delta) -> object:
    if delta.tool is not None:
        return delta.tool.index
    return "reasoning" if delta.reasoning else "content"
