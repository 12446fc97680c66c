"""The command with a real checkpoint and the real engine: the smallest model there is, in a process of its own."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from dsv3_jax.inference import Request, Sampling
from tests.inference import tiny
from tests.serving import fake, trials
from tests.serving.inside import application, events

FLAGS = "--port 0 --rows 4 --page-size 16 --prefill-tiles 4 --tile 8 --max-queue 60 --model-id tiny".split()
FLAGS += ["--max-reserved-tokens", "100000"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[fake.Process]:
    process = fake.Process(
        [sys.executable, "-m", "dsv3_jax.serving", "--checkpoint", str(checkpoint), *FLAGS]
    )
    try:
        yield process
    finally:
        process.close()


@pytest.fixture(scope="module")
def client(server: fake.Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def engine() -> Any:
    return tiny.engine("v3", max_logprobs=20)  # the server's: one compilation for both


def directly(engine: Any, ids: list[int], **options: Any) -> Any:
    """What the engine gives without a server."""
    return tiny.finish(engine, [Request(ids, Sampling(**options))])[0]


def test_generate_gives_the_engines_tokens_streamed_or_not(server: fake.Process, engine: Any) -> None:
    for length in (1, 7, 40):
        ids = tiny.prompt(length)
        want = directly(engine, ids, max_new_tokens=12)
        for stream in (False, True):
            body = {"prompt_token_ids": ids, "max_new_tokens": 12, "stream": stream}
            answer = httpx.post(f"{server.url}/generate", json=body, timeout=60)
            found = events(answer.content) if stream else [answer.json()]
            assert [index for event in found for index in event["token_ids"]] == want.token_ids
            assert found[-1]["finish_reason"] == want.finish_reason
            assert found[-1]["prompt_tokens"] == length


def test_sampling_options_reach_the_engine(server: fake.Process, engine: Any) -> None:
    ids = tiny.prompt(5)
    options = {
        "temperature": 0.9,
        "top_p": 0.8,
        "top_k": 40,
        "seed": 11,
        "min_p": 0.01,
        "presence_penalty": 0.5,
    }
    options |= {"repetition_penalty": 1.2, "min_tokens": 6}
    want = directly(engine, ids, max_new_tokens=20, logit_bias=((65, 3.0),), **options)
    body = {"prompt_token_ids": ids, "max_new_tokens": 20, "logit_bias": {"65": 3.0}, **options}
    assert httpx.post(f"{server.url}/generate", json=body, timeout=60).json()["token_ids"] == want.token_ids


def test_the_openai_client_with_logprobs_n_stop_and_usage(client: openai.OpenAI, engine: Any) -> None:
    chat: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 10,
    }
    answer = client.chat.completions.create(
        **chat, n=3, temperature=1.0, seed=5, logprobs=True, top_logprobs=2
    )
    assert answer.usage is not None
    assert sum(len(choice.logprobs.content) for choice in answer.choices) == answer.usage.completion_tokens  # type: ignore[union-attr, arg-type]
    assert len({choice.message.content for choice in answer.choices}) > 1
    again = client.chat.completions.create(**chat, n=3, temperature=1.0, seed=5)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]
    whole = client.completions.create(model="tiny", prompt="hello", max_tokens=12, temperature=0)
    text = whole.choices[0].text
    if len(text) > 4:
        cut = client.completions.create(
            model="tiny", prompt="hello", max_tokens=12, temperature=0, stop=text[2:4]
        )
        assert cut.choices[0].text == text[: text.index(text[2:4])] and cut.choices[0].finish_reason == "stop"
    scored = client.completions.create(model="tiny", prompt="hello", max_tokens=0, echo=True, logprobs=0)
    want = directly(engine, [256, *b"hello"], max_new_tokens=0, prompt_logprobs=0)
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [None, *(entry["logprob"] for entry in want.prompt_logprobs[1:])]


def test_structured_output(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "size": {"enum": ["small", "large"]}},
        "required": ["ok", "size"],
        "additionalProperties": False,
    }
    chat: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 150,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(**chat, response_format=wanted, n=4, temperature=1.5, seed=3)
    whole = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    assert whole, "random weights end at least one of four"
    for choice in whole:
        found = json.loads(choice.message.content or "")
        assert (
            set(found) == {"ok", "size"}
            and found["size"] in ("small", "large")
            and found["ok"] in (True, False)
        )
    picked = client.completions.create(
        model="tiny",
        prompt="?",
        max_tokens=9,
        extra_body={"structured_outputs": {"choice": ["maybe", "never"]}},
    )
    assert picked.choices[0].text in ("maybe", "never") and picked.choices[0].finish_reason == "stop"
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**chat, response_format=bad)
    assert caught.value.code == "invalid_schema" and "nonsense" not in str(caught.value)


def test_prefix_hits_are_reported(client: openai.OpenAI) -> None:
    prompt = "a long prompt that fills pages " * 4
    counts = []
    for _ in range(2):
        usage = client.completions.create(model="tiny", prompt=prompt, max_tokens=2).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        counts.append(usage.prompt_tokens_details.cached_tokens)
    assert counts[0] == 0 and counts[1] >= 96


def test_the_context_is_that_of_the_model(client: openai.OpenAI) -> None:
    assert client.models.retrieve("tiny").max_model_len == 256  # type: ignore[attr-defined]
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x" * 250, max_tokens=10)
    assert caught.value.code == "context_length_exceeded"


def test_a_crowd_gets_the_same_answers_as_one_alone(server: fake.Process) -> None:
    found = trials.load_trial(server, "tiny", clients=16, seconds=3, seed=9)
    assert found["wrong"] == [] and found["lost"] == 0 and found["answered"] > 16


def test_metrics_of_the_real_engine(server: fake.Process) -> None:
    numbers = trials.gauges(server)
    assert numbers["running"] == numbers["pages_used"] == 0 and numbers["pages_total"] > 16
    assert numbers["expert_load_max_over_mean"] > 1 and 0 < numbers["experts_used"] <= 1
    assert numbers["prefix_hit_tokens_total"] > 0 and numbers["engine_steps_total"] > 10


def test_disconnects_free_real_pages_within_a_step(engine: Any) -> None:
    rng = random.Random(8)

    async def run() -> None:
        steps, late = 0, list[int]()
        step = engine.step

        def counting() -> Any:
            nonlocal steps
            steps += 1
            return step()

        engine.step = counting
        async with application(engine) as inside:
            for number in range(40):
                waited = rng.uniform(0, 0.03)
                at: int | None = None

                async def leave(waited: float = waited) -> None:
                    nonlocal at
                    await asyncio.sleep(waited)
                    at = steps

                body = {
                    "prompt": "z" * 30,
                    "max_new_tokens": 200,
                    "ignore_eos": True,
                    "stream": number % 2 == 0,
                }
                status, _ = await inside.post("/generate", body, leave=leave())
                while engine.scheduler.pool.used:
                    await asyncio.sleep(0.0005)
                late += [] if at is None else [steps - at]  # some are done before their client leaves
        del engine.step
        assert len(late) >= 10 and max(late) <= 2

    asyncio.run(run())


def test_sigterm_finishes_and_exits_0(server: fake.Process) -> None:
    found = trials.sigterm_trial(server, count=40, tokens=200)
    assert trials.ended_well(found), found
