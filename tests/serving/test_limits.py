"""Bounds and endings of requests: the queue, the clock, clients that leave or do not read."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from typing import Any

import pytest

from dsv3_jax.inference import EngineOptions
from dsv3_jax.serving.__main__ import Flags
from dsv3_jax.serving.admission import Admission
from dsv3_jax.serving.api_errors import ApiError
from dsv3_jax.serving.settings import Settings
from tests.serving.fake import FakeEngine
from tests.serving.inside import Inside, application, events


def ask(tokens: int = 40, **more: Any) -> dict[str, Any]:
    """A request whose answer has so many tokens."""
    return {"prompt": "x" * tokens, **more}


async def settled(inside: Inside) -> None:
    """Wait until the engine has nothing left, at most two seconds."""
    for _ in range(400):
        if inside.engine.idle:
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the engine is still busy")


def test_200_clients_that_leave_give_their_pages_back_within_a_step() -> None:
    """At random moments: while queued, in the middle, near the end; streamed or not, one or several choices.

    A leaving client may find a step running; the next one must no longer hold its pages.
    """
    rng = random.Random(5)
    late: list[int] = []

    async def one(inside: Inside, number: int) -> None:
        engine = inside.engine
        waited = rng.uniform(0.0, 0.04)
        steps_at_leave = 0

        async def leave() -> None:
            nonlocal steps_at_leave
            await asyncio.sleep(waited)
            steps_at_leave = engine.steps

        stream = bool(number % 2)
        if number % 5:
            body, path = ask(60, stream=stream), "/generate"
        else:
            path = "/v1/completions"
            body = {"model": "fake", "prompt": "y" * 60, "max_tokens": 60, "n": 3, "stream": stream}
        await inside.post(path, body, leave=leave())
        while engine.pages_used:
            await asyncio.sleep(0.0005)
        late.append(engine.steps - steps_at_leave)

    async def all_of_them() -> None:
        async with application(FakeEngine(rows=2, delay=0.002), max_queue=8) as inside:
            for number in range(200):
                await one(inside, number)
            await settled(inside)
            assert inside.service.admission.sequences == inside.service.admission.tokens == 0
            assert inside.engine.requests == {} and inside.engine.running == {}
            status, body = await inside.post("/generate", ask(3))
            assert (status, json.loads(body)["text"]) == (200, "xxx")

    asyncio.run(all_of_them())
    assert len(late) == 200 and max(late) <= 2, (
        "the step that ran, and at most the one that had begun meanwhile"
    )


def test_a_crowd_that_leaves_leaves_nothing() -> None:
    async def run() -> None:
        rng = random.Random(6)
        async with application(FakeEngine(rows=4, delay=0.002), max_queue=64) as inside:
            bodies = [ask(rng.randint(1, 200), stream=rng.random() < 0.5) for _ in range(60)]
            waits = [asyncio.sleep(rng.uniform(0, 0.3)) for _ in bodies]
            posts = [
                inside.post("/generate", body, leave=wait) for body, wait in zip(bodies, waits, strict=True)
            ]
            await asyncio.gather(*posts)
            await settled(inside)
            for wait in waits:
                wait.close()
            assert inside.engine.pages_used == 0
            assert inside.service.admission.sequences == inside.service.admission.tokens == 0

    asyncio.run(run())


def test_the_queue_is_bounded_by_requests_and_says_when_to_come_back() -> None:
    async def run() -> None:
        async with application(FakeEngine(rows=1, delay=0.01), max_queue=2) as inside:
            tasks = [asyncio.create_task(inside.post("/generate", ask(20))) for _ in range(3)]
            await asyncio.sleep(0.1)
            status, body = await inside.post("/generate", ask(1))
            assert status == 429 and json.loads(body)["error"]["code"] == "queue_full"
            assert json.loads(body)["error"]["type"] == "rate_limit_error"
            assert [status for status, _ in await asyncio.gather(*tasks)] == [200] * 3
            assert (await inside.post("/generate", ask(1)))[0] == 200

    asyncio.run(run())


def test_the_queue_is_bounded_by_tokens_but_an_idle_server_takes_any_request() -> None:
    admission = Admission(Settings("m", rows=4, max_queue=100, max_reserved_tokens=100))
    first = admission.take(8)
    first.add(900)
    with admission.take(1) as late, pytest.raises(ApiError) as caught:
        late.add(1)
    assert caught.value.status == 429 and 1 <= int(caught.value.headers["Retry-After"]) <= 30
    first.release()
    first.release()
    assert (admission.sequences, admission.tokens) == (0, 0)
    kept = [admission.take(1), admission.take(1)]
    for one in kept:
        one.add(50)
    with admission.take(1) as late, pytest.raises(ApiError):
        late.add(1)
    kept[0].release()
    with admission.take(1) as room:
        room.add(50)
    assert (admission.sequences, admission.tokens) == (1, 50)


def test_the_time_limit_is_a_504_and_in_a_stream_a_finish_reason() -> None:
    async def run() -> None:
        async with application(FakeEngine(rows=2, delay=0.02), request_timeout=0.3) as inside:
            began = time.monotonic()
            status, body = await inside.post("/generate", ask(200))
            assert (status, json.loads(body)["error"]["code"]) == (504, "timeout")
            assert 0.25 < time.monotonic() - began < 1.5
            status, body = await inside.post("/generate", ask(200, stream=True))
            found = events(body)
            assert status == 200 and found[-1]["finish_reason"] == "timeout"
            text = "".join(event["text"] for event in found)
            assert 0 < len(text) == found[-1]["completion_tokens"] < 200 and set(text) == {"x"}
            chat = {
                "model": "fake",
                "messages": [{"role": "user", "content": "z" * 200}],
                "stream": True,
                "n": 2,
            }
            _, body = await inside.post("/v1/chat/completions", chat)
            assert body.endswith(b"data: [DONE]\n\n")
            reasons = [choice["finish_reason"] for event in events(body) for choice in event["choices"]]
            assert reasons.count("timeout") == 2
            await settled(inside)
            assert inside.engine.pages_used == 0

    asyncio.run(run())


def test_queued_requests_time_out_as_well() -> None:
    async def run() -> None:
        async with application(FakeEngine(rows=1, delay=0.02), request_timeout=0.4) as inside:
            tasks = [asyncio.create_task(inside.post("/generate", ask(200))) for _ in range(3)]
            assert [status for status, _ in await asyncio.gather(*tasks)] == [504] * 3
            await settled(inside)
            assert inside.service.admission.sequences == 0

    asyncio.run(run())


def test_a_slow_reader_holds_up_nobody_and_loses_nothing() -> None:
    """One client takes a second for its first event. Others run on, its own answer is made meanwhile, and waits."""

    async def run() -> None:
        async with application(FakeEngine(rows=2, delay=0.001)) as inside:
            free, seen = asyncio.Event(), 0

            async def slow(message: dict[str, Any]) -> None:
                nonlocal seen
                seen += 1
                if seen == 3:
                    await free.wait()

            task = asyncio.create_task(inside.post("/generate", ask(190, stream=True), send=slow))
            while seen < 3:
                await asyncio.sleep(0.001)
            for _ in range(5):
                assert (await inside.post("/generate", ask(20)))[0] == 200
            await settled(inside)
            assert not task.done() and inside.engine.pages_used == 0
            free.set()
            _, body = await task
            found = events(body)
            assert "".join(event["text"] for event in found) == "x" * 190
            assert len(found) < 20, "what waited is sent in one piece"

    asyncio.run(run())


def test_a_reader_that_stops_for_good_is_given_up() -> None:
    async def run() -> None:
        async with application(FakeEngine(rows=2, delay=0.001), request_timeout=0.3) as inside:

            async def never(message: dict[str, Any]) -> None:
                if message["type"] == "http.response.body":
                    await asyncio.Event().wait()

            began = time.monotonic()
            await inside.post("/generate", ask(50, stream=True), send=never)
            assert time.monotonic() - began < 4
            assert inside.service.admission.sequences == 0

    asyncio.run(run())


def test_a_stop_string_frees_the_row_although_nobody_reads() -> None:
    async def run() -> None:
        async with application(FakeEngine(rows=1, delay=0.001)) as inside:
            blocked = asyncio.Event()

            async def never(message: dict[str, Any]) -> None:
                if message["type"] == "http.response.body":
                    await blocked.wait()

            body = {
                "prompt": "y" * 200 + "STOP" + "x" * 5,
                "stop": "POTS"[:2],
                "stream": True,
                "max_new_tokens": 200,
            }
            task = asyncio.create_task(inside.post("/generate", body, send=never))
            while not inside.engine.requests:
                await asyncio.sleep(0.001)
            await settled(inside)
            assert inside.engine.steps < 50
            blocked.set()
            _, data = await task
            assert "".join(event["text"] for event in events(data)) == "xxxxx"
            assert events(data)[-1]["finish_reason"] == "stop"

    asyncio.run(run())


def test_a_request_that_can_never_fit_is_a_400() -> None:
    async def run() -> None:
        async with application(FakeEngine(pages=5, page_size=16, context=1024)) as inside:
            status, body = await inside.post("/generate", ask(30, max_new_tokens=40))
            assert (status, json.loads(body)["error"]["code"]) == (400, "context_length_exceeded")
            assert inside.service.admission.sequences == 0

    asyncio.run(run())


def test_choices_of_one_request_have_seeds_of_their_own_and_the_same_ones_again() -> None:
    async def run() -> None:
        async with application(FakeEngine(rows=8)) as inside:
            seeds: list[int] = []
            submit = inside.engine.submit

            def listening(request: Any) -> int:
                seeds.append(request.sampling.seed)
                return submit(request)

            inside.engine.submit = listening  # type: ignore[method-assign]
            body = {"model": "fake", "prompt": "a", "n": 3, "seed": -1}
            for _ in range(2):
                assert (await inside.post("/v1/completions", body))[0] == 200
            assert seeds[:3] == seeds[3:] and len(set(seeds)) == 3
            await inside.post("/v1/completions", {"model": "fake", "prompt": "a"})
            await inside.post("/v1/completions", {"model": "fake", "prompt": "a"})
            assert seeds[-1] != seeds[-2]
            await inside.post("/generate", {"prompt": "a"})
            assert seeds[-1] == 0

    asyncio.run(run())


class Failing(FakeEngine):
    """Whose answers end with an error."""

    def _advance(self, ticket: int) -> Any:
        update = super()._advance(ticket)
        update.finish_reason, update.error = "error", "the logits after token 3 are not finite"
        self._drop(ticket)
        return update


def test_why_an_answer_failed_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with application(Failing()) as inside:
            status, body = await inside.post("/generate", ask(3))
            assert status == 200 and json.loads(body)["finish_reason"] == "error"

    asyncio.run(main())
    (record,) = (record for record in caplog.records if record.name == "dsv3_jax.serving")
    assert "answer 0: the logits after token 3 are not finite" in record.getMessage()


@pytest.mark.parametrize("field", ["prompt", "prompt_token_ids"])
def test_an_unknown_id_is_told_under_the_name_of_its_field(field: str) -> None:
    path, more = ("/generate", {}) if field == "prompt_token_ids" else ("/v1/completions", {"model": "fake"})

    async def main() -> None:
        async with application(FakeEngine()) as inside:
            status, body = await inside.post(path, {field: [5, 258], **more})
            assert (status, json.loads(body)["error"]["param"]) == (400, field)

    asyncio.run(main())


def test_the_sizes_of_the_engine_are_the_servers_where_no_flag_says_otherwise() -> None:
    for field in dataclasses.fields(EngineOptions):
        if field.name in (
            "rows",
            "page_size",
            "pages",
            "prefill_tiles",
            "tile",
            "prefix_cache",
            "speculative",
        ):
            assert getattr(Flags(), field.name) == getattr(EngineOptions(), field.name), field.name
