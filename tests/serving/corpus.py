"""Requests as raw bytes that a client library would never send, and what may come back.

`cases()` gives them all; every one is a fresh connection. MARK stands in what is sent wherever text is free, and must
not come back in an error.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import time
from collections.abc import Iterator

MARK = "zq7Marker"
Piece = bytes | float
"""Bytes to send, or seconds to wait."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One connection.

    pieces: what is sent.
    statuses: of the first response; None stands for a connection closed without one.
    half_close: close the sending side after the pieces.
    """

    name: str
    pieces: tuple[Piece, ...]
    statuses: tuple[int | None, ...]
    half_close: bool = False


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came back: the status of each response in the stream, and all bytes."""

    statuses: tuple[int, ...]
    data: bytes

    @property
    def error(self) -> dict[str, object]:
        """The JSON of the first response's body."""
        return dict(json.loads(self.data.split(b"\r\n\r\n", 1)[1].split(b"HTTP/1.1 ")[0]))


ROUTES = {
    "/generate": {"prompt": f"{MARK} hi", "max_new_tokens": 2},
    "/v1/completions": {"model": "fake", "prompt": f"{MARK} hi", "max_tokens": 2},
    "/v1/chat/completions": {
        "model": "fake",
        "messages": [{"role": "user", "content": MARK}],
        "max_tokens": 2,
    },
}


def post(path: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    """A POST of a JSON body, correct but for what is asked."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", "Connection: close"]
    lines += [f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def with_value(path: str, key: str, raw: str) -> bytes:
    """The route's body with one more key, its value as raw JSON text."""
    text = json.dumps({name: value for name, value in ROUTES[path].items() if name != key})
    return f'{text[:-1]}, "{key}": {raw}}}'.encode()


DEEP = 100_000
BAD_BODIES: dict[str, bytes] = {
    "empty": b"",
    "space": b"   ",
    "null": b"null",
    "true": b"true",
    "number": b"1",
    "NaN": b"NaN",
    "string": f'"{MARK}"'.encode(),
    "array": b"[]",
    "empty object": b"{}",
    "open brace": b"{",
    "trailing comma": b'{"prompt": "a",}',
    "trailing text": b'{"prompt": "a"} ' + MARK.encode(),
    "two objects": b'{"prompt": "a"}{"prompt": "b"}',
    "single quotes": b"{'prompt': 'a'}",
    "comment": b'{"prompt": "a" /* c */}',
    "key twice": b'{"prompt": "a", "prompt": "b"}',
    "nested key twice": b'{"prompt": "a", "x": {"y": 1, "y": 2}}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "UTF-32": '{"prompt": "a"}'.encode("utf-32"),
    "byte order mark": b'\xef\xbb\xbf{"prompt": "a"}',
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "overlong UTF-8": b'{"prompt": "\xc0\x80"}',
    "surrogate in UTF-8": b'{"prompt": "\xed\xa0\x80"}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "low surrogate first": b'{"prompt": "\\udc00\\ud800"}',
    "surrogate key": b'{"\\ud800": 1, "prompt": "a"}',
    "raw control character": b'{"prompt": "a\x01b"}',
    "half an escape": b'{"prompt": "\\u12"}',
    "deep arrays": b"[" * DEEP,
    "deep closed arrays": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP,
    "deep value": b'{"prompt": "a", "x": ' + b"[" * 200 + b"]" * 200 + b"}",
    "5,000 digits": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "unknown key": b'{"prompt": "a", "' + MARK.encode() + b'": 1}',
    "wrong type": b'{"prompt": {"' + MARK.encode() + b'": 1}}',
}
BAD_VALUES: dict[str, tuple[str, ...]] = {
    "temperature": (
        "NaN",
        "Infinity",
        "-Infinity",
        "1e400",
        "-1",
        "1e-9",
        '"1"',
        "true",
        "[]",
        "101",
        "1" + "0" * 400,
    ),
    "top_p": ("NaN", "0", "1.0001", "-0.5", "1e999", "{}"),
    "top_k": ("-2", "1.5", "4294967296", "9223372036854775808"),
    "min_p": ("-0.1", "2", "NaN"),
    "seed": ("1.5", "9223372036854775808", "-9223372036854775809", '"7"', "1e3"),
    "stop": ('""', '["a", ""]', "[1]", "{}", json.dumps(["x"] * 17), json.dumps("x" * 1025)),
    "presence_penalty": ("2.1", "NaN"),
    "frequency_penalty": ("-2.1", "1e400"),
    "repetition_penalty": ("0", "NaN"),
    "logit_bias": ('{"a": 1}', '{"1": NaN}', '{"1": 101}', '{"-1": 1}', '{"99999": 1}', "[]"),
    "stop_token_ids": ("[-1]", "[1.5]", "[99999]", "7"),
    "stream": ('"true"', "1"),
    "min_tokens": ("-1", "1000"),
}
OPENAI_VALUES: dict[str, tuple[str, ...]] = {
    "n": ("0", "9", "-1", "1.5", '"2"', "1e9"),
    "model": ('"../../etc/passwd"', '"FAKE"', '"fake\\u0000"', "null", "1", '""'),
    "max_tokens": ("-1", "1e3", "100000", "9007199254740993", '"5"'),
    "stream_options": ("{}", '{"include_usage": true}', "1"),
    "best_of": ("3",),
}
CHAT_VALUES: dict[str, tuple[str, ...]] = {
    "messages": (
        "[]",
        "{}",
        "null",
        "[1]",
        '[{"role": "user"}]',
        f'[{{"role": "{MARK}", "content": "x"}}]',
        '[{"role": "tool", "content": "x", "tool_call_id": "1"}]',
        '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x"}}]}]',
        '[{"role": "assistant", "content": null}]',
        '[{"role": "user", "content": []}]',
        f'[{{"role": "user", "content": "x", "{MARK}": 1}}]',
        f'[{{"role": "assistant", "content": null, "tool_calls": [{{"id": "{MARK}", "type": "function", '
        f'"function": {{"name": "{MARK}", "arguments": "{{}}"}}}}]}}]',
    ),
    "tools": (
        "[1]",
        '[{"type": "function"}]',
        f'[{{"type": "function", "function": {{"name": "a {MARK}"}}}}]',
    ),
    "tool_choice": ('"required"', '{"type": "function", "function": {"name": "x"}}', '"sometimes"'),
    "response_format": ('{"type": "xml"}', '{"type": "json_schema"}', '"json"'),
    "top_logprobs": ("5", "-1", "21"),
    "logprobs": ("1",),
}


def body_cases() -> Iterator[Case]:
    """Well-formed HTTP around bodies that are wrong: all of them a 4xx that says so."""
    refused = (400, 404)
    for path in ROUTES:
        for name, body in BAD_BODIES.items():
            if path == "/generate" or len(body) < 1000:
                yield Case(f"{path}: {name}", (post(path, body),), refused)
        values = BAD_VALUES | (OPENAI_VALUES if path.startswith("/v1") else {})
        values |= CHAT_VALUES if "chat" in path else {}
        for key, texts in values.items():
            if key in ("best_of",) and "chat" in path:
                continue
            for text in texts:
                yield Case(f"{path}: {key} {text[:40]}", (post(path, with_value(path, key, text)),), refused)


def _wire(request_line: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([request_line, *headers]).encode("latin-1") + b"\r\n\r\n" + body


def wire_cases() -> Iterator[Case]:
    """What is wrong with the HTTP itself."""
    good = json.dumps(ROUTES["/generate"]).encode()
    whole = post("/generate", good)
    close, bad = (400, None), (400,)
    megabyte = b"x" * (1 << 20)
    json_type = "Content-Type: application/json"
    chunked = (json_type, "Host: x", "Transfer-Encoding: chunked")

    def chunks(*parts: bytes) -> bytes:
        return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"

    yield Case("nothing", (), (None,), half_close=True)
    yield Case("nothing at all, waiting", (2.5,), (408,))
    yield Case("zeros", (b"\0" * 4096,), bad)
    yield Case("TLS hello", (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x55" * 500,), close)
    yield Case("TLS hello with a line end", (b"\x16\x03\x01\x02\r\n\r\n",), bad)
    yield Case("HTTP/2 preface", (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",), (400, 404))
    yield Case("HTTP/0.9", (b"GET /\r\n\r\n",), bad)
    yield Case("HTTP/3.0", (_wire("GET /livez HTTP/3.0", "Host: x", "Connection: close"),), (200, 400, 505))
    yield Case("HTTP/1.0", (_wire("GET /livez HTTP/1.0"),), (200,))
    yield Case("no host", (_wire("GET /livez HTTP/1.1"),), bad)
    yield Case("two hosts", (_wire("GET /livez HTTP/1.1", "Host: a", "Host: b"),), bad)
    yield Case(
        "absolute form", (_wire("GET http://x/livez HTTP/1.1", "Host: x", "Connection: close"),), (200, 404)
    )
    yield Case("CONNECT", (_wire("CONNECT x:443 HTTP/1.1", "Host: x", "Connection: close"),), (400, 404, 405))
    yield Case(
        "TRACE", (_wire("TRACE /generate HTTP/1.1", "Host: x", f"X: {MARK}", "Connection: close"),), (405,)
    )
    yield Case("made-up method", (_wire(f"{MARK} /livez HTTP/1.1", "Host: x", "Connection: close"),), (405,))
    yield Case(
        "OPTIONS with an origin",
        (
            _wire(
                "OPTIONS /generate HTTP/1.1",
                "Host: x",
                "Origin: http://evil",
                "Access-Control-Request-Method: POST",
                "Connection: close",
            ),
        ),
        (405,),
    )
    yield Case("space in the header name", (_wire("GET /livez HTTP/1.1", "Host: x", "Bad Name: y"),), bad)
    yield Case("space before the colon", (_wire("GET /livez HTTP/1.1", "Host: x", "Name : y"),), bad)
    yield Case(
        "folded header",
        (_wire("GET /livez HTTP/1.1", "Host: x", "Name: y", " more", "Connection: close"),),
        (200, 400),
    )
    yield Case("NUL in a header", (_wire("GET /livez HTTP/1.1", "Host: x", "Name: a\0b"),), bad)
    yield Case("bare CR in a header", (_wire("GET /livez HTTP/1.1", "Host: x", "Name: a\rb"),), bad)
    yield Case("bare LF line ends", (b"GET /livez HTTP/1.1\nHost: x\nConnection: close\n\n",), (200, 400))
    yield Case(
        "64 KiB header",
        (_wire("GET /livez HTTP/1.1", "Host: x", "Connection: close", "Name: " + "a" * 65536),),
        (400, 431, None),
    )
    yield Case("endless header", (b"GET /livez HTTP/1.1\r\n" + b"A: b\r\n" * 100_000,), close)
    yield Case("megabyte target", (b"GET /" + megabyte + b" HTTP/1.1\r\nHost: x\r\n\r\n",), close)
    yield Case("unicode target", ("GET /é HTTP/1.1\r\nHost: x\r\n\r\n".encode(),), bad)
    yield Case(
        "escaped dots",
        (_wire("GET /static/%2e%2e%2f%2e%2e%2fsettings.py HTTP/1.1", "Host: x", "Connection: close"),),
        (404,),
    )
    yield Case(
        "dots", (_wire("GET /static/../settings.py HTTP/1.1", "Host: x", "Connection: close"),), (404,)
    )
    yield Case(
        "NUL in the path", (_wire("GET /static/a%00b HTTP/1.1", "Host: x", "Connection: close"),), (404,)
    )
    yield Case("broken escape", (_wire("GET /%zz%ff HTTP/1.1", "Host: x", "Connection: close"),), (404,))
    yield Case(
        "model as a path",
        (_wire("GET /v1/models/../../etc/passwd HTTP/1.1", "Host: x", "Connection: close"),),
        (404,),
    )
    yield Case(
        "surrogate in the path",
        (_wire("GET /v1/models/%ed%a0%80 HTTP/1.1", "Host: x", "Connection: close"),),
        (404,),
    )
    yield Case(
        "slow header",
        tuple(piece for byte in b"GET /livez HTTP/1.1\r\nX: aaaaaaaaaaaa" for piece in (bytes([byte]), 0.1)),
        (408,),
    )
    yield Case("header, then silence", (b"POST /generate HTTP/1.1\r\nHost: x\r\n", 2.5), (408,))
    yield Case("body never comes", (post("/generate", b"", length=10), 2.5), (408,))
    yield Case(
        "slow body",
        (post("/generate", b"", length=100), *[piece for _ in range(20) for piece in (b" ", 0.1)]),
        (408,),
    )
    yield Case(
        "slow body of an unknown route",
        (post("/nope", b"", length=100), *[piece for _ in range(30) for piece in (b" ", 0.1)]),
        (404,),
    )
    yield Case("slow chunk", (_wire("POST /generate HTTP/1.1", *chunked), b"5\r\nab", 2.5), (408,))
    yield Case("length says 200 MiB", (post("/generate", megabyte, length=200 << 20), 2.5), (413,))
    yield Case("length beyond int64", (post("/generate", good, length=1 << 70),), (400, 413))
    yield Case("negative length", (post("/generate", good, length=-5),), bad)
    yield Case(
        "length with a sign",
        (_wire("POST /generate HTTP/1.1", "Host: x", json_type, "Content-Length: +5", body=good),),
        bad,
    )
    yield Case(
        "length in hex",
        (_wire("POST /generate HTTP/1.1", "Host: x", json_type, "Content-Length: 0x5", body=good),),
        bad,
    )
    yield Case(
        "two lengths",
        (
            _wire(
                "POST /generate HTTP/1.1",
                "Host: x",
                json_type,
                "Content-Length: 4",
                "Content-Length: 5",
                body=good,
            ),
        ),
        bad,
    )
    yield Case(
        "list of lengths",
        (_wire("POST /generate HTTP/1.1", "Host: x", json_type, "Content-Length: 4, 5", body=good),),
        bad,
    )
    yield Case(
        "length too short, rest is a request",
        (
            _wire(
                "POST /generate HTTP/1.1",
                "Host: x",
                json_type,
                "Content-Length: 2",
                body=b"{}GET /smuggled HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            ),
        ),
        (400,),
    )
    yield Case(
        "length and chunks",
        (_wire("POST /generate HTTP/1.1", *chunked, f"Content-Length: {len(good)}", body=chunks(good)),),
        bad,
    )
    yield Case(
        "chunks, then a hidden request",
        (
            _wire(
                "POST /generate HTTP/1.1",
                *chunked,
                "Content-Length: 4",
                body=b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n",
            ),
        ),
        bad,
    )
    yield Case(
        "encoding in disguise",
        (_wire("POST /generate HTTP/1.1", "Host: x", json_type, "Transfer-Encoding: xchunked", body=good),),
        (400,),
    )
    yield Case(
        "two encodings",
        (
            _wire(
                "POST /generate HTTP/1.1",
                "Host: x",
                json_type,
                "Transfer-Encoding: gzip, chunked",
                body=chunks(good),
            ),
        ),
        (400,),
    )
    yield Case(
        "encoding with a tab",
        (
            _wire(
                "POST /generate HTTP/1.1",
                "Host: x",
                json_type,
                "Transfer-Encoding:\tchunked",
                "Connection: close",
                body=chunks(good),
            ),
        ),
        (200, 400),
    )
    yield Case(
        "chunk size is no number", (_wire("POST /generate HTTP/1.1", *chunked, body=b"zz\r\nabc\r\n"),), close
    )
    yield Case("negative chunk", (_wire("POST /generate HTTP/1.1", *chunked, body=b"-5\r\nabc\r\n"),), close)
    yield Case(
        "huge chunk size",
        (_wire("POST /generate HTTP/1.1", *chunked, body=b"f" * 30 + b"\r\nabc"),),
        (400, 408, 413),
    )
    yield Case(
        "chunk without its line end",
        (_wire("POST /generate HTTP/1.1", *chunked, body=b"2\r\n{}xx0\r\n\r\n"),),
        close,
    )
    yield Case(
        "endless chunk extension",
        (_wire("POST /generate HTTP/1.1", *chunked, body=b"2;" + b"a" * 100_000),),
        close,
    )
    yield Case(
        "chunks of 3 MiB", (_wire("POST /generate HTTP/1.1", *chunked, body=chunks(*[megabyte] * 3)),), (413,)
    )
    yield Case(
        "many tiny chunks",
        (
            _wire(
                "POST /generate HTTP/1.1",
                *chunked,
                "Connection: close",
                body=chunks(*[bytes([byte]) for byte in good]),
            ),
        ),
        (200,),
    )
    yield Case(
        "trailers",
        (
            _wire(
                "POST /generate HTTP/1.1",
                *chunked,
                "Connection: close",
                body=chunks(good)[:-2] + b"X: y\r\n\r\n",
            ),
        ),
        (200, 400),
    )
    yield Case(
        "no content type",
        (
            _wire(
                "POST /generate HTTP/1.1",
                "Host: x",
                f"Content-Length: {len(good)}",
                "Connection: close",
                body=good,
            ),
        ),
        (415,),
    )
    yield Case(
        "form type", (whole.replace(b"application/json", b"application/x-www-form-urlencoded"),), (415,)
    )
    yield Case("plain text type", (whole.replace(b"application/json", b"text/plain"),), (415,))
    yield Case(
        "type with a charset",
        (whole.replace(b"application/json", b"application/json; charset=utf-8"),),
        (200,),
    )
    yield Case(
        "gzip body", (post("/generate", b"\x1f\x8b\x08" + b"\0" * 20, "Content-Encoding: gzip"),), (415,)
    )
    yield Case(
        "expect, too large", (post("/generate", b"", "Expect: 100-continue", length=200 << 20),), (413,)
    )
    yield Case(
        "expect", (post("/generate", b"", "Expect: 100-continue", length=len(good)), 0.3, good), (100,)
    )
    yield Case("unknown expectation", (post("/generate", good, "Expect: a-miracle"),), (200, 400, 417))
    yield Case(
        "websocket upgrade",
        (
            _wire(
                "GET /generate HTTP/1.1",
                "Host: x",
                "Connection: Upgrade, close",
                "Upgrade: websocket",
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
                "Sec-WebSocket-Version: 13",
            ),
        ),
        (405,),
    )
    yield Case(
        "h2c upgrade",
        (
            _wire(
                "GET /livez HTTP/1.1",
                "Host: x",
                "Connection: Upgrade, HTTP2-Settings, close",
                "Upgrade: h2c",
                "HTTP2-Settings: AAMAAABkAAQAAP__",
            ),
        ),
        (200,),
    )
    yield Case(
        "half close after the header", (post("/generate", b"", length=50),), (None, 400), half_close=True
    )
    yield Case(
        "half close in the body",
        (post("/generate", good, length=len(good) + 9),),
        (None, 400),
        half_close=True,
    )
    yield Case(
        "half close in a chunk",
        (_wire("POST /generate HTTP/1.1", *chunked, body=b"99\r\nabc"),),
        (None, 400),
        half_close=True,
    )
    yield Case("half close after a request", (whole,), (None, 200), half_close=True)
    yield Case(
        "pipelined",
        (
            _wire("GET /livez HTTP/1.1", "Host: x") * 3
            + _wire("GET /readyz HTTP/1.1", "Host: x", "Connection: close"),
        ),
        (200,),
    )
    yield Case(
        "pipelined, then rubbish", (_wire("GET /livez HTTP/1.1", "Host: x") + b"\0\1\2\r\n\r\n",), (200,)
    )
    yield Case(
        "request, then rubbish", (whole.replace(b"Connection: close\r\n", b"") + b"\xff" * 5000,), (200, 400)
    )
    yield Case(
        "GET with a body",
        (_wire("GET /livez HTTP/1.1", "Host: x", "Content-Length: 5", "Connection: close", body=b"hello"),),
        (200,),
    )
    yield Case("HEAD", (_wire("HEAD /livez HTTP/1.1", "Host: x", "Connection: close"),), (200, 405))
    yield Case(
        "trailing slash",
        (
            _wire(
                "POST /generate/ HTTP/1.1",
                "Host: x",
                json_type,
                "Content-Length: 2",
                "Connection: close",
                body=b"{}",
            ),
        ),
        (404,),
    )


def cases() -> list[Case]:
    """All of them."""
    return [*wire_cases(), *body_cases()]


def play(host: str, port: int, case: Case, patience: float = 8.0) -> Reply:
    """Send a case and read until the server closes, or nothing has come for `patience` seconds."""
    data = b""
    with socket.create_connection((host, port), timeout=patience) as sock:
        try:
            for piece in case.pieces:
                if isinstance(piece, float):
                    sock.settimeout(piece)
                    try:
                        data += sock.recv(65536)
                    except TimeoutError:
                        pass
                    if data and case.statuses != (100,):
                        break
                else:
                    sock.settimeout(patience)
                    sock.sendall(piece)
            if case.half_close:
                sock.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server had heard enough
        end = time.monotonic() + patience
        try:
            while time.monotonic() < end:
                sock.settimeout(max(end - time.monotonic(), 0.01))
                more = sock.recv(65536)
                if not more:
                    break
                data += more
        except (TimeoutError, ConnectionResetError):
            pass
    statuses = tuple(int(part[:3]) for part in data.split(b"HTTP/1.1 ")[1:])
    return Reply(statuses, data)


def problems(case: Case, reply: Reply) -> list[str]:
    """What is wrong with an answer: an unexpected status, a 5xx, an error of another shape, an echo."""
    found = []
    first = reply.statuses[0] if reply.statuses else None
    if first not in case.statuses:
        found.append(f"status {first}, expected {case.statuses}")
    if any(status >= 500 for status in reply.statuses):
        found.append(f"statuses {reply.statuses}")
    if first is not None and first >= 400 and case.name != "HEAD":
        head = reply.data.split(b"\r\n\r\n")[0].lower()
        if b"application/json" not in head:
            found.append("an error that is not JSON")
        elif not head.startswith(b"http/1.1 4") or set(reply.error["error"]) != {
            "message",
            "type",
            "param",
            "code",
        }:  # type: ignore[call-overload]
            found.append("an error of another shape")
        if MARK.encode() in reply.data:
            found.append("the error repeats what was sent")
    return found
