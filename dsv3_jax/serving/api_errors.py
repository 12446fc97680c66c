"""Errors in OpenAI's shape. Messages are made of the server's own words: nothing a client sent is repeated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
PHRASES = {
    400: "the request is not valid",
    404: "there is no such route",
    405: "the route does not take this method",
    500: "the server failed; its log has the reason under this request id",
}
Headers = list[tuple[bytes, bytes]]


class ApiError(Exception):
    """An answer with a status of 400 or more.

    Attributes:
      status: of HTTP.
      message: for the client; the server's own words.
      param: the field it is about, as a path such as `messages[0].content`; known names and numbers only.
      code: a short fixed word that programs can test.
      headers: to add to the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The object of the response."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def parts(self) -> tuple[Headers, bytes]:
        """Headers and bytes of the response."""
        data = json.dumps(self.body()).encode()
        headers: Headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(data)).encode()),
        ]
        headers += [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]
        if self.status in (408, 413):
            headers.append((b"connection", b"close"))
        return headers, data

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As an ASGI application: send the response."""
        headers, data = self.parts()
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": data})


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param, code=code)
