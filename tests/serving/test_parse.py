"""Reasoning and tool calls: the formats understood, whatever way an answer is cut, and text where it is none."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from dsv3_jax.serving.deltas import Answer, Delta, ToolDelta, merged
from dsv3_jax.serving.marks import MARKS
from dsv3_jax.serving.parse import AnswerParser
from dsv3_jax.serving.text import TextStream
from dsv3_jax.text import Tokenizer
from tests.serving.marked import marked_ids

BYTES = Tokenizer.bytes()
CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, END_CALL, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
D = "｜DSML｜"


def _id(index: int) -> str:
    return f"call_{index}"


def _parser(reasoning: bool = True, tools: bool = True) -> AnswerParser:
    return AnswerParser(reasoning=reasoning, tools=tools, new_id=_id)


def _parse(tokenizer: Tokenizer, text: str, *, cut: bool = False, primer: str = "", **kinds: bool) -> Answer:
    stream = TextStream(tokenizer, parser=_parser(**kinds), primer=marked_ids(tokenizer, primer))
    ids = marked_ids(tokenizer, text)
    for chunk in [[index] for index in ids] if cut else [ids]:
        stream.push(chunk)
    stream.finish()
    return stream.answer


def _v3(*calls: tuple[str, str]) -> str:
    return (
        CALLS
        + "\n".join(
            f"{CALL}function{SEP}{name}\n```json\n{arguments}\n```{END_CALL}" for name, arguments in calls
        )
        + END_CALLS
    )


def _v31(*calls: tuple[str, str]) -> str:
    return CALLS + "".join(f"{CALL}{name}{SEP}{arguments}{END_CALL}" for name, arguments in calls) + END_CALLS


def _v32(*calls: tuple[str, dict[str, tuple[str, bool]]]) -> str:
    inner = ""
    for name, values in calls:
        parameters = "".join(
            f'<{D}parameter name="{key}" string="{str(is_string).lower()}">{value}</{D}parameter>\n'
            for key, (value, is_string) in values.items()
        )
        inner += f'<{D}invoke name="{name}">\n{parameters}</{D}invoke>\n'
    return f"<{D}function_calls>\n{inner}</{D}function_calls>"


TOKENIZERS = ["bytes", "deepseek"]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return BYTES if request.param == "bytes" else request.getfixturevalue("deepseek")


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "token by token"])
class TestAnswers:
    def test_reasoning_and_content(self, tokenizer: Tokenizer, cut: bool) -> None:
        answer = _parse(tokenizer, "<think>\nLet me see. 想\n</think>\n\nFour, 四.", cut=cut)
        assert answer == Answer("Four, 四.", "Let me see. 想")

    def test_reasoning_that_the_prompt_opened(self, tokenizer: Tokenizer, cut: bool) -> None:
        assert _parse(tokenizer, "hm\n</think>\n\nyes", cut=cut, primer="<think>\n") == Answer("yes", "hm")

    def test_empty_reasoning(self, tokenizer: Tokenizer, cut: bool) -> None:
        assert _parse(tokenizer, "<think>\n\n</think>\n\nyes", cut=cut) == Answer("yes")

    def test_reasoning_that_was_cut_off(self, tokenizer: Tokenizer, cut: bool) -> None:
        assert _parse(tokenizer, "<think>so far <", cut=cut) == Answer("", "so far <")

    def test_no_reasoning(self, tokenizer: Tokenizer, cut: bool) -> None:
        assert _parse(tokenizer, "  plain\n", cut=cut) == Answer("  plain\n")

    def test_think_in_the_middle_is_text(self, tokenizer: Tokenizer, cut: bool) -> None:
        assert _parse(tokenizer, "a<think>b</think>c", cut=cut) == Answer("a<think>b</think>c")

    def test_calls_of_v3(self, tokenizer: Tokenizer, cut: bool) -> None:
        first, second = '{"city": "Hangzhou"}', '{"city": "北京", "days": [1, {"x": "```"}]}'
        text = "Let me look.\n" + _v3(("get_weather", first), ("get_weather", second))
        answer = _parse(tokenizer, text, cut=cut)
        assert answer.content == "Let me look."
        assert answer.tool_calls == [
            ToolDelta(0, "call_0", "get_weather", first),
            ToolDelta(1, "call_1", "get_weather", second),
        ]

    def test_calls_of_v31(self, tokenizer: Tokenizer, cut: bool) -> None:
        answer = _parse(tokenizer, _v31(("a", '{"x": {"y": 1}}'), ("function", "{}")), cut=cut)
        assert answer == Answer(
            tool_calls=[
                ToolDelta(0, "call_0", "a", '{"x": {"y": 1}}'),
                ToolDelta(1, "call_1", "function", "{}"),
            ]
        )

    def test_calls_of_v32(self, tokenizer: Tokenizer, cut: bool) -> None:
        text = "Looking.\n\n" + _v32(
            (
                "search",
                {
                    "query": ('a "quoted" 词\n<b>', True),
                    "n": ("3", False),
                    "tags": ('["x", {"y": 1}]', False),
                },
            ),
            ("now", {}),
        )
        answer = _parse(tokenizer, text, cut=cut)
        assert answer.content == "Looking."
        assert [call.name for call in answer.tool_calls] == ["search", "now"]
        assert json.loads(answer.tool_calls[0].arguments) == {
            "query": 'a "quoted" 词\n<b>',
            "n": 3,
            "tags": ["x", {"y": 1}],
        }
        assert answer.tool_calls[1].arguments == "{}"

    def test_a_v32_value_that_is_not_json_becomes_a_string(self, tokenizer: Tokenizer, cut: bool) -> None:
        values = {"a": ("hello", False), "b": ("NaN", False), "c": ("[" * 3000, False)}
        answer = _parse(tokenizer, _v32(("f", values)), cut=cut)
        assert json.loads(answer.tool_calls[0].arguments) == {"a": "hello", "b": "NaN", "c": "[" * 3000}

    def test_calls_after_reasoning_with_and_without_its_end(self, tokenizer: Tokenizer, cut: bool) -> None:
        call = ToolDelta(0, "call_0", "f", '{"x":1}')
        for calls in (_v3(("f", '{"x":1}')), _v31(("f", '{"x":1}'))):
            for end in ("\n</think>\n\n", "\n"):
                assert _parse(tokenizer, f"<think>hm{end}{calls}", cut=cut) == Answer("", "hm", [call])
        dsml = _parse(tokenizer, "<think>hm\n\n" + _v32(("f", {"x": ("1", False)})), cut=cut)
        assert (dsml.reasoning, dsml.content, dsml.tool_calls[0].arguments) == ("hm", "", '{"x": 1}')

    def test_text_after_calls_is_content(self, tokenizer: Tokenizer, cut: bool) -> None:
        for calls in (_v31(("f", "{}")), _v32(("f", {}))):
            answer = _parse(tokenizer, f"a\n\n{calls}\n b \n", cut=cut)
            assert (answer.content, len(answer.tool_calls)) == ("a\n b", 1)

    def test_without_parallel_calls_the_answer_ends_with_the_first(
        self, tokenizer: Tokenizer, cut: bool
    ) -> None:
        first = ToolDelta(0, "call_0", "f", '{"x": 1}')
        for text in (
            _v3(("f", '{"x": 1}'), ("g", "{}")) + "more",
            _v31(("f", '{"x": 1}'), ("g", "{}")),
            _v32(("f", {"x": ("1", False)}), ("g", {})),
        ):
            stream = TextStream(tokenizer, parser=AnswerParser(parallel=False, new_id=_id))
            ids = marked_ids(tokenizer, text)
            for chunk in [[index] for index in ids] if cut else [ids]:
                stream.push(chunk)
            stream.finish()
            assert stream.answer == Answer(tool_calls=[first])
            assert stream.finish_reason == "stop" and stream.final_reason("length") == "tool_calls"
            assert stream.consumed < len(ids)

    def test_arguments_that_were_cut_off_stay_arguments(self, tokenizer: Tokenizer, cut: bool) -> None:
        text = f'{CALLS}{CALL}f{SEP}{{"city": "Hang'
        assert _parse(tokenizer, text, cut=cut).tool_calls == [ToolDelta(0, "call_0", "f", '{"city": "Hang')]
        text = (
            f'<{D}function_calls>\n<{D}invoke name="f">\n<{D}parameter name="city" string="true">Hang</{D}par'
        )
        [call] = _parse(tokenizer, text, cut=cut).tool_calls
        assert call.arguments == f'{{"city": "Hang</{D}par'

    def test_a_list_of_calls_without_its_end(self, tokenizer: Tokenizer, cut: bool) -> None:
        text = f"{CALL}f{SEP}{{}}{CALL}g{SEP}{{}}"
        answer = _parse(tokenizer, text, cut=cut)
        assert [(call.name, call.arguments) for call in answer.tool_calls] == [("f", "{}"), ("g", "{}")]
        assert answer.content == ""

    @pytest.mark.parametrize(
        "text",
        [
            f"{CALLS}{CALL}f{SEP}no arguments{END_CALL}{END_CALLS}",
            f"{CALLS}{CALL}two words{SEP}{{}}{END_CALL}{END_CALLS}",
            f"{CALLS}{CALL}{SEP}{{}}{END_CALL}{END_CALLS}",
            f"{CALLS}{CALL}other{SEP}f\n```json\n{{}}\n```{END_CALL}{END_CALLS}",
            f"{CALLS}{END_CALLS}",
            f"x {CALLS} y",
            f"{CALLS}",
            f"  {CALL}f",
            f"{SEP}{END_CALL}",
            f"{CALL}{'n' * 2000}{SEP}{{}}",
            f"{CALL}{SEP} {D}{{",
            f"<{D}function_calls>\nnothing</{D}function_calls>",
            f'<{D}function_calls><{D}invoke name="a b"></{D}invoke>',
            f"<{D}other>",
            f"a </{D}function_calls> b",
            f"{D}{D}<{D}",
            f"<{D}function_calls>\n<{D}invoke",
        ],
    )
    def test_what_never_becomes_a_call_stays_text(self, tokenizer: Tokenizer, cut: bool, text: str) -> None:
        assert _parse(tokenizer, text, cut=cut) == Answer(text)

    def test_without_tools_calls_are_text(self, tokenizer: Tokenizer, cut: bool) -> None:
        text = "a \n" + _v31(("f", "{}"))
        assert _parse(tokenizer, text, cut=cut, tools=False) == Answer(text)

    def test_without_reasoning_think_is_text(self, tokenizer: Tokenizer, cut: bool) -> None:
        assert _parse(tokenizer, "<think>\na</think>\nb", cut=cut, reasoning=False) == Answer(
            "<think>\na</think>\nb"
        )

    def test_calls_in_reasoning_without_tools_are_reasoning(self, tokenizer: Tokenizer, cut: bool) -> None:
        text = f"<<{D}invoke>{CALL}x"
        assert _parse(tokenizer, f"<think>{text}", cut=cut, tools=False) == Answer("", text)

    def test_a_forced_call(self, tokenizer: Tokenizer, cut: bool) -> None:
        primer = f"{CALLS}{CALL}function{SEP}f\n```json\n"
        answer = _parse(tokenizer, f'{{"x": 1}}\n```{END_CALL}{END_CALLS}', cut=cut, primer=primer)
        assert answer == Answer(tool_calls=[ToolDelta(0, "call_0", "f", '{"x": 1}')])


def test_spelled_out_control_strings_are_text(deepseek: Tokenizer) -> None:
    """The model may quote what a user wrote; only tokens structure an answer."""
    text = f"<think>a</think>{_v31(('f', '{}'))}{_v3(('f', '{}'))}"
    stream = TextStream(deepseek, parser=_parser())
    stream.push(deepseek.encode_text(text))
    stream.finish()
    assert stream.answer == Answer(text)
    inside = [deepseek.control["<think>"], *deepseek.encode_text("x</think>y")]
    stream = TextStream(deepseek, parser=_parser())
    stream.push(inside)
    stream.finish()
    assert stream.answer == Answer("", "x</think>y")


def test_arguments_stream_as_they_come() -> None:
    parser = _parser()
    head = f"{CALLS}{CALL}function{SEP}f\n```json\n"
    for spelling, mark in MARKS.items():
        head = head.replace(spelling, mark)
    assert parser.push(head) == []
    assert parser.push('{"a') == [
        Delta(tool=ToolDelta(0, "call_0", "f")),
        Delta(tool=ToolDelta(0, arguments='{"a')),
    ]
    assert parser.push('": "b') == [Delta(tool=ToolDelta(0, arguments='": "b'))]
    assert parser.push('"}\n``') == [Delta(tool=ToolDelta(0, arguments='"}'))]
    assert merged(parser.push("`" + MARKS[END_CALL])) == []  # the fence is no argument


def test_content_is_held_back_only_where_it_may_become_a_call() -> None:
    parser = _parser()
    assert parser.push("Hello") == [Delta(content="Hello")]
    assert parser.push(" world\n") == [Delta(content=" world")]
    assert parser.push("if a <") == [Delta(content="\nif a")]
    assert merged(parser.push(" b")) == [Delta(content=" < b")]


_PARTS = st.sampled_from(
    [
        *MARKS,
        "<",
        "</",
        ">",
        " ",
        "\n",
        "\n\n",
        "a",
        "function",
        "f",
        "f\n```json\n",
        "```",
        "`",
        '{"x": 1}',
        "{",
        "}",
        f"<{D}function_calls>",
        f"</{D}function_calls>",
        f'<{D}invoke name="f">',
        f"</{D}invoke>",
        f'<{D}parameter name="k" string="true">',
        f'<{D}parameter name="k" string="false">',
        f"</{D}parameter>",
        f"{CALLS}{CALL}function{SEP}f\n```json\n",
        f"\n```{END_CALL}",
        f"{CALL}g{SEP}" + "{",
        "é中",
    ]
)


@given(st.lists(_PARTS, max_size=14), st.data(), st.booleans(), st.booleans())
@settings(max_examples=600, deadline=None)
def test_any_cut_gives_the_answer_of_the_whole(
    parts: list[str], data: st.DataObject, reasoning: bool, tools: bool
) -> None:
    text = "".join(parts)
    for spelling, mark in MARKS.items():
        text = text.replace(spelling, mark)
    whole = Answer()
    parser = _parser(reasoning, tools)
    whole.add([*parser.push(text), *parser.finish()])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6), label="cuts"))
    parser, answer = _parser(reasoning, tools), Answer()
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        answer.add(parser.push(text[start:end]))
    answer.add(parser.finish())
    assert answer == whole
    by_one, parser = Answer(), _parser(reasoning, tools)
    for char in text:
        by_one.add(parser.push(char))
    by_one.add(parser.finish())
    assert by_one == whole


@given(st.lists(_PARTS, max_size=14))
@settings(max_examples=200, deadline=None)
def test_without_calls_and_reasoning_no_character_is_lost(parts: list[str]) -> None:
    text = "".join(parts)
    answer = _parse(BYTES, text)
    if not answer.tool_calls and not answer.reasoning and not text.lstrip().startswith("<think>"):
        assert answer.content == text
