"""HTTP/1.1 connections with the limits that uvicorn leaves out.

Time for a header (and for a first byte), time for a client to take what waits for it, number of connections, and an
answer in OpenAI's shape to bytes that are no HTTP. A client that closes its sending side is taken for gone: at this
level that cannot be told from one that closed altogether, and work for nobody must end.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsv3_jax.serving.api_errors import ApiError, bad_request
from dsv3_jax.serving.settings import Settings

_MALFORMED = "this is not a valid HTTP request, or its header is too large"


class LimitedProtocol(H11Protocol):
    """One connection. `settings` comes by `functools.partial`; uvicorn gives the rest."""

    def __init__(self, *args: Any, settings: Settings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._settings.max_connections:
            self._refuse(
                ApiError(503, "too many connections", code="overloaded", headers={"Retry-After": "1"})
            )
        else:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        """From the first byte of a header (of a new connection: from its beginning) to the last, a timer runs."""
        reading = self.conn.their_state is h11.IDLE and not self._refused
        if reading and self._head_timer is None:
            late = ApiError(408, "the request's header did not arrive in time", code="timeout")
            self._head_timer = self.loop.call_later(self._settings.read_timeout, self._refuse, late)
        elif not reading and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for bytes that h11 refuses."""
        self._refuse(bad_request(_MALFORMED, code="malformed_http"))

    def _refuse(self, error: ApiError) -> None:
        """Answer without the application, and close. A response that has begun is cut off instead."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        begun = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if begun:
            self.transport.abort()
        else:
            headers, data = error.parts()
            lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()]
            lines += [name + b": " + value for name, value in headers if name != b"connection"]
            self.transport.write(b"\r\n".join([*lines, b"connection: close", b"", data]))
            self.transport.close()
            self.loop.call_later(self._settings.write_timeout, self.transport.abort)
        if (
            self.cycle is not None and not self.cycle.response_complete
        ):  # its task ends as for a client that left
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._settings.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # what is still in the buffer has this long to be taken
            self.loop.call_later(self._settings.write_timeout, self.transport.abort)
