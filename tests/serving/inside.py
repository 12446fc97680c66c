"""The application without a network: a worker over the stand-in engine, and clients that leave when told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from dsv3_jax.serving.app import build
from dsv3_jax.serving.chat import ChatTemplate
from dsv3_jax.serving.command import read_stats
from dsv3_jax.serving.gate import Gate
from dsv3_jax.serving.metrics import Metrics
from dsv3_jax.serving.service import ServedModel, Service
from dsv3_jax.serving.settings import Settings
from dsv3_jax.serving.worker import Worker
from dsv3_jax.text import Tokenizer
from tests.serving.fake import MODEL


class Inside:
    """A running application."""

    def __init__(self, service: Service, gate: Gate, engine: Any) -> None:
        self.service, self.gate, self.engine = service, gate, engine

    async def post(
        self,
        path: str,
        body: dict[str, Any],
        *,
        leave: Awaitable[None] | None = None,
        send: Callable[[dict[str, Any]], Awaitable[None]] | None = None,
    ) -> tuple[int, bytes]:
        """Status and body of the response. The client leaves when `leave` is done; `send` replaces how it reads."""
        sent = asyncio.Event()
        messages: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if not sent.is_set():
                sent.set()
                return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
            await (leave if leave is not None else asyncio.Event().wait())
            return {"type": "http.disconnect"}

        async def keep(message: dict[str, Any]) -> None:
            messages.append(message)
            if send is not None:
                await send(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "scheme": "http",
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"1")],
        }
        await self.gate(scope, receive, keep)  # type: ignore[arg-type]
        status = next((m["status"] for m in messages if m["type"] == "http.response.start"), 0)
        return status, b"".join(m.get("body", b"") for m in messages)


@asynccontextmanager
async def application(engine: Any, **settings: Any) -> AsyncIterator[Inside]:
    """Within it, requests are taken."""
    tokenizer = Tokenizer.bytes()
    model = ServedModel(tokenizer, 258, 256, ChatTemplate(tokenizer))
    worker = Worker(lambda: engine, read_stats)
    chosen = Settings(model_id=MODEL, rows=engine.options.rows, **settings)
    service = Service(model, chosen, worker, Metrics(lambda: worker.numbers), engine.options.context)
    options = engine.options
    service.size(options.context, (options.pages - 1) * options.page_size)
    ready = asyncio.Event()
    worker.start(ready.set, ready.set)
    await asyncio.wait_for(ready.wait(), 10)
    try:
        yield Inside(service, build(service), engine)
    finally:
        worker.stop()
        assert await asyncio.get_running_loop().run_in_executor(None, worker.join, 10)
        service.close()


def events(data: bytes) -> list[dict[str, Any]]:
    """The objects of a stream of server-sent events."""
    lines = [line.removeprefix("data: ") for line in data.decode().split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]
