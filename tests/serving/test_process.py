"""The server as a process: how it starts, how it ends, and what it never does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from dsv3_jax.errors import run_main
from dsv3_jax.serving import __main__ as command
from dsv3_jax.serving.server import listen
from tests.inference import tiny
from tests.serving import corpus, fake
from tests.serving.inside import events

GOOD = {"Authorization": "Bearer s3cret"}
KEY = "Authorization: Bearer s3cret"


def generate(server: fake.Process, tokens: int, **more: Any) -> httpx.Response:
    """An answer of so many tokens."""
    body = {"prompt": "x" * tokens, "max_new_tokens": tokens, **more}
    return httpx.post(f"{server.url}/generate", json=body, timeout=60, headers=GOOD)


def status(server: fake.Process, path: str) -> int:
    """Of a GET."""
    return httpx.get(server.url + path).status_code


def test_sigterm_under_load_finishes_what_was_accepted_and_exits_0() -> None:
    with (
        fake.running("--delay", "0.01", "--rows", "4", "--max-queue", "30") as server,
        ThreadPoolExecutor(24) as pool,
    ):
        asked = [pool.submit(generate, server, 40, stream=number % 2 == 0) for number in range(20)]
        deadline = time.monotonic() + 10
        while "dsv3_accepted_sequences 20.0" not in httpx.get(f"{server.url}/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        server.terminate()
        time.sleep(0.15)
        assert status(server, "/readyz") == 503 and status(server, "/livez") == 200
        refused = generate(server, 1)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert refused.headers["retry-after"] == "5"
        for number, future in enumerate(asked):
            answer = future.result()
            assert answer.status_code == 200
            found = events(answer.content) if number % 2 == 0 else [answer.json()]
            assert "".join(event["text"] for event in found) == "x" * 40
            assert found[-1]["finish_reason"] == "length"
        assert server.process.wait(10) == 0


def test_a_second_signal_ends_the_process_now() -> None:
    with fake.running("--delay", "0.05") as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(generate, server, 500)
        time.sleep(0.3)
        server.terminate()
        time.sleep(0.3)
        assert server.process.poll() is None
        server.terminate()
        assert server.process.wait(5) == 128 + signal.SIGTERM
        with pytest.raises(httpx.HTTPError):
            asked.result()


def test_a_crash_of_the_engine_is_told_to_every_client_and_ends_the_process() -> None:
    with fake.running("--delay", "0.01", "--rows", "2") as server, ThreadPoolExecutor(8) as pool:
        whole = [pool.submit(generate, server, 300) for _ in range(3)]
        streamed = pool.submit(generate, server, 300, stream=True)
        time.sleep(0.4)
        last = pool.submit(httpx.post, f"{server.url}/generate", json={"prompt": "CRASH"}, timeout=30)
        for future in [*whole, last]:
            answer = future.result()
            assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_failed"
        assert events(streamed.result().content)[-1]["error"]["code"] == "engine_failed"
        assert server.process.wait(15) == 1
        assert "told to crash" in server.error_text()


def test_a_port_in_use_is_exit_2_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit) as ended:
            run_main(lambda: bool(listen("127.0.0.1", taken.getsockname()[1])))
    assert ended.value.code == 2 and "in use" in capsys.readouterr().err


def test_weights_that_cannot_be_loaded_are_exit_65_and_one_line() -> None:
    command = [sys.executable, "-m", "tests.serving.fake", "--broken", "1"]
    ended = subprocess.run(command, cwd=fake.REPO, capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout) == (65, "")
    assert ended.stderr == "error: the checkpoint is damaged\n"


def test_flags_reach_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The key from the environment unless a flag gives one; the model's name from its folder."""
    given: dict[str, Any] = {}

    def serve(model: Any, settings: Any, make_engine: Any, **more: Any) -> int:
        given.update(more, settings=settings)
        return 0

    monkeypatch.setattr("dsv3_jax.serving.command.serve", serve)
    folder = tiny.save(tmp_path)
    monkeypatch.setenv("DSV3_API_KEY", "from-environment")
    flags = ["--checkpoint", str(folder), "--port", "0", "--context", "100", "--max-queue", "7"]
    monkeypatch.setattr(sys, "argv", ["serving", *flags])
    assert command.main() == 0
    assert given["settings"].api_key == "from-environment" and given["settings"].model_id == "checkpoint"
    assert (given["context"], given["port"], given["settings"].max_queue) == (100, 0, 7)
    assert given["settings"].request_timeout == 30.0 and given["host"] == "127.0.0.1"
    monkeypatch.setattr(sys, "argv", ["serving", *flags, "--api-key", "from-flag", "--model-id", "m/x"])
    assert command.main() == 0
    assert given["settings"].api_key == "from-flag" and given["settings"].model_id == "m/x"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--port", "1"], "--checkpoint DIR is missing"),
        (["--checkpoint", "nowhere", "--port", "70000"], "--port is 70000"),
        (["--checkpoint", "nowhere", "--request-timeout", "nan"], "--request-timeout is nan"),
        (["--checkpoint", "nowhere", "--max-queue=-1"], "--max-queue is -1"),
        (["--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_wrong_flags_are_exit_2_and_one_line(
    flags: list[str], told: str, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["serving", *flags])
    with pytest.raises(SystemExit) as ended:
        run_main(command.main)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and told in err and "Traceback" not in err


@pytest.fixture(scope="module")
def server() -> Iterator[fake.Process]:
    """One for the tests that leave it as it was."""
    flags = ["--api-key", "s3cret", "--rows", "4", "--max-queue", "60", "--max-connections", "60"]
    flags += ["--context", "100000", "--pages", "20000", "--read-timeout", "1.0", "--write-timeout", "1.0"]
    with fake.running(*flags) as process:
        yield process


def test_the_key_guards_the_api_and_nothing_else(server: fake.Process) -> None:
    url = server.url
    for path in ("/v1/models", "/v1/models/fake", "/v1/nope", "/v1"):
        assert status(server, path) == 401
    for path in ("/generate", "/v1/chat/completions", "/v1/completions"):
        for headers in (
            {},
            {"Authorization": "Bearer s3cre"},
            {"Authorization": "s3cret"},
            {"X-Api-Key": "s3cret"},
        ):
            answer = httpx.post(url + path, json={"prompt": "a"}, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer" and "s3cre" not in answer.text
    assert httpx.post(f"{url}/generate", json={"prompt": "ab"}, headers=GOOD).json()["text"] == "ba"
    for scheme, answered in (
        ("Bearer", 200),
        ("bearer", 200),
        ("BEARER  ", 200),
        ("Basic", 401),
        ("Token", 401),
    ):
        headers = {"Authorization": f"{scheme} s3cret"}
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == answered
    for path in ("/livez", "/readyz", "/health", "/metrics"):
        assert status(server, path) == 200


def test_no_cross_origin_headers_and_no_documentation_from_a_cdn(server: fake.Process) -> None:
    asked = {"Origin": "http://elsewhere.example", **GOOD}
    answer = httpx.post(f"{server.url}/generate", json={"prompt": "a"}, headers=asked)
    assert answer.status_code == 200 and not [
        name for name in answer.headers if name.startswith("access-control")
    ]
    assert status(server, "/docs") == status(server, "/redoc") == 404


def test_connections_are_capped_and_idle_ones_are_closed(server: fake.Process) -> None:
    kept = [socket.create_connection((server.host, server.port)) for _ in range(60)]
    time.sleep(0.2)
    answer = httpx.get(f"{server.url}/livez")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "overloaded"
    time.sleep(1.2)
    for sock in kept:
        sock.settimeout(5)
        assert b" 408 " in sock.recv(4096)
        sock.close()
    assert status(server, "/livez") == 200


def test_a_socket_that_is_not_read_delays_nobody(server: fake.Process) -> None:
    """It asks for a long stream and never reads; its kernel buffer fills, the server's one is bounded."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect((server.host, server.port))
    body = {
        "model": "fake",
        "messages": [{"role": "user", "content": "x" * 20000}],
        "stream": True,
        "logprobs": True,
        "top_logprobs": 20,
        "max_tokens": 20000,
    }
    data = json.dumps(body).encode()
    sock.sendall(corpus.post("/v1/chat/completions", data, KEY))
    time.sleep(0.5)
    before = server.rss()
    began = time.monotonic()
    for _ in range(10):
        assert generate(server, 20).status_code == 200
    assert time.monotonic() - began < 5
    deadline = time.monotonic() + 20
    while "dsv3_running 0.0" not in httpx.get(f"{server.url}/metrics").text:
        assert time.monotonic() < deadline, "a reader that takes nothing must be cut off"
        time.sleep(0.1)
    assert server.rss() - before < 256 << 20
    sock.close()
    assert status(server, "/readyz") == 200


def test_disconnects_over_real_sockets_leave_nothing(server: fake.Process) -> None:
    body = json.dumps({"prompt": "x" * 150, "stream": True}).encode()

    def leave(number: int) -> None:
        with socket.create_connection((server.host, server.port)) as sock:
            sock.sendall(corpus.post("/generate", body, KEY))
            time.sleep(number % 7 * 0.01)
            if number % 3 == 0:  # a reset instead of an orderly end
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    threads = [threading.Thread(target=leave, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    deadline = time.monotonic() + 5
    while True:
        page = httpx.get(f"{server.url}/metrics").text
        if all(
            f"dsv3_{name} 0.0" in page for name in ("running", "waiting", "pages_used", "accepted_sequences")
        ):
            break
        assert time.monotonic() < deadline, page
        time.sleep(0.02)
    assert generate(server, 3).json()["text"] == "xxx"
    assert os.path.isdir(f"/proc/{server.process.pid}")


def test_the_server_opens_no_socket_of_its_own() -> None:
    """An audit hook ends the process at the first connect or name look-up after it listens."""
    code = (
        "import sys, os\n"
        "def hook(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'subprocess.Popen'):\n"
        "        if 'armed' in globals(): os.write(2, f'AUDIT {event}'.encode()); os._exit(99)\n"
        "sys.addaudithook(hook)\n"
        "from dsv3_jax.serving import server\n"
        "bound = server.listen\n"
        "def listen(*a):\n"
        "    found = bound(*a); globals()['armed'] = True; return found\n"
        "import dsv3_jax.serving.command as command\n"
        "command.listen = listen\n"
        "from tests.serving.fake import main\n"
        "sys.exit(main())\n"
    )
    server = fake.Process([sys.executable, "-c", code])
    try:
        image = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}]
        chat = {"model": "fake", "messages": [{"role": "user", "content": image}]}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=chat).status_code == 400
        assert generate(server, 5).status_code == 200
        assert generate(server, 5, stream=True).status_code == 200
        assert status(server, "/metrics") == status(server, "/openapi.json") == 200
        with httpx.Client() as client:  # an idle server ends at once, although this one keeps its connection
            assert client.get(f"{server.url}/livez").status_code == 200
            began = time.monotonic()
            server.terminate()
            assert server.process.wait(10) == 0 and time.monotonic() - began < 3
    finally:
        server.close()
