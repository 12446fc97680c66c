"""The outermost layer of the application: what is decided about a request before any work is done for it.

Request ids, the API key, the size and the time of a body, draining, and one line of metrics a request.
"""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from dsv3_jax.serving.api_errors import ApiError
from dsv3_jax.serving.metrics import Metrics
from dsv3_jax.serving.settings import BODY_BYTES, HEADER_BYTES, Settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

GENERATING = frozenset({"/generate", "/v1/chat/completions", "/v1/completions"})
"""Routes that take a JSON body."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
HELD_BYTES = 64 << 20
"""Bodies of all requests together, from their first byte to the end of the answer."""
_DISCARD_BYTES, _DISCARD_SECONDS = 8 << 20, 2.0


class Gone(Exception):
    """The client left before its request was whole."""


def needs_key(path: str) -> bool:
    """Whether a route is part of the API. Probes, metrics and the page are open."""
    return path == "/generate" or path == "/v1" or path.startswith("/v1/")


class Gate:
    """An ASGI application around another one.

    What it leaves in the scope: `request_id`, `began` (time.monotonic), and `body` (bytes) of a generating route. A
    route sets `gone` when its client left.
    """

    def __init__(
        self, app: App, settings: Settings, metrics: Metrics, ready: Callable[[], ApiError | None]
    ) -> None:
        """`ready`: why new work is not taken now, or None."""
        self.app = app
        self._settings, self._metrics, self._ready = settings, metrics, ready
        self._held = 0
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["request_id"] = uuid.uuid4().hex
        scope["began"] = time.monotonic()
        outgoing = _Outgoing(send, scope["request_id"])
        try:
            try:
                app = await self._admit(scope, receive, outgoing)
            except ApiError as error:
                await error(scope, receive, outgoing)
                return
            await app(scope, receive, outgoing)
            if scope.get("gone"):
                outgoing.status = 499
        except Gone:
            outgoing.status = 499
        finally:
            self._held -= scope.get("held", 0)
            self._count(scope, outgoing.status)

    async def _admit(self, scope: Scope, receive: Receive, outgoing: _Outgoing) -> App:
        headers = dict(scope["headers"])
        error = self._refusal(scope, headers)
        has_body = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        reads = error is None and scope["method"] == "POST" and scope["path"] in GENERATING
        if reads:
            scope["body"] = await self._body(scope, receive, outgoing) if has_body else b""
        elif has_body:
            outgoing.close = b"expect" in headers or not await _discard(receive)
        if error is not None:
            raise error
        return self.app

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
        """What can be said from the header alone."""
        path = scope["path"]
        if sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > HEADER_BYTES:
            return ApiError(431, f"the header is larger than {HEADER_BYTES} bytes", code="header_too_large")
        if b"transfer-encoding" in headers and b"content-length" in headers:
            return ApiError(
                400,
                "a request has a content length or a transfer encoding, not both",
                code="malformed_http",
                headers={"Connection": "close"},
            )
        if self._key is not None and needs_key(path):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(b" "), self._key):
                told = {"WWW-Authenticate": "Bearer"}
                return ApiError(401, "a valid API key is needed", code="invalid_api_key", headers=told)
        if scope["method"] != "POST" or path not in GENERATING:
            return None
        length = headers.get(b"content-length", b"0")
        if len(length) > 15 or int(length) > BODY_BYTES:
            return _too_large()
        if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            return ApiError(415, "the content type must be application/json", code="unsupported_media_type")
        if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
            return ApiError(415, "compressed bodies are not taken", code="unsupported_media_type")
        return self._ready()

    async def _body(self, scope: Scope, receive: Receive, outgoing: _Outgoing) -> bytes:
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._settings.read_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    size += len(message.get("body", b""))
                    if size > BODY_BYTES:  # only chunked bodies come here
                        outgoing.close = not (message.get("more_body") is False or await _discard(receive))
                        raise _too_large()
                    if self._held + len(message.get("body", b"")) > HELD_BYTES:
                        outgoing.close = True
                        told = "the requests that are being read are too large together"
                        raise ApiError(503, told, code="overloaded", headers={"Retry-After": "1"})
                    parts.append(message.get("body", b""))
                    self._held += len(parts[-1])
                    scope["held"] = size
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, "the request's body did not arrive in time", code="timeout") from None

    def _count(self, scope: Scope, status: int) -> None:
        route = getattr(scope.get("route"), "path", None) or (
            scope["path"] if scope["path"] in GENERATING else "unmatched"
        )
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.http_requests.labels(method, route, str(status)).inc()
        self._metrics.http_seconds.labels(route).observe(time.monotonic() - scope["began"])


class _Outgoing:
    """`send` with the headers every response has."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._headers = [
            (b"x-request-id", request_id.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"cache-control", b"no-store"),
        ]
        self.status = 499
        self.close = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = list(message.get("headers", []))
            have = {name for name, _ in own}
            own += [pair for pair in self._headers if pair[0] not in have]
            if self.close and b"connection" not in have:
                own.append((b"connection", b"close"))
            message = {**message, "headers": own}
        await self._send(message)


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {BODY_BYTES} bytes", code="body_too_large")


async def _discard(receive: Receive) -> bool:
    """Read a body that nobody wants, so that the client comes to read the answer; whether it was read to its end.

    A client that sends very much is not listened to for longer: the connection is then closed.
    """
    size = 0
    try:
        async with asyncio.timeout(_DISCARD_SECONDS):
            while size <= _DISCARD_BYTES:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return True
    except TimeoutError:
        return False
    return False
