"""Bytes no client library would send: no 5xx, no crash, no growth, nothing repeated, and healthy afterwards."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.serving import corpus, fake

CASES = corpus.cases()
MAX_GROWTH = 48 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[fake.Process]:
    with fake.running("--read-timeout", "1.0") as process:
        yield process


def test_the_corpus_is_large_and_has_no_case_twice() -> None:
    assert len(CASES) >= 150 and len({case.name for case in CASES}) == len(CASES)
    assert len({(case.pieces, case.half_close) for case in CASES}) == len(CASES)


def test_no_case_harms_the_server(server: fake.Process) -> None:
    before = server.rss()
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda case: corpus.play(server.host, server.port, case), CASES))
    wrong = {
        case.name: found
        for case, reply in zip(CASES, replies, strict=True)
        if (found := corpus.problems(case, reply))
    }
    assert wrong == {}
    assert server.rss() - before < MAX_GROWTH
    answer = httpx.post(f"{server.url}/generate", json={"prompt": "still here"})
    assert answer.json()["text"] == "ereh llits"
    assert httpx.get(f"{server.url}/readyz").status_code == 200


def test_a_hidden_request_is_never_answered(server: fake.Process) -> None:
    for case in CASES:
        if "hidden" in case.name or "length and chunks" in case.name:
            assert len(corpus.play(server.host, server.port, case).statuses) == 1, case.name


def test_pipelined_requests_are_answered_in_order(server: fake.Process) -> None:
    (case,) = (case for case in CASES if case.name == "pipelined")
    assert corpus.play(server.host, server.port, case).statuses == (200, 200, 200, 200)


def test_200_mib_are_refused_without_being_kept(server: fake.Process) -> None:
    """Chunked, so that no length gives it away; the client sends on whatever it is told."""
    before, sent, chunk = server.rss(), 0, b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection((server.host, server.port), timeout=10) as sock:
        sock.sendall(head)
        try:
            for _ in range(200):
                sock.sendall(chunk)
                sent += 1
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert sent < 64, "the server should have hung up"
    assert server.rss() - before < MAX_GROWTH
    assert httpx.get(f"{server.url}/readyz").status_code == 200


def test_an_ordinary_client_reads_the_413_of_a_body_of_4_mib(server: fake.Process) -> None:
    for body in (b"x" * (4 << 20), iter([b"x" * (1 << 20)] * 4)):
        answer = httpx.post(
            f"{server.url}/generate", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


def test_a_header_that_trickles_in_is_cut_off_in_time(server: fake.Process) -> None:
    began = time.monotonic()
    (case,) = (case for case in CASES if case.name == "slow header")
    assert corpus.play(server.host, server.port, case).statuses == (408,)
    assert 0.9 < time.monotonic() - began < 3.0
