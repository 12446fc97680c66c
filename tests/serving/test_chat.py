"""Conversations with tools as ids: the published formats, no forged control token, and errors that name their place."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import hypothesis.strategies as st
import pytest
import tokenizers
from hypothesis import given, settings
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.serving.chat import FORMATS, ChatTemplate
from dsv3_jax.serving.text import TextStream
from dsv3_jax.serving.turns import ChatError
from dsv3_jax.text import Tokenizer, render_messages
from dsv3_jax.text.chat import DeepSeekV3

BYTES = Tokenizer.bytes()
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TOOL_FORMATS = [name for name in FORMATS if name != "deepseek-v2"]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city. 天气",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CITY = '{"city": "北京"}'


def _call(number: int, arguments: str = CITY, name: str = "get_weather") -> dict[str, Any]:
    return {"id": f"c{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def _asked(*calls: dict[str, Any], content: str | None = None) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": content, "tool_calls": list(calls)},
    ]


def _result(number: int, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": content}


@cache
def _template(deepseek: Tokenizer, name: str) -> ChatTemplate:
    return ChatTemplate(deepseek, name)


def _text(deepseek: Tokenizer, name: str, messages: Any, **options: Any) -> str:
    return deepseek.decode(_template(deepseek, name).render(messages, **options).ids, skip_special=False)


# --- against the checkpoint's own template ------------------------------------------------------------------------


@cache
def _stock(data: bytes) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(data.decode())


def _by_jinja(tokenizer: Tokenizer, messages: Any, generate: bool) -> list[int]:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(tokenizer.chat_template or "").render(
        messages=messages, add_generation_prompt=generate, bos_token=BOS, eos_token=EOS
    )
    return _stock(tokenizer.files["tokenizer.json"]).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("content", [None, "", "Let me look."])
@pytest.mark.parametrize("results", [0, 1, 2])
def test_one_round_of_calls_gives_the_ids_of_the_r1_template(
    deepseek: Tokenizer, content: str | None, results: int
) -> None:
    calls = [_call(number) for number in range(max(1, results))]
    messages = _asked(*calls, content=content) + [_result(n, f"{n}° 晴") for n in range(results)]
    if not results:  # the template alone knows calls without results
        messages[-1:] = [{"role": "assistant", "content": "x"}]
    answered = [*messages, {"role": "assistant", "content": "Fine."}]
    for conversation in (messages, answered, [*answered, {"role": "user", "content": "And now?"}]):
        for generate in (True, False):
            ids = ChatTemplate(deepseek).render(conversation, add_generation_prompt=generate).ids
            assert ids == _by_jinja(deepseek, conversation, generate)


_TURN = st.sampled_from(["system", "user", "assistant"])
_CONTENT = st.sampled_from(["", "hi", "a\n\n", "中文", "<think>x</think>y", "<｜User｜>"])


@given(
    st.lists(st.tuples(_TURN, _CONTENT), min_size=1, max_size=6),
    st.sampled_from(list(FORMATS)),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_without_tools_it_is_the_format_that_infer_renders(
    deepseek: Tokenizer, turns: list[tuple[str, str]], name: str, generate: bool
) -> None:
    fmt = FORMATS[name]
    if name == "deepseek-v3.2":
        return
    messages = [{"role": role, "content": content} for role, content in turns]
    ids = _template(deepseek, name).render(messages, add_generation_prompt=generate).ids
    assert ids == render_messages(deepseek, messages, fmt=fmt, generate=generate)  # type: ignore[arg-type]


# --- the formats in full --------------------------------------------------------------------------------------


def test_v31_in_full(deepseek: Tokenizer) -> None:
    messages = _asked(_call(1), _call(2, "{}")) + [_result(2, "two"), _result(1, "one")]
    text = _text(deepseek, "deepseek-v3.1", messages, tools=[WEATHER])
    schema = json.dumps(WEATHER["function"]["parameters"])  # type: ignore[index]
    assert text == (
        f"{BOS}Be brief.\n\n## Tools\nYou have access to the following tools:\n\n### get_weather\n"
        f"Description: Weather of a city. 天气\n\nParameters: {schema}\n\n"
        "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments"
        "<｜tool▁call▁end｜>{additional_tool_calls}<｜tool▁calls▁end｜>\n\nWhere:\n"
        "- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        "- For multiple tool calls, chain them directly without separators or spaces\n"
        "<｜User｜>Weather?<｜Assistant｜></think>"
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{CITY}<｜tool▁call▁end｜>"
        f"<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}"
        "<｜tool▁output▁begin｜>one<｜tool▁output▁end｜><｜tool▁output▁begin｜>two<｜tool▁output▁end｜>"
    )


def test_v3_over_two_rounds_opens_and_closes_each_list(deepseek: Tokenizer) -> None:
    messages = [*_asked(_call(1), content="Look."), _result(1, "one")]
    messages += [{"role": "assistant", "content": None, "tool_calls": [_call(2), _call(3)]}]
    messages += [_result(2, "two"), _result(3, "three"), {"role": "user", "content": "So?"}]
    call = f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{CITY}\n```<｜tool▁call▁end｜>"
    result = "<｜tool▁output▁begin｜>{}<｜tool▁output▁end｜>"
    outputs = ("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>")
    assert _text(deepseek, "deepseek-v3", messages) == (
        f"{BOS}Be brief.<｜User｜>Weather?<｜Assistant｜>Look.<｜tool▁calls▁begin｜>{call}<｜tool▁calls▁end｜>{EOS}"
        f"{outputs[0]}{result.format('one')}{outputs[1]}"
        f"<｜tool▁calls▁begin｜>{call}\n{call}<｜tool▁calls▁end｜>{EOS}"
        f"{outputs[0]}{result.format('two')}{result.format('three')}{outputs[1]}<｜User｜>So?<｜Assistant｜>"
    )


def test_v32_in_full(deepseek: Tokenizer) -> None:
    arguments = '{"city": "北京", "days": 3, "tags": ["a", {"b": null}]}'
    messages = _asked(_call(1, arguments), content="Look.")
    messages[-1]["reasoning_content"] = "hm"
    messages += [_result(1, "sunny")]
    text = _text(deepseek, "deepseek-v3.2", messages, tools=[WEATHER], thinking=True)
    head, rest = text.split("<functions>\n")
    assert head.startswith(f"{BOS}Be brief.\n\n## Tools\n\nYou have access to a set of tools")
    assert rest == (
        json.dumps(WEATHER["function"], ensure_ascii=False)
        + "\n</functions>\n<｜User｜>Weather?<｜Assistant｜><think>hm</think>Look.\n\n<｜DSML｜function_calls>\n"
        '<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">北京</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="tags" string="false">["a", {"b": null}]</｜DSML｜parameter>\n'
        f"</｜DSML｜invoke>\n</｜DSML｜function_calls>{EOS}"
        "\n\n<function_results>\n<result>sunny</result>\n</function_results>\n\n<think>"
    )
    earlier = [*messages, {"role": "user", "content": "And?"}]
    text = _text(deepseek, "deepseek-v3.2", earlier, thinking=True)
    assert "hm" not in text and text.endswith(
        "</function_results>\n\n</think><｜User｜>And?<｜Assistant｜><think>"
    )
    assert _text(deepseek, "deepseek-v3.2", earlier).endswith("<｜User｜>And?<｜Assistant｜></think>")


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_what_is_rendered_for_an_answer_is_parsed_back(deepseek: Tokenizer, name: str) -> None:
    """The ids of an earlier answer, read as a new one, give the same content and calls."""
    template = _template(deepseek, name)
    calls = [_call(1), _call(2, '{"city": "a \\"b\\"", "n": [1, 2.5, null]}')]
    before = _asked(*calls)[:2]
    after = [*_asked(*calls, content="Look."), _result(1, "x"), _result(2, "y")]
    prompt = template.render(before)
    ids = template.render(after, add_generation_prompt=False).ids
    opened = [deepseek.control["<think>"], *deepseek.encode_text("\n")] if name == "deepseek-r1" else []
    head = prompt.ids[: len(prompt.ids) - len(opened)]
    assert ids[: len(head)] == head
    answer = ids[len(head) : len(head) + ids[len(head) :].index(deepseek.eos_ids[0])]
    stream = TextStream(deepseek, parser=template.parser(tools=True))
    stream.push(answer)
    stream.finish()
    assert stream.answer.content == "Look."
    got = [(call.name, json.loads(call.arguments)) for call in stream.answer.tool_calls]
    assert got == [("get_weather", json.loads(call["function"]["arguments"])) for call in calls]
    assert stream.final_reason("stop") == "tool_calls"


# --- the opening of an answer ----------------------------------------------------------------------------------


def test_thinking_opens_the_reasoning_and_the_parser_knows(deepseek: Tokenizer) -> None:
    hi = [{"role": "user", "content": "hi"}]
    for name in TOOL_FORMATS:
        template = _template(deepseek, name)
        prompt = template.render(hi, thinking=True)
        text = deepseek.decode(prompt.ids, skip_special=False)
        assert text.rstrip("\n").endswith("<｜Assistant｜><think>"), name
        stream = TextStream(deepseek, parser=template.parser(tools=False), primer=prompt.primer)
        stream.push([*deepseek.encode_text("hm"), deepseek.control["</think>"], *deepseek.encode_text("yes")])
        stream.finish()
        assert (stream.answer.reasoning, stream.answer.content) == ("hm", "yes"), name
    assert _template(deepseek, "deepseek-v3.1").render(hi, thinking=False).primer == []
    with pytest.raises(ChatError, match="thinking cannot be turned off"):
        _template(deepseek, "deepseek-r1").render(hi, thinking=False)


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize("named", [False, True])
def test_a_forced_call_is_begun_in_the_prompt_and_parsed(deepseek: Tokenizer, name: str, named: bool) -> None:
    template = _template(deepseek, name)
    choice = {"type": "function", "function": {"name": "get_weather"}} if named else "required"
    prompt = template.render([{"role": "user", "content": "hi"}], tools=[WEATHER], tool_choice=choice)
    rest = {
        "deepseek-v3.1": ("get_weather<｜tool▁sep｜>", CITY + "<｜tool▁call▁end｜>"),
        "deepseek-v3.2": (
            'get_weather">\n',
            '<｜DSML｜parameter name="city" string="true">北京</｜DSML｜parameter></｜DSML｜invoke>',
        ),
    }.get(name, ("get_weather\n```json\n", CITY + "\n```<｜tool▁call▁end｜>"))
    text = rest[1] if named else "".join(rest)
    ids: list[int] = []
    for part in text.replace("<｜", "\0<｜").replace("｜>", "｜>\0").split("\0"):
        index = deepseek.control.get(part)
        ids += deepseek.encode_text(part) if index is None else [index]
    if name == "deepseek-r1":  # its format opens the reasoning
        opening = deepseek.decode(prompt.ids, skip_special=False).split("<｜Assistant｜>")[1]
        assert opening.startswith("<think>\n</think><｜tool▁calls▁begin｜>")
    stream = TextStream(deepseek, parser=template.parser(prompt.tools), primer=prompt.primer)
    for index in ids:
        stream.push([index])
    stream.finish()
    [call] = stream.answer.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("get_weather", json.loads(CITY))
    assert (stream.answer.content, stream.answer.reasoning) == ("", "")


def test_tool_choice_none_says_nothing_of_tools(deepseek: Tokenizer) -> None:
    hi = [{"role": "user", "content": "hi"}]
    with_tools = _template(deepseek, "deepseek-v3.1").render(hi, tools=[WEATHER], tool_choice="none")
    assert with_tools == _template(deepseek, "deepseek-v3.1").render(hi)
    assert not with_tools.tools


@pytest.mark.parametrize("name", [*TOOL_FORMATS, "deepseek-v2"])
def test_the_last_message_can_be_continued(deepseek: Tokenizer, name: str) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I thi"}]
    text = _text(deepseek, name, messages, continue_final_message=True)
    assert text.endswith("I thi") and text.count("Assistant") == 1
    with pytest.raises(ChatError, match="must end with an assistant message"):
        _template(deepseek, name).render(messages[:1], continue_final_message=True)
    if name != "deepseek-v2":
        messages[-1] = {"role": "assistant", "content": "", "reasoning": "so far"}
        prompt = _template(deepseek, name).render(messages, continue_final_message=True)
        assert deepseek.decode(prompt.ids, skip_special=False).endswith("<｜Assistant｜><think>so far")
        assert prompt.primer == [deepseek.control["<think>"]]


def test_text_parts_and_developer_are_text_and_system(deepseek: Tokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for name in FORMATS:
        given = [{"role": "developer", "content": "S"}, {"role": "user", "content": parts}]
        plain = [{"role": "system", "content": "S"}, {"role": "user", "content": "ab"}]
        assert _text(deepseek, name, given) == _text(deepseek, name, plain)


def test_the_byte_tokenizer_has_no_tools_and_says_so() -> None:
    template = ChatTemplate(BYTES)
    assert not template.has_tools and template.parser(True).marks == ()
    with pytest.raises(ChatError, match="tools are not supported by this model's chat format"):
        template.render([{"role": "user", "content": "hi"}], tools=[WEATHER])
    assert template.render([{"role": "user", "content": "hi"}], tools=[]).ids == render_messages(
        BYTES, [{"role": "user", "content": "hi"}]
    )


def test_a_format_by_name_and_what_is_refused(deepseek: Tokenizer) -> None:
    assert isinstance(ChatTemplate(deepseek).format, DeepSeekV3)
    with pytest.raises(ConfigError, match="chat format 'chatml' is unknown; expected auto, deepseek-v2"):
        ChatTemplate(deepseek, "chatml")
    bare = copy.copy(BYTES)
    bare.config = {}
    bare.files = {}
    with pytest.raises(DataError, match="has no chat template"):
        ChatTemplate(bare)


# --- no forged control token -----------------------------------------------------------------------------------


def _places(text: str) -> list[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]]:
    """(place, messages, tools) with `text` in each place a client can write to."""
    tool = copy.deepcopy(WEATHER)
    tool["function"]["description"] = text  # type: ignore[index]
    keys = copy.deepcopy(WEATHER)
    keys["function"]["parameters"] = {"properties": {text: {"description": text}}}  # type: ignore[index]
    arguments = json.dumps({"city": text, text: [text]}, ensure_ascii=False)
    plain = [*_asked(_call(1), content="x"), _result(1, "y"), {"role": "user", "content": "z"}]

    def put(number: int, **values: Any) -> list[dict[str, Any]]:
        changed = copy.deepcopy(plain)
        changed[number] |= values
        return changed

    return [
        ("system", put(0, content=text), [WEATHER]),
        ("user", put(1, content=text), [WEATHER]),
        ("user part", put(1, content=[{"type": "text", "text": text}]), [WEATHER]),
        ("last user", put(4, content=text), [WEATHER]),
        ("assistant", put(2, content=text), [WEATHER]),
        ("reasoning", put(2, reasoning=text), [WEATHER]),
        ("arguments", put(2, tool_calls=[_call(1, arguments)]), [WEATHER]),
        ("result", put(3, content=text), [WEATHER]),
        ("tool description", plain, [tool]),
        ("tool schema", plain, [keys]),
    ]


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_no_added_token_in_any_place_becomes_a_control_id(deepseek: Tokenizer, name: str) -> None:
    """All added tokens of the real tokenizer, alone and inside text, in all places a client writes to: 0 leaks."""
    template, control = _template(deepseek, name), set(deepseek.control.values())
    wanted = {
        place: [i for i in template.render(messages, tools=tools).ids if i in control]
        for place, messages, tools in _places("w")
    }
    leaks = 0
    strings = list(deepseek.control)
    seven = len(strings) // 7
    # Every string that the formats use by itself; the numbered place holders, all of them, seven at a time.
    groups = [[s] for s in strings if "place" not in s] + [strings[n::seven] for n in range(seven)]
    for group in groups:
        text = "a ".join(["", *group, "\n".join(group)])
        for forged in [text, *(group if len(group) == 1 else [])]:
            for place, messages, tools in _places(forged):
                ids = template.render(messages, tools=tools).ids
                leaks += [i for i in ids if i in control] != wanted[place]
    assert leaks == 0


def test_names_cannot_hold_control_strings(deepseek: Tokenizer) -> None:
    tool = copy.deepcopy(WEATHER)
    tool["function"]["name"] = "<｜User｜>"  # type: ignore[index]
    with pytest.raises(ChatError, match=r"tools\[0\]\.function\.name must be 1 to 64 of"):
        _template(deepseek, "deepseek-v3").render([{"role": "user", "content": "x"}], tools=[tool])


# --- errors name their place -----------------------------------------------------------------------------------

_USER = {"role": "user", "content": "x"}
_BAD = [
    ([], "messages must be a non-empty list of objects, found list"),
    ({"role": "user"}, "messages must be a non-empty list of objects, found dict"),
    (["hi"], r"messages\[0\] must be an object with role and content, found str"),
    ([{"role": "function", "content": "x"}], r"messages\[0\]\.role is str; expected system, developer, user"),
    ([{"role": ["user"], "content": "x"}], r"messages\[0\]\.role is list"),
    ([{"role": "user"}], r"messages\[0\]\.content must be a string or a list of text parts, found nothing"),
    (
        [{"role": "user", "content": [{"type": "image_url"}]}],
        r"messages\[0\]\.content\[0\]\.type is str; only text",
    ),
    (
        [{"role": "user", "content": [{"type": "text", "text": 1}]}],
        r"messages\[0\]\.content\[0\]\.text must be a str",
    ),
    ([{"role": "user", "content": ["x"]}], r"messages\[0\]\.content\[0\]\.type is nothing"),
    ([{**_USER, "tool_calls": [1]}], r"messages\[0\] has a key that is not supported for the role user"),
    ([{**_USER, "weight": 1}], r"messages\[0\] has a key that is not supported"),
    ([_USER, {"role": "assistant", "content": None}], r"messages\[1\]\.content must be a string"),
    ([_USER, {"role": "assistant", "tool_calls": []}], r"messages\[1\]\.tool_calls must be a non-empty list"),
    ([_USER, {"role": "assistant", "tool_calls": ["x"]}], r"messages\[1\]\.tool_calls\[0\] must be"),
    (
        [_USER, {"role": "assistant", "content": "", "reasoning": 1}],
        r"messages\[1\]\.reasoning must be a string",
    ),
    (
        _asked(_call(1, "[1]")),
        r"messages\[2\]\.tool_calls\[0\]\.function\.arguments must be the JSON text of an obj",
    ),
    (_asked(_call(1, '{"a": NaN}')), r"arguments must be the JSON text of an object"),
    (_asked(_call(1, "{")), r"arguments must be the JSON text of an object"),
    (_asked(_call(1, '{"a":' * 5000)), r"arguments must be the JSON text of an object"),
    (_asked(_call(1), _call(1)), r"messages\[2\]\.tool_calls\[1\]\.id is the id of an earlier call"),
    (_asked(_call(1, name="a b")), r"messages\[2\]\.tool_calls\[0\]\.function\.name must be 1 to 64"),
    ([_result(1, "x")], r"messages\[0\]\.role is tool, but no message with tool_calls comes before it"),
    ([_USER, {"role": "tool", "content": "x"}], r"messages\[1\]\.tool_call_id must be a string"),
    (
        [*_asked(_call(1)), _USER],
        r"messages\[2\]\.tool_calls must be followed by a tool message for each call",
    ),
    (_asked(_call(1)), r"messages\[2\]\.tool_calls must be followed"),
    (
        [*_asked(_call(1)), _result(2, "x")],
        r"messages\[3\]\.tool_call_id is not the id of an unanswered call",
    ),
    (
        [*_asked(_call(1)), _result(1, "x"), _result(1, "x")],
        r"messages\[4\]\.tool_call_id is not the id of an un",
    ),
]


@pytest.mark.parametrize(("messages", "message"), _BAD)
def test_bad_messages_are_named(deepseek: Tokenizer, messages: Any, message: str) -> None:
    with pytest.raises(
        ChatError, match="^" + message if message.startswith("messages") else message
    ) as caught:
        _template(deepseek, "deepseek-v3").render(messages)
    assert str(caught.value).startswith(caught.value.param)


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ({}, None, "tools must be a list, found dict"),
        (["x"], None, r"tools\[0\] must be {"),
        ([{"type": "retrieval"}], None, r"tools\[0\] must be {"),
        ([WEATHER, WEATHER], None, r"tools\[1\]\.function\.name is the name of an earlier tool"),
        (
            [{"type": "function", "function": {"name": "f", "description": 1}}],
            None,
            r"description must be a string",
        ),
        (
            [{"type": "function", "function": {"name": "f", "parameters": []}}],
            None,
            r"parameters must be a JSON sch",
        ),
        ([WEATHER], "sometimes", "tool_choice must be"),
        ([WEATHER], {"type": "function", "function": {"name": "other"}}, "tool_choice must be"),
        ([], "required", "tool_choice must be"),
    ],
)
def test_bad_tools_are_named(deepseek: Tokenizer, tools: Any, choice: Any, message: str) -> None:
    with pytest.raises(ChatError, match=message):
        _template(deepseek, "deepseek-v3").render([_USER], tools=tools, tool_choice=choice)


def test_numbers_that_json_does_not_have_are_refused(deepseek: Tokenizer) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"maximum": float("inf")}}}
    for name in TOOL_FORMATS:
        with pytest.raises(ChatError, match=r"tools\[0\]\.function.* holds a number that is not finite"):
            _template(deepseek, name).render([_USER], tools=[tool])


def test_messages_from_an_answer_can_be_sent_back(deepseek: Tokenizer) -> None:
    answer = {
        "role": "assistant",
        "content": "hi",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
        "reasoning": "hm",
        "reasoning_content": "hm",
    }
    plain = {"role": "assistant", "content": "hi"}
    assert _text(deepseek, "deepseek-r1", [_USER, answer, _USER]) == _text(
        deepseek, "deepseek-r1", [_USER, plain, _USER]
    )


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner)
    ),
    max_leaves=8,
)
_KEYS = st.sampled_from(["role", "content", "tool_calls", "tool_call_id", "reasoning", "name", "x"])
_ROLE = st.sampled_from(["system", "user", "assistant", "tool"])


@given(
    st.lists(
        st.dictionaries(_KEYS, _JSON).flatmap(lambda m: _ROLE.map(lambda r: {"role": r, **m})), max_size=3
    ),
    st.none() | st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": _JSON}), max_size=2),
    st.sampled_from(list(FORMATS)),
)
@settings(max_examples=300, deadline=None)
def test_whatever_json_is_sent_gives_ids_or_a_data_error(
    deepseek: Tokenizer, messages: Any, tools: Any, name: str
) -> None:
    try:
        prompt = _template(deepseek, name).render(messages, tools=tools)
    except DataError:
        return
    assert prompt.ids[0] == deepseek.bos_id
