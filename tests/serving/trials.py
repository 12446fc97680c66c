"""Trials of a live server: what the default tests do in seconds and `python -m tests.serving --full` does for long."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.serving import corpus, crowd, fake
from tests.serving.inside import events

Result = dict[str, Any]
IDLE = ("running", "waiting", "pages_used", "accepted_sequences")


def gauges(server: fake.Process, http: httpx.Client | None = None) -> dict[str, float]:
    """The numbers of /metrics that have no labels."""
    page = (http or httpx).get(f"{server.url}/metrics", timeout=30).text
    rows = [line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("dsv3_") and "{" not in line]
    return {name.removeprefix("dsv3_"): float(value) for name, value in rows}


STAGES = {
    "queue": "request_queue_time_seconds",
    "prefill": "request_prefill_time_seconds",
    "first token": "time_to_first_token_seconds",
    "decode": "request_decode_time_seconds",
    "sequence": "e2e_request_latency_seconds",
    "between tokens": "inter_token_seconds",
}


def stages(server: fake.Process) -> dict[str, dict[str, float]]:
    """Of all sequences since the start, by the server's histograms: the mean, and the bounds that 50 and 99 % keep."""
    page = httpx.get(f"{server.url}/metrics", timeout=30).text
    rows = dict(line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("dsv3_"))
    found = {}
    for stage, name in STAGES.items():
        count = float(rows[f"dsv3_{name}_count"])
        head = f'dsv3_{name}_bucket{{le="'
        buckets = [(key[len(head) : -2], float(value)) for key, value in rows.items() if key.startswith(head)]
        bounds = {f"p{p}": next(float(le) for le, n in buckets if n >= count * p / 100) for p in (50, 99)}
        found[stage] = {"mean": round(float(rows[f"dsv3_{name}_sum"]) / max(count, 1), 3), **bounds}
    return found


def seconds_until_idle(server: fake.Process, patience: float = 10.0) -> float:
    """Until nothing runs, waits or holds a page; fails after `patience`."""
    began = time.monotonic()
    while True:
        found = gauges(server)
        if all(found[name] == 0 for name in IDLE):
            return time.monotonic() - began
        assert time.monotonic() - began < patience, {name: found[name] for name in IDLE}
        time.sleep(0.01)


def corpus_trial(server: fake.Process) -> Result:
    """Every case of the raw-byte corpus, 16 at a time."""
    before = server.rss()
    cases = corpus.cases()
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda case: corpus.play(server.host, server.port, case), cases))
    found = {
        case.name: told
        for case, reply in zip(cases, replies, strict=True)
        if (told := corpus.problems(case, reply))
    }
    return {
        "cases": len(cases),
        "statuses": dict(
            Counter(str(reply.statuses[0] if reply.statuses else "closed") for reply in replies)
        ),
        "growth_mib": max(server.rss() - before, 0) >> 20,
        "healthy_after": httpx.get(f"{server.url}/readyz").status_code == 200,
        "findings": found,
    }


def disconnect_trial(server: fake.Process, count: int, seed: int, longest: float = 0.3) -> Result:
    """Clients that leave at a random moment, in crowds of 20; the server must be empty after each crowd."""
    rng = random.Random(seed)
    waits: list[float] = []

    def leave(after: float, stream: bool, reset: bool) -> None:
        body = {"prompt": "x" * 20, "max_new_tokens": 200, "stream": stream, "ignore_eos": True}
        with socket.create_connection((server.host, server.port)) as sock:
            sock.sendall(corpus.post("/generate", json.dumps(body).encode()))
            time.sleep(after)
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with ThreadPoolExecutor(20) as pool:
        for _ in range(0, count, 20):
            plans = [(rng.uniform(0, longest), rng.random() < 0.5, rng.random() < 0.3) for _ in range(20)]
            for future in [pool.submit(leave, *plan) for plan in plans]:
                future.result()
            waits.append(seconds_until_idle(server))
    return {
        "disconnects": count,
        "seconds_until_all_pages_are_back": {"median": _median(waits), "max": max(waits)},
    }


def _median(values: list[float]) -> float:
    return round(sorted(values)[len(values) // 2], 4)


@dataclasses.dataclass(frozen=True)
class Question:
    """A request whose answer must always be the same. kind: generate, stream, completion, chat or chat stream."""

    kind: str
    text: str
    tokens: int

    def request(self, model: str) -> tuple[str, dict[str, Any]]:
        """Route and body."""
        stream = "stream" in self.kind
        if self.kind in ("generate", "stream"):
            return "/generate", {"prompt": self.text, "max_new_tokens": self.tokens, "stream": stream}
        more = {"model": model, "max_tokens": self.tokens, "temperature": 0, "stream": stream}
        if self.kind == "completion":
            return "/v1/completions", {"prompt": self.text, **more}
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": self.text}], **more}

    def answer(self, data: bytes) -> tuple[str, str]:
        """Text and finish reason."""
        found = events(data) if "stream" in self.kind else [json.loads(data)]
        if self.kind in ("generate", "stream"):
            return "".join(event["text"] for event in found), found[-1]["finish_reason"]
        choices = [event["choices"][0] for event in found]
        if self.kind == "completion":
            return choices[0]["text"], choices[0]["finish_reason"]
        key = "delta" if "stream" in self.kind else "message"
        return "".join(c[key].get("content") or "" for c in choices), choices[-1]["finish_reason"]


KINDS = ("generate", "stream", "completion", "chat", "chat stream")


def questions(rng: random.Random, count: int = 40, longest: int = 40) -> list[Question]:
    """Different ones, of all kinds."""
    texts = ["".join(rng.choice("abcdefgh ") for _ in range(rng.randint(1, longest))) for _ in range(count)]
    return [Question(KINDS[at % len(KINDS)], text, rng.randint(1, 24)) for at, text in enumerate(texts)]


def load_trial(server: fake.Process, model: str, clients: int, seconds: float, seed: int) -> Result:
    """Clients that ask without pause. Every request must be answered, and each question always the same way."""
    asked = questions(random.Random(seed))
    known: dict[Question, tuple[str, str]] = {}
    counts, wrong, latencies = Counter[str](), [], []

    async def client(number: int, end: float) -> None:
        rng, http = random.Random(seed * 1000 + number), crowd.Client(server.host, server.port)
        while time.monotonic() < end:
            question = rng.choice(asked)
            path, body = question.request(model)
            began = time.monotonic()
            counts["sent"] += 1
            try:
                status, data = await asyncio.wait_for(http.post(path, body), 60)
            except (OSError, EOFError, ValueError) as error:
                counts["lost"] += 1
                wrong.append(f"{type(error).__name__}: {error}"[:200])
                http.close()
                continue
            if status == 429:
                counts["refused_429"] += 1
                await asyncio.sleep(0.1)
                continue
            if status != 200:
                wrong.append(f"{status}: {data[:200]!r}")
                continue
            counts["answered"] += 1
            latencies.append(time.monotonic() - began)
            answer = question.answer(data)
            if known.setdefault(question, answer) != answer:
                wrong.append(f"{question}: {answer} after {known[question]}")
        http.close()

    async def ask() -> None:
        end = time.monotonic() + seconds
        await asyncio.gather(*(client(number, end) for number in range(clients)))

    before = server.rss()
    began, own = time.monotonic(), time.process_time()
    asyncio.run(ask())
    own = time.process_time() - own
    wall = time.monotonic() - began
    latencies.sort()
    return {
        "clients": clients,
        "seconds": round(wall, 1),
        **{name: counts[name] for name in ("sent", "answered", "refused_429", "lost")},
        "questions": len(known),
        "requests_per_second": round(counts["answered"] / wall, 1),
        "latency_seconds": {
            "median": round(latencies[len(latencies) // 2], 3),
            "mean": round(sum(latencies) / len(latencies), 3),
            "p99": round(latencies[int(len(latencies) * 0.99)], 3),
            "max": round(latencies[-1], 3),
        },
        "clients_cpu_seconds": round(own, 2),
        "stages": stages(server),
        "growth_mib": max(server.rss() - before, 0) >> 20,
        "seconds_until_idle": round(seconds_until_idle(server), 3),
        "wrong": wrong[:20],
    }


def sigterm_trial(server: fake.Process, count: int, tokens: int) -> Result:
    """SIGTERM while at least half of `count` requests run and wait.

    Whatever was accepted must be answered in full; what came too late is told so, or finds nobody listening.
    """

    def one(number: int) -> str:
        body = {"prompt": "y" * 8, "max_new_tokens": tokens, "ignore_eos": True, "stream": number % 4 != 0}
        try:
            response = http.post(f"{server.url}/generate", json=body)
        except httpx.ConnectError:
            return "refused"
        except httpx.HTTPError as error:
            return f"lost: {type(error).__name__}"
        if response.status_code == 503 and response.json()["error"]["code"] == "draining":
            return "refused"
        if response.status_code != 200:
            return f"status {response.status_code}"
        found = events(response.content) if body["stream"] else [response.json()]
        whole = found[-1]["completion_tokens"] == tokens and found[-1]["finish_reason"] == "length"
        return "finished" if whole else f"cut: {found[-1]['finish_reason']}"

    limits = httpx.Limits(max_connections=count + 1)
    with httpx.Client(timeout=60, limits=limits) as http, ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(one, number) for number in range(count)]
        deadline = time.monotonic() + 20
        while (accepted := gauges(server, http)["accepted_sequences"]) < count / 2:
            assert time.monotonic() < deadline, "the requests did not arrive, or ended too early"
            time.sleep(0.01)
        server.terminate()
        ends = Counter(future.result() for future in asked)
    code = server.process.wait(30)
    return {"sent": count, "held_at_the_signal": int(accepted), "ends": dict(ends), "exit_code": code}


def ended_well(found: Result) -> bool:
    """Whether a `sigterm_trial` lost nothing."""
    finished = found["ends"].get("finished", 0)
    enough = finished >= found["held_at_the_signal"] >= found["sent"] / 2
    return enough and set(found["ends"]) <= {"finished", "refused"} and found["exit_code"] == 0
