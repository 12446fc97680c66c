"""Sends what a generation gives: as one JSON object, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from starlette.responses import Response

from dsv3_jax.serving.api_errors import ApiError
from dsv3_jax.serving.gate import Receive, Scope, Send
from dsv3_jax.serving.generation import Choice, Generation, News

_LAST_WORDS_SECONDS = 2.0
"""After the time limit, how long a client may take to read that it was reached."""


class Shape(Protocol):
    """How one route writes answers."""

    done: bytes
    """Sent after the last event."""

    def first(self) -> Iterable[dict[str, Any]]:
        """Events before any news."""
        ...

    def event(self, choice: Choice, news: News) -> Iterable[dict[str, Any]]:
        """Events of one choice's news."""
        ...

    def last(self, choices: Sequence[Choice]) -> Iterable[dict[str, Any]]:
        """Events after all choices have ended."""
        ...

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer in one object."""
        ...


def encode(value: Any) -> bytes:
    """JSON as it is sent."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(value) + b"\n\n"


class Answering(Response):
    """The response of a generating route. Owns the generation: closes it when it ends, however it ends."""

    def __init__(self, generation: Generation, shape: Shape, *, stream: bool, deadline: float) -> None:
        """`deadline`: of time.monotonic, which is the event loop's clock."""
        super().__init__()
        self._generation, self._shape, self._stream, self._deadline = generation, shape, stream, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(
            self._events(scope, send) if self._stream else self._object(scope, receive, send)
        )
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            else:
                scope["gone"] = True
        finally:
            self._generation.close()
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _object(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._generation.finished()
            data = encode(self._shape.whole(self._generation.choices))
        except TimeoutError:
            self._generation.expire("timeout")
            await timed_out()(scope, receive, send)
            return
        except ApiError as error:
            await error(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data})

    async def _events(self, scope: Scope, send: Send) -> None:
        generation, shape = self._generation, self._shape
        unsent = b""  # a time limit may fall while the client keeps us waiting: nothing taken is lost

        async def write(events: Iterable[dict[str, Any]], more: bytes = b"") -> None:
            nonlocal unsent
            unsent += b"".join(map(sse, events)) + more
            if unsent:
                await send({"type": "http.response.body", "body": unsent, "more_body": True})
                unsent = b""

        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        failure: list[dict[str, Any]] = []
        try:
            async with asyncio.timeout_at(self._deadline):
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await write(shape.first())
                async for choice, news in generation.news():
                    await write(shape.event(choice, news))
        except TimeoutError:
            generation.expire("timeout")
        except ApiError as error:
            failure = [error.body()]
        try:
            async with asyncio.timeout_at(max(self._deadline, time.monotonic()) + _LAST_WORDS_SECONDS):
                if failure:
                    await write(failure)
                else:
                    for choice, news in generation.rest():
                        await write(shape.event(choice, news))
                    await write(shape.last(generation.choices), shape.done)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:  # it reads no more: uvicorn closes a connection whose response is not whole
            scope["gone"] = True


def timed_out() -> ApiError:
    """The 504 of the total time limit."""
    return ApiError(504, "the request took longer than the server's time limit", code="timeout")


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
