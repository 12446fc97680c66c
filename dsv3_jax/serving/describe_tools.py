"""What the prompt says about tools and how it writes calls and results, by format.

V3.1: the tool description of the published model card. V3 and R1, for which none was published: the same with the
call format of their chat template. V3.2: `encoding/encoding_dsv32.py` of the published checkpoint. Instructions hold
real control tokens; what a client gives (names, descriptions, schemas, arguments, results) is always text.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsv3_jax.serving.turns import Call, Tool, Turn, dumps, read_object
from dsv3_jax.text.chat import Piece


def control(text: str) -> Piece:
    """A control string."""
    return Piece(text, control=True)


CALLS, END_CALLS = control("<｜tool▁calls▁begin｜>"), control("<｜tool▁calls▁end｜>")
CALL, END_CALL = control("<｜tool▁call▁begin｜>"), control("<｜tool▁call▁end｜>")
RESULTS, END_RESULTS = control("<｜tool▁outputs▁begin｜>"), control("<｜tool▁outputs▁end｜>")
RESULT, END_RESULT = control("<｜tool▁output▁begin｜>"), control("<｜tool▁output▁end｜>")
SEP, DSML = control("<｜tool▁sep｜>"), control("｜DSML｜")
THINK, END_THINK = control("<think>"), control("</think>")
_FENCE, _END_FENCE = Piece("\n```json\n"), Piece("\n```")


def describe(tools: Sequence[Tool], fenced: bool) -> list[Piece]:
    """The tools in a V3.1 prompt, or (`fenced`) a V3 or R1 prompt."""
    out = [Piece("## Tools\nYou have access to the following tools:\n")]
    for number, tool in enumerate(tools):
        parameters = dumps(tool.parameters, f"tools[{number}].function.parameters")
        out.append(Piece(f"\n### {tool.name}\nDescription: {tool.description}\n\nParameters: {parameters}\n"))
    out.append(Piece("\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n"))
    out += [CALLS, *call_pieces("tool_call_name", "tool_call_arguments", fenced)]
    out += [Piece("{additional_tool_calls}"), END_CALLS]
    chained = "one on each line" if fenced else "directly without separators or spaces"
    out.append(
        Piece(
            "\n\nWhere:\n- `tool_call_name` must be an exact match to one of the available tools\n"
            "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
            f"- For multiple tool calls, chain them {chained}\n"
        )
    )
    return out


def call_pieces(name: str, arguments: str, fenced: bool) -> list[Piece]:
    """One call of V3.1, or (`fenced`) of V3 and R1."""
    if fenced:
        return [CALL, Piece("function"), SEP, Piece(name), _FENCE, Piece(arguments), _END_FENCE, END_CALL]
    return [CALL, Piece(name), SEP, Piece(arguments), END_CALL]


def calls_pieces(calls: Sequence[Call], fenced: bool) -> list[Piece]:
    """All calls of an answer."""
    out = [CALLS]
    for number, call in enumerate(calls):
        out += [Piece("\n")] if fenced and number else []
        out += call_pieces(call.name, call.arguments, fenced)
    return [*out, END_CALLS]


def forced_pieces(tool: Tool | None, fenced: bool) -> list[Piece]:
    """The beginning of an answer that must call a tool: `tool`, or any."""
    name = [] if tool is None else [Piece(tool.name)]
    if fenced:
        return [CALLS, CALL, Piece("function"), SEP, *name, *([_FENCE] if name else [])]
    return [CALLS, CALL, *name, *([SEP] if name else [])]


# --- V3.2 -------------------------------------------------------------------------------------------------


def _tag(name: str, close: bool = False) -> list[Piece]:
    return [Piece("</" if close else "<"), DSML, Piece(name + ">")]


_DSML_EXAMPLE = [
    *_tag("function_calls"),
    Piece("\n"),
    *_tag('invoke name="$FUNCTION_NAME"'),
    Piece("\n"),
    *_tag('parameter name="$PARAMETER_NAME" string="true|false"'),
    Piece("$PARAMETER_VALUE"),
    *_tag("parameter", close=True),
    Piece("\n...\n"),
    *_tag("invoke", close=True),
    Piece("\n"),
    *_tag('invoke name="$FUNCTION_NAME2"'),
    Piece("\n...\n"),
    *_tag("invoke", close=True),
    Piece("\n"),
    *_tag("function_calls", close=True),
]


def dsml_describe(tools: Sequence[Tool]) -> list[Piece]:
    """The tools in a V3.2 prompt."""
    specs = [dumps(tool.spec, f"tools[{number}].function") for number, tool in enumerate(tools)]
    return [
        Piece(
            "## Tools\n\nYou have access to a set of tools you can use to answer the user's question.\n"
            'You can invoke functions by writing a "'
        ),
        *_tag("function_calls"),
        Piece('" block like the following as part of your reply to the user:\n'),
        *_DSML_EXAMPLE,
        Piece(
            "\n\nString and scalar parameters should be specified as is without any escaping or quotes, while lists "
            'and objects should use JSON format. The "string" attribute should be set to "true" for string type '
            'parameters and "false" for other types (numbers, booleans, arrays, objects).\n\n'
            "If the thinking_mode is enabled, then after function results you should strongly consider outputting a "
            "thinking block. Here is an example:\n\n"
        ),
        *_tag("function_calls"),
        Piece("\n...\n"),
        *_tag("function_calls", close=True),
        Piece("\n\n<function_results>\n...\n</function_results>\n\n"),
        THINK,
        Piece("...thinking about results"),
        END_THINK,
        Piece("\n\nHere are the functions available in JSONSchema format:\n<functions>\n"),
        Piece("\n".join(specs)),
        Piece("\n</functions>\n"),
    ]


def dsml_calls(calls: Sequence[Call]) -> list[Piece]:
    """All calls of a V3.2 answer."""
    out = [Piece("\n\n"), *_tag("function_calls"), Piece("\n")]
    for call in calls:
        out += [*_tag(f'invoke name="{call.name}"'), Piece("\n")]
        arguments = read_object(call.arguments)
        assert arguments is not None, "read_turns has checked it"
        for number, (name, value) in enumerate(arguments.items()):
            is_string = isinstance(value, str)
            out += [Piece("\n")] if number else []
            out += _tag(f'parameter name="{name}" string="{"true" if is_string else "false"}"')
            out += [Piece(value if is_string else dumps(value, "arguments")), *_tag("parameter", close=True)]
        out += [Piece("\n"), *_tag("invoke", close=True), Piece("\n")]
    return [*out, *_tag("function_calls", close=True)]


def dsml_results(results: Sequence[Turn]) -> list[Piece]:
    """The results that follow the calls of a V3.2 answer."""
    inner = "".join(f"\n<result>{turn.content}</result>" for turn in results)
    return [Piece(f"\n\n<function_results>{inner}\n</function_results>\n\n")]


def dsml_forced(tool: Tool | None) -> list[Piece]:
    """The beginning of a V3.2 answer that must call a tool: `tool`, or any."""
    out = [Piece("\n\n"), *_tag("function_calls"), Piece("\n"), Piece("<"), DSML]
    return [*out, Piece('invoke name="' if tool is None else f'invoke name="{tool.name}">\n')]
