"""Samples of what `python -m tests.serving --full` does for long: a crowd of clients, and a fuzzer on every route."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving import fake, fuzz, trials


@pytest.fixture(scope="module")
def server() -> Iterator[fake.Process]:
    with fake.running("--rows", "8", "--max-queue", "120", "--delay", "0.001", "--pages", "400") as process:
        yield process


def test_64_clients_lose_nothing(server: fake.Process) -> None:
    found = trials.load_trial(server, fake.MODEL, clients=64, seconds=5, seed=3)
    assert found["wrong"] == [] and found["lost"] == 0
    assert found["sent"] == found["answered"] + found["refused_429"] and found["answered"] > 64
    assert found["questions"] == 40
    assert found["growth_mib"] < 64


def test_more_clients_than_places_are_told_to_come_back(server: fake.Process) -> None:
    with fake.running("--rows", "1", "--max-queue", "2", "--delay", "0.005") as small:
        found = trials.load_trial(small, fake.MODEL, clients=12, seconds=2, seed=4)
    assert found["wrong"] == [] and found["lost"] == 0 and found["refused_429"] > 0 and found["answered"] > 0


@pytest.mark.filterwarnings("default")  # the fuzzer's own
def test_a_fuzzer_on_every_route_finds_nothing(server: fake.Process) -> None:
    found = fuzz.fuzz(server.url, examples=120, seed=1)
    assert found["findings"] == {} and found["requests"] >= 120
    assert set(found["by_route"]) == {
        "GET /health", "GET /livez", "GET /metrics", "GET /readyz", "GET /v1/models", "GET /v1/models/{model}",
        "POST /generate", "POST /v1/chat/completions", "POST /v1/completions",
    }  # fmt: skip
    assert found["statuses"]["200"] > 10 and not [status for status in found["statuses"] if status >= "500"]
