"""Text of an answer while it comes: deltas add up to the decode, whatever way the ids are cut."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from dsv3_jax.serving.deltas import Answer, Delta, ToolDelta
from dsv3_jax.serving.marks import MARKS, MarkedDecoder, spelled
from dsv3_jax.serving.parse import AnswerParser
from dsv3_jax.serving.text import TextStream
from dsv3_jax.serving.tokens import TokenOffsets, token_text
from dsv3_jax.text import StopChecker, Tokenizer

BYTES = Tokenizer.bytes()
CHUNKS = st.lists(st.lists(st.integers(0, 270), max_size=6), max_size=8)


def _read(stream: TextStream, chunks: list[list[int]]) -> Answer:
    """The answer of the deltas as they came out, checked against the stream's own."""
    answer = Answer()
    for chunk in chunks:
        answer.add(stream.push(chunk))
    answer.add(stream.finish())
    assert answer == stream.answer
    return answer


@given(CHUNKS)
def test_deltas_add_up_to_the_full_decode(chunks: list[list[int]]) -> None:
    assert _read(TextStream(BYTES), chunks).content == BYTES.decode(itertools.chain(*chunks))


@given(st.text(max_size=20))
def test_valid_text_shows_no_replacement_character_and_no_half_character(text: str) -> None:
    stream = TextStream(BYTES)
    deltas = [delta.content for byte in text.encode() for delta in stream.push([byte])]
    assert deltas == list(text)  # each character with its last byte
    assert stream.finish() == []


@given(CHUNKS, st.lists(st.sampled_from(["a", "ab", "\n\n", "é", "中", "</s>"]), max_size=3))
def test_stop_strings_end_the_text_wherever_the_ids_are_cut(chunks: list[list[int]], stop: list[str]) -> None:
    text = BYTES.decode(itertools.chain(*chunks))
    checker = StopChecker(stop)
    wanted = "".join(checker.push(char) for char in text)
    stopped = checker.stopped
    stream = TextStream(BYTES, stop=stop)
    assert _read(stream, chunks).content == wanted + checker.finish()
    assert stream.finish_reason == ("stop" if stopped else None)


def test_ids_after_a_stop_string_are_not_consumed() -> None:
    stream = TextStream(BYTES, stop=["END"])
    assert stream.push(b"abENDcd") == [Delta(content="ab")]
    assert (stream.consumed, stream.finish_reason) == (5, "stop")
    assert stream.push(b"more") == [] and stream.finish() == [] and stream.consumed == 5
    assert stream.final_reason("length") == "stop"


def test_an_unfinished_stop_string_is_shown_at_the_end() -> None:
    stream = TextStream(BYTES, stop=["END"])
    assert stream.push(b"abEN") == [Delta(content="ab")]
    assert stream.finish() == [Delta(content="EN")]
    assert stream.finish() == []
    assert stream.final_reason("length") == "length"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        TextStream(BYTES, stop=[""])


@given(st.lists(st.tuples(st.integers(0, 2), st.binary(max_size=4)), max_size=20))
def test_streams_are_independent(moves: list[tuple[int, bytes]]) -> None:
    streams = [TextStream(BYTES, stop=["zz"]) for _ in range(3)]
    alone = [TextStream(BYTES, stop=["zz"]) for _ in range(3)]
    for which, data in moves:
        streams[which].push(data)
    for which, stream in enumerate(alone):
        stream.push(b"".join(data for index, data in moves if index == which))
    assert [s.answer for s in streams] == [s.answer for s in alone]


# --- marks ---------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_marked_text_spells_the_full_decode(deepseek: Tokenizer, data: st.DataObject) -> None:
    control = [index for string, index in deepseek.control.items() if string in MARKS]
    some = st.one_of(st.sampled_from(control), st.integers(0, 129_279), st.sampled_from([0, 1, 2, 128805]))
    ids = data.draw(st.lists(some, max_size=12))
    decoder = MarkedDecoder(deepseek, MARKS)
    pieces = [decoder.push([index]) for index in ids] + [decoder.finish()]
    assert spelled("".join(pieces)) == deepseek.decode(ids)


def test_only_a_control_token_becomes_a_mark(deepseek: Tokenizer) -> None:
    for spelling, mark in MARKS.items():
        if spelling not in deepseek.control:
            continue
        assert MarkedDecoder(deepseek, [spelling]).push([deepseek.control[spelling]]) == mark
        plain = MarkedDecoder(deepseek, [spelling])
        assert plain.push(deepseek.encode_text(spelling)) + plain.finish() == spelling


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "thi", "nk>", "x"]), max_size=8))
def test_without_a_token_the_spelling_is_marked_wherever_it_is_cut(parts: list[str]) -> None:
    text = "".join(parts)
    decoder = MarkedDecoder(BYTES, ["<think>", "</think>"])
    pieces = "".join(decoder.push([byte]) for byte in text.encode()) + decoder.finish()
    assert pieces == text.replace("<think>", MARKS["<think>"]).replace("</think>", MARKS["</think>"])


def test_a_stop_string_that_is_a_control_string_meets_its_token(deepseek: Tokenizer) -> None:
    stream = TextStream(deepseek, stop=["</think>"], parser=AnswerParser())
    ids = [deepseek.control["<think>"], *deepseek.encode_text("hm"), deepseek.control["</think>"]]
    assert _read(stream, [[*ids, *deepseek.encode_text("x")]]) == Answer(reasoning="hm")
    assert stream.finish_reason == "stop"


# --- single tokens ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 270), max_size=12))
def test_offsets_are_where_the_text_of_a_token_begins(ids: list[int]) -> None:
    tokens = TokenOffsets(BYTES).push(ids)
    stream = TextStream(BYTES)
    for index, token in zip(ids, tokens, strict=True):
        assert token.offset == len(stream.answer.content)
        stream.push([index])


def test_half_characters_differ_and_carry_their_bytes() -> None:
    first, second = token_text(BYTES, 0xE4), token_text(BYTES, 0xB8)
    assert (first.text, first.bytes) == ("bytes:\\xe4", [0xE4])
    assert second.text == "bytes:\\xb8"
    assert token_text(BYTES, 300).text == "\ufffd"
    assert token_text(BYTES, 65).text == "A"


# --- JSON ------------------------------------------------------------------------------------------------------


def test_deltas_and_messages_have_the_keys_of_openai() -> None:
    assert Delta(content="x").to_json() == {"content": "x"}
    assert Delta(reasoning="x").to_json() == {"reasoning": "x", "reasoning_content": "x"}
    first = ToolDelta(0, "call_1", "f", '{"a')
    assert Delta(tool=first).to_json() == {
        "tool_calls": [
            {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a'}}
        ]
    }
    assert Delta(tool=ToolDelta(0, arguments='":1}')).to_json() == {
        "tool_calls": [{"index": 0, "function": {"arguments": '":1}'}}]
    }
    answer = Answer()
    answer.add([Delta(tool=first), Delta(tool=ToolDelta(0, arguments='":1}'))])
    assert answer.to_json() == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
        ],
    }
    assert Answer("hi", "hm").to_json() == {
        "role": "assistant",
        "content": "hi",
        "reasoning": "hm",
        "reasoning_content": "hm",
    }
