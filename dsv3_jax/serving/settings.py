"""What the server is told at start, and the ranges it accepts."""

from __future__ import annotations

import dataclasses
import math

from dsv3_jax.errors import ConfigError

MAX_CHOICES = 8
"""Largest n of a request; also of the prompts of one completion."""
BODY_BYTES = 1 << 20
HEADER_BYTES = 32 << 10


@dataclasses.dataclass(frozen=True)
class Settings:
    """Limits and names of one server.

    Attributes:
      model_id: the exact name requests give.
      api_key: what `Authorization: Bearer` must carry on the API's routes; None for an open server.
      rows: sequences the engine decodes together.
      max_queue: sequences accepted beyond `rows`; further ones get a 429.
      max_reserved_tokens: prompt and answer tokens that all accepted sequences may need together; a request that
        comes to an idle server is always taken. None: eight full contexts, or four times what the pages hold.
      default_max_tokens: answer of a chat request that names no length (less where the context ends).
      request_timeout: seconds from a request's header to its last byte.
      read_timeout: seconds for the header, and again for the body.
      write_timeout: seconds a client may take none of the bytes that wait for it.
      max_connections: open connections; further ones get a 503 and are closed.
      stuck_after: seconds one engine step may take before /livez calls the process dead.
    """

    model_id: str
    api_key: str | None = None
    rows: int = 16
    max_queue: int = 64
    max_reserved_tokens: int | None = None
    default_max_tokens: int = 4096
    request_timeout: float = 30.0
    read_timeout: float = 10.0
    write_timeout: float = 30.0
    max_connections: int = 1024
    stuck_after: float = 120.0

    def __post_init__(self) -> None:
        if not self.model_id or len(self.model_id) > 256 or not self.model_id.isprintable():
            raise ConfigError("--model-id must be 1 to 256 printable characters")
        if self.api_key is not None and (
            not self.api_key or not self.api_key.isascii() or not self.api_key.isprintable()
        ):
            raise ConfigError("the API key must be printable ASCII and not empty")
        for name in ("rows", "default_max_tokens", "max_connections"):
            self._range(name, 1, 1 << 40)
        if self.max_reserved_tokens is not None:
            self._range("max_reserved_tokens", 1, 1 << 40)
        self._range("max_queue", 0, 1 << 20)
        for name in ("request_timeout", "read_timeout", "write_timeout", "stuck_after"):
            self._range(name, 0.05, 86400.0)

    def _range(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not math.isfinite(value) or not low <= value <= high:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; expected {low:g} to {high:g}")

    @property
    def max_sequences(self) -> int:
        """Sequences accepted and not yet finished."""
        return self.rows + self.max_queue
