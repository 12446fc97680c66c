"""The real `openai` client against a live server (over the stand-in engine: what it answers is known)."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.serving import fake

CHAT = [{"role": "user", "content": "abc"}]
ANSWER = "User: abc\n\nAssistant:"[::-1]


@pytest.fixture(scope="module")
def server() -> Iterator[fake.Process]:
    with fake.running() as process:
        yield process


@pytest.fixture(scope="module")
def client(server: fake.Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [fake.MODEL]
    assert client.models.retrieve(fake.MODEL).id == fake.MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../fake")


def test_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=fake.MODEL, messages=CHAT)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        ANSWER,
        "stop",
    )
    assert (
        answer.object == "chat.completion"
        and answer.id.startswith("chatcmpl-")
        and answer.model == fake.MODEL
    )
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ANSWER) + 1, len(ANSWER))
    assert answer.usage.total_tokens == 2 * len(ANSWER) + 1


def test_a_chat_with_parts_and_all_roles(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "so"},
        {"role": "user", "content": "x"},
    ]
    answer = client.chat.completions.create(model=fake.MODEL, messages=messages)  # type: ignore[arg-type]
    sent = "be brief\n\nUser: abc\n\nAssistant: soUser: x\n\nAssistant:"
    assert answer.choices[0].message.content == sent[::-1]


def test_a_streamed_chat_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=fake.MODEL,
        messages=CHAT,
        stream=True,
        stream_options={"include_usage": True},
        n=2,
        logprobs=True,
    )
    texts, roles, reasons, logprobs, usage = ["", ""], ["", ""], [None, None], [0, 0], None
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk"
        if chunk.usage is not None:
            usage = chunk.usage
            assert chunk.choices == []
        for choice in chunk.choices:
            assert reasons[choice.index] is None, "nothing may follow a finish reason"
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role or ""
            reasons[choice.index] = choice.finish_reason  # type: ignore[call-overload]
            logprobs[choice.index] += len(choice.logprobs.content or []) if choice.logprobs else 0
    assert texts == [ANSWER] * 2 and roles == ["assistant"] * 2 and reasons == ["stop"] * 2  # type: ignore[comparison-overlap]
    assert logprobs == [len(ANSWER)] * 2
    assert usage is not None and usage.completion_tokens == 2 * len(ANSWER)


def test_a_completion_its_stream_and_its_echo(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=fake.MODEL, prompt="abcdef", max_tokens=4)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("fedc", "length")
    stream = client.completions.create(model=fake.MODEL, prompt="abcdef", max_tokens=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "fedc"
    echoed = client.completions.create(model=fake.MODEL, prompt="abc", max_tokens=1, echo=True, logprobs=1)
    choice = echoed.choices[0]
    assert choice.text == "abcc" and choice.logprobs is not None
    assert choice.logprobs.tokens == ["<|bos|>", "a", "b", "c", "c"]
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.token_logprobs[1] < 0  # type: ignore[operator]
    scored = client.completions.create(model=fake.MODEL, prompt="abc", max_tokens=0, echo=True, logprobs=0)
    assert (
        scored.choices[0].text == "abc" and scored.usage is not None and scored.usage.completion_tokens == 0
    )


def test_prompts_as_ids_and_several_at_once(client: openai.OpenAI) -> None:
    assert client.completions.create(model=fake.MODEL, prompt=[97, 98]).choices[0].text == "ba"
    found = client.completions.create(model=fake.MODEL, prompt=["ab", "cd", "ef"], n=2)
    assert [(choice.index, choice.text) for choice in found.choices] == list(
        enumerate(["ba", "ba", "dc", "dc", "fe", "fe"])
    )
    assert found.usage is not None and found.usage.prompt_tokens == 9


def test_stop_strings_end_text_logprobs_and_counts_together(client: openai.OpenAI) -> None:
    for stream in (False, True):
        options = {"model": fake.MODEL, "prompt": "abcdefgh", "stop": ["ed", "zz"], "logprobs": 0}
        if stream:
            chunks = list(client.completions.create(**options, stream=True))  # type: ignore[call-overload]
            text = "".join(chunk.choices[0].text for chunk in chunks)
            tokens = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens]
            reason = chunks[-1].choices[0].finish_reason
        else:
            answer = client.completions.create(**options)  # type: ignore[call-overload]
            (choice,) = answer.choices
            text, reason, tokens = choice.text, choice.finish_reason, choice.logprobs.tokens
            assert answer.usage.completion_tokens == 5
        assert (text, reason, tokens) == ("hgf", "stop", ["h", "g", "f", "e", "d"])


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=fake.MODEL, messages=CHAT, logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == ANSWER
    first = logprobs.content[0]
    assert first.bytes == [ord(ANSWER[0])] and len(first.top_logprobs) == 3
    assert first.top_logprobs[0].logprob == first.logprob


@pytest.mark.parametrize(
    ("options", "kind", "param"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"n": 9}, openai.BadRequestError, "n"),
        ({"max_tokens": 2000}, openai.BadRequestError, None),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, openai.BadRequestError, None),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, None),
        ({"logit_bias": {"70000": 1}}, openai.BadRequestError, "logit_bias"),
        ({"top_logprobs": 2}, openai.BadRequestError, None),
    ],
)
def test_errors(
    client: openai.OpenAI, options: dict[str, object], kind: type[openai.APIStatusError], param: str | None
) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": fake.MODEL, "messages": CHAT, **options})  # type: ignore[call-overload]
    body = caught.value.body
    assert isinstance(body, dict) and set(body) == {"message", "type", "param", "code"}
    assert param is None or body["param"] == param
    assert len(caught.value.response.headers["x-request-id"]) == 32


def test_a_misspelt_key_gets_a_hint_and_no_echo(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=fake.MODEL, prompt="a", extra_body={"temperatur": 1})
    assert "did you mean temperature?" in str(caught.value) and "temperatur'" not in str(caught.value)


def test_the_context_is_never_cut(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=fake.MODEL, prompt="a" * 1020, max_tokens=4)
    assert caught.value.code == "context_length_exceeded"
    assert (
        client.completions.create(model=fake.MODEL, prompt="a" * 1019, max_tokens=4).choices[0].text == "aaaa"
    )


def test_generate_whole_and_streamed(server: fake.Process) -> None:
    url = f"{server.url}/generate"
    keys = {"text", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens"}
    for body, text in (
        ({"prompt": "abc"}, "cba"),
        ({"prompt_token_ids": [97, 98, 99]}, "cba"),
        ({"messages": CHAT}, ANSWER),
        ({"prompt": "ü€", "max_new_tokens": 2}, "��"),
    ):
        whole = httpx.post(url, json=body).json()
        assert set(whole) == keys and whole["text"] == text
        assert whole["completion_tokens"] == len(whole["token_ids"])
        streamed = httpx.post(url, json={**body, "stream": True})
        assert streamed.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line.removeprefix("data: ")) for line in streamed.text.split("\n\n") if line]
        assert all(set(event) == keys for event in events)
        assert "".join(event["text"] for event in events) == text
        assert [i for event in events for i in event["token_ids"]] == whole["token_ids"]
        assert [event["finish_reason"] for event in events][-1] == whole["finish_reason"]
        assert events[-1]["completion_tokens"] == whole["completion_tokens"]


def test_metrics_tell_what_happened(server: fake.Process) -> None:
    httpx.post(f"{server.url}/generate", json={"prompt": "abc"})
    page = httpx.get(f"{server.url}/metrics").text
    numbers = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert float(numbers['dsv3_http_requests_total{method="POST",route="/generate",status="200"}']) >= 1
    assert float(numbers["dsv3_time_to_first_token_seconds_count"]) >= 1
    assert float(numbers["dsv3_inter_token_seconds_count"]) >= 2
    ends = sum(float(value) for name, value in numbers.items() if name.startswith("dsv3_finished_total"))
    assert float(numbers["dsv3_e2e_request_latency_seconds_count"]) == ends
    waits = [float(numbers[f"dsv3_request_{name}_time_seconds_sum"]) for name in ("queue", "prefill")]
    assert waits[1] == 2 * waits[0] > 0, "the fake engine says 0.25 and 0.5"
    first = float(numbers["dsv3_time_to_first_token_seconds_sum"])
    decode = float(numbers["dsv3_request_decode_time_seconds_sum"])
    assert first + decode == pytest.approx(
        float(numbers["dsv3_e2e_request_latency_seconds_sum"]), abs=1e-3 * ends
    )
    assert float(numbers["dsv3_acceptance"]) == 0.7
    assert float(numbers['dsv3_cache_token_bytes{dtype="fp8"}']) == 656
    assert float(numbers["dsv3_pages_total"]) == 64 and float(numbers["dsv3_rows"]) == 4
    assert (
        float(numbers["dsv3_expert_load_max_over_mean"]) == 2.0
        and float(numbers["dsv3_experts_used"]) == 0.875
    )
    assert float(numbers["dsv3_running"]) == float(numbers["dsv3_waiting"]) == 0
    assert float(numbers['dsv3_finished_total{reason="stop"}']) >= 1
    assert "\ndsv3_http_requests_total{" in page and "nope" not in page
