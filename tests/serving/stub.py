"""A small server with the routes that the chat page uses, and answers that a test chooses by what it asks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import dsv3_jax.serving

STATIC = Path(dsv3_jax.serving.__file__).parent / "static"
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}


def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason, **more}]}


def usage(count: int) -> dict[str, Any]:
    return {
        "choices": [],
        "usage": {"prompt_tokens": 5, "completion_tokens": count, "total_tokens": 5 + count},
    }


class Stub:
    """Use as a context manager. `answers`: last user message -> a function of the body that gives events.

    Attributes:
      requests: bodies of the chat requests so far.
      key: the API key to ask for, or None.
      refusals: (status, headers) of the next chat requests, in order.
      left: set when a client has gone in the middle of an answer.
    """

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers, self.requests = answers, []  # type: ignore[var-annotated]
        self.key: str | None = None
        self.refusals: list[tuple[int, dict[str, str]]] = []
        self.left = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                if self.path == "/v1/models":
                    if self._allowed():
                        self._json(200, {"object": "list", "data": [{"id": "tiny-deepseek"}]})
                    return
                name = "index.html" if self.path == "/" else self.path.removeprefix("/static/")
                path = STATIC / name
                if "/" in name or not path.is_file():
                    self._json(404, {"error": {"message": "no such file"}})
                    return
                self._send(200, KINDS[path.suffix], path.read_bytes(), {"content-security-policy": POLICY})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if not self._allowed():
                    return
                stub.requests.append(body)
                if stub.refusals:
                    status, headers = stub.refusals.pop(0)
                    self._json(status, {"error": {"message": "told so"}}, headers)
                    return
                self.close_connection = True
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("connection", "close")
                self.end_headers()
                try:
                    for event in stub.answers[body["messages"][-1]["content"]](body):
                        data = "[DONE]" if event == "[DONE]" else json.dumps(event, ensure_ascii=False)
                        self.wfile.write(f"data: {data}\n\n".encode())
                        self.wfile.flush()
                except OSError:
                    stub.left.set()

            def _allowed(self) -> bool:
                if stub.key is None or self.headers.get("authorization") == f"Bearer {stub.key}":
                    return True
                self._json(401, {"error": {"message": "no valid API key"}})
                return False

            def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
                self._send(status, "application/json", json.dumps(value).encode(), headers or {})

            def _send(self, status: int, kind: str, data: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {
                    "content-type": kind,
                    "content-length": str(len(data)),
                    **headers,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Stub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def say(*parts: str, reasoning: tuple[str, ...] = (), reason: str = "stop", pause: float = 0.0) -> Any:
    """An answer in these parts."""

    def events(body: dict[str, Any]) -> Iterator[Any]:
        yield chunk({"role": "assistant", "content": ""})
        for part in reasoning:
            yield chunk({"reasoning": part, "reasoning_content": part})
            time.sleep(pause)
        for part in parts:
            yield chunk({"content": part})
            time.sleep(pause)
        yield chunk({}, reason)
        yield usage(len(parts) + len(reasoning))
        yield "[DONE]"

    return events


def forever(body: dict[str, Any]) -> Iterator[Any]:
    """An answer that does not end by itself (for a minute)."""
    for number in range(600):
        yield chunk({"content": f"word{number} "})
        time.sleep(0.1)


def breaks_off(body: dict[str, Any]) -> Iterator[Any]:
    """An answer whose connection ends in the middle."""
    yield chunk({"content": "half of it"})


def with_logprobs(body: dict[str, Any]) -> Iterator[Any]:
    """Three tokens, one character in two of them."""
    top = [
        {"token": "Hi", "logprob": -0.1, "bytes": [72, 105]},
        {"token": "Yo", "logprob": -2.5, "bytes": [89, 111]},
    ]
    yield chunk({"content": "Hi"}, logprobs={"content": [{**top[0], "top_logprobs": top}]})
    parts = [("bytes:\\xe4", [0xE4]), ("bytes:\\xb8\\xad", [0xB8, 0xAD])]
    for token, data in parts:
        entry = {"token": token, "logprob": -1.2, "bytes": data, "top_logprobs": []}
        yield chunk({"content": "中"} if data != [0xE4] else {}, logprobs={"content": [entry]})
    yield chunk({}, "stop")
    yield usage(3)
    yield "[DONE]"
