"""Messages and tools of a request, checked: what the chat formats render."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from dsv3_jax.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class ChatError(DataError):
    """Messages or tools that cannot be rendered. `param` is where: `messages[2].content`."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param} {message}")
        self.param = param


@dataclasses.dataclass(frozen=True)
class Call:
    """A tool call of an earlier answer; `arguments` is the JSON text of an object."""

    id: str
    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class Turn:
    """A message. role: system, user, assistant or tool."""

    role: str
    content: str
    calls: tuple[Call, ...] = ()
    reasoning: str = ""
    call_id: str = ""


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function that the model may call. `spec`: the object it was given as, for formats that show all of it."""

    name: str
    description: str
    parameters: dict[str, Any]
    spec: dict[str, Any]


def read_turns(messages: Any) -> list[Turn]:
    """The conversation as turns, results of calls in the order of the calls.

    Understands OpenAI's messages: content as a string or a list of text parts; `developer` is `system`; null content
    beside tool_calls; `reasoning` or `reasoning_content` of earlier answers; other keys a client may send back from
    an answer (refusal, audio, annotations, function_call) only if they are empty. Raises ChatError.
    """
    if not isinstance(messages, list) or not messages:
        raise ChatError("messages", f"must be a non-empty list of objects, found {_shown(messages)}")
    turns: list[Turn] = []
    for number, message in enumerate(messages):
        turns.append(_turn(message, f"messages[{number}]"))
    return _with_results_in_order(turns)


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise ChatError(where, f"must be an object with role and content, found {_shown(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise ChatError(f"{where}.role", f"is {_shown(role)}; expected {', '.join(ROLES)}")
    known = {"role", "content", "name"}
    calls: tuple[Call, ...] = ()
    reasoning = ""
    if role == "assistant":
        known |= {"tool_calls", "reasoning", "reasoning_content"}
        calls = _calls(message.get("tool_calls"), f"{where}.tool_calls")
        reasoning = _reasoning(message, where)
    if role == "tool":
        known |= {"tool_call_id"}
        if not isinstance(message.get("tool_call_id"), str):
            raise ChatError(f"{where}.tool_call_id", "must be a string: the id of the call it answers")
    for key, value in message.items():
        if key not in known and value:  # None, "", [] come back from answers and say nothing
            raise ChatError(where, f"has a key that is not supported for the role {role}")
    content = _content(message.get("content"), where, optional=bool(calls))
    turn_role = "system" if role == "developer" else role
    return Turn(turn_role, content, calls, reasoning, str(message.get("tool_call_id", "")))


def _content(content: Any, where: str, optional: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and optional:
        return ""
    if not isinstance(content, list):
        raise ChatError(
            f"{where}.content", f"must be a string or a list of text parts, found {_shown(content)}"
        )
    texts: list[str] = []
    for number, part in enumerate(content):
        at = f"{where}.content[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ChatError(f"{at}.type", f"is {_shown(kind)}; only text parts are supported")
        if not isinstance(part.get("text"), str):
            raise ChatError(f"{at}.text", f"must be a string, found {_shown(part.get('text'))}")
        texts.append(part["text"])
    return "".join(texts)


def _reasoning(message: dict[str, Any], where: str) -> str:
    for key in ("reasoning", "reasoning_content"):
        value = message.get(key)
        if value is not None and not isinstance(value, str):
            raise ChatError(f"{where}.{key}", f"must be a string, found {_shown(value)}")
        if value:
            return value
    return ""


def _calls(calls: Any, where: str) -> tuple[Call, ...]:
    if calls is None:
        return ()
    if not isinstance(calls, list) or not calls:
        raise ChatError(where, f"must be a non-empty list, found {_shown(calls)}")
    out: list[Call] = []
    for number, call in enumerate(calls):
        at = f"{where}[{number}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise ChatError(at, 'must be {"id", "type": "function", "function": {"name", "arguments"}}')
        if not isinstance(call.get("id"), str):
            raise ChatError(f"{at}.id", "must be a string")
        if any(earlier.id == call["id"] for earlier in out):
            raise ChatError(f"{at}.id", "is the id of an earlier call of the message")
        name = _name(function.get("name"), f"{at}.function.name")
        arguments = function.get("arguments")
        if not isinstance(arguments, str) or read_object(arguments) is None:
            raise ChatError(f"{at}.function.arguments", "must be the JSON text of an object")
        out.append(Call(call["id"], name, arguments))
    return tuple(out)


def _name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise ChatError(where, "must be 1 to 64 of the characters A-Z a-z 0-9 _ . -")
    return name


def read_object(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` spells, or None."""
    try:
        value = json.loads(text, parse_constant=lambda name: 1 / 0)
    except (ValueError, RecursionError, ZeroDivisionError):
        return None
    return value if isinstance(value, dict) else None


def _with_results_in_order(turns: list[Turn]) -> list[Turn]:
    """Each message with calls must be followed by one result for each; the formats have no ids, only the order."""
    out: list[Turn] = []
    at = 0
    while at < len(turns):
        turn = turns[at]
        if turn.role == "tool":
            raise ChatError(f"messages[{at}].role", "is tool, but no message with tool_calls comes before it")
        out.append(turn)
        at += 1
        results: dict[str, Turn] = {}
        while turn.calls and at < len(turns) and turns[at].role == "tool":
            answered = turns[at].call_id
            if answered in results or all(call.id != answered for call in turn.calls):
                raise ChatError(
                    f"messages[{at}].tool_call_id",
                    "is not the id of an unanswered call of the message before",
                )
            results[answered] = turns[at]
            at += 1
        missing = [call.name for call in turn.calls if call.id not in results]
        if missing:
            raise ChatError(
                f"messages[{at - len(results) - 1}].tool_calls",
                f"must be followed by a tool message for each call; {len(missing)} of them have none",
            )
        out += [results[call.id] for call in turn.calls]
    return out


def read_tools(tools: Any) -> list[Tool]:
    """The tools of a request. Raises ChatError."""
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise ChatError("tools", f"must be a list, found {_shown(tools)}")
    out: list[Tool] = []
    for number, tool in enumerate(tools):
        where = f"tools[{number}]"
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function":
            raise ChatError(
                where, 'must be {"type": "function", "function": {"name", "description", "parameters"}}'
            )
        name = _name(function.get("name"), f"{where}.function.name")
        if any(other.name == name for other in out):
            raise ChatError(f"{where}.function.name", "is the name of an earlier tool")
        description, parameters = function.get("description"), function.get("parameters")
        if description is not None and not isinstance(description, str):
            raise ChatError(f"{where}.function.description", f"must be a string, found {_shown(description)}")
        if parameters is not None and not isinstance(parameters, dict):
            raise ChatError(
                f"{where}.function.parameters", f"must be a JSON schema, found {_shown(parameters)}"
            )
        out.append(Tool(name, description or "", parameters or {}, function))
    return out


def read_tool_choice(choice: Any, tools: Sequence[Tool]) -> str | Tool:
    """ "none", "auto", "required" or the tool to call. Raises ChatError."""
    if choice is None:
        return "auto" if tools else "none"
    if choice in ("none", "auto"):
        return choice if tools else "none"
    if choice == "required" and tools:
        return choice
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    for tool in tools:
        if tool.name == name:
            return tool
    raise ChatError(
        "tool_choice",
        'must be "none", "auto", "required" or {"type": "function", "function": {"name"}} of tools',
    )


def dumps(value: Any, where: str) -> str:
    """JSON text as the formats write it. Raises ChatError for NaN and Infinity."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise ChatError(where, "holds a number that is not finite") from None


def _shown(value: Any) -> str:
    """The kind of a wrong value; not the value, which is the client's."""
    return "nothing" if value is None else type(value).__name__
