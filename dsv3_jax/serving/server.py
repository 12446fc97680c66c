"""The process: socket, event loop, signals, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
from collections.abc import Iterator
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsv3_jax.errors import ConfigError
from dsv3_jax.serving.app import build
from dsv3_jax.serving.protocol import LimitedProtocol
from dsv3_jax.serving.service import Service
from dsv3_jax.serving.settings import HEADER_BYTES

_CRASH_SECONDS = 5.0
"""How long clients of a crashed engine have to read their errors."""
_CLOSE_SECONDS = 5


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ConfigError (exit 2) where that is not possible, before any model is loaded."""
    found = None
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, proto)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        if found is not None:
            found.close()
        raise ConfigError(f"--host {host} --port {port}: {error.strerror or error}") from None
    return found


class Server(uvicorn.Server):
    """Serves until a signal, then drains: no new work, what was accepted is finished, exit 0.

    A second signal ends the process at once. An engine that crashes ends it with 1 (the reason is on stderr).
    """

    def __init__(self, service: Service, sock: socket.socket) -> None:
        self._service, self._sock = service, sock
        settings = service.settings
        config = uvicorn.Config(
            build(service),
            http=functools.partial(LimitedProtocol, settings=settings),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_level="error",
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_graceful_shutdown=_CLOSE_SECONDS,
            timeout_keep_alive=settings.read_timeout,  # type: ignore[arg-type]  # seconds, of any kind
            backlog=min(settings.max_connections, 4096),
        )
        super().__init__(config)
        self._ended_by: str | None = None

    def serve_to_the_end(self) -> int:
        """Run; the exit code. Raises what the engine could not be made for."""
        self.run(sockets=[self._sock])
        failure = self._service.worker.failure
        if failure is not None:
            raise failure
        return 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, and the engine begins to load."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._service.worker.start(self._on_ready, self._on_failure)

    def _on_ready(self) -> None:
        host, port = self._sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"ready http://{shown}:{port}", flush=True)

    def _on_failure(self) -> None:
        self.should_exit = True
        killer = asyncio.get_running_loop().call_later(_CRASH_SECONDS, os._exit, 1)
        del killer  # it holds itself; a server that closes in time ends before it fires

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: has draining ended?"""
        service = self._service
        if service.draining and service.admission.sequences == 0 and not self._busy():
            self.should_exit = True
        return await super().on_tick(counter)

    def _busy(self) -> bool:
        """Whether a request is being answered."""
        return any(
            isinstance(c, H11Protocol) and c.cycle is not None and not c.cycle.response_complete
            for c in self.server_state.connections
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, and the engine's thread ends."""
        await super().shutdown(sockets)
        self._service.worker.stop()
        await asyncio.get_running_loop().run_in_executor(None, self._service.worker.join, _CRASH_SECONDS)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals drain. Uvicorn would raise them again at the end, which is no exit 0."""
        old = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._ended_by is not None:
            os.write(2, f"{name} again: ending now\n".encode())
            os._exit(128 + number)
        self._ended_by = name
        os.write(2, f"{name}: finishing accepted requests (again: end now)\n".encode())
        self._service.draining = True
        if not self._service.worker.ready:  # nothing was accepted, and loading may take minutes
            os._exit(0)
