"""How much is accepted at once: a bound on sequences and on the tokens they may need, else 429."""

from __future__ import annotations

import math
import time
from collections import deque

from dsv3_jax.serving.api_errors import ApiError
from dsv3_jax.serving.settings import Settings


class Admission:
    """Counts accepted sequences and their reserved tokens. Used by the event loop's thread alone.

    Attributes:
      max_tokens: the bound on reserved tokens, once it is known.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.max_tokens = settings.max_reserved_tokens
        self.sequences = 0
        self.tokens = 0
        self._ends: deque[float] = deque(maxlen=64)

    def check(self, sequences: int) -> None:
        """Raises the 429 early, before a prompt is tokenised, when the queue is full."""
        if self.sequences and self.sequences + sequences > self._settings.max_sequences:
            raise self._full("requests")

    def take(self, sequences: int, tokens: int) -> Reservation:
        """Reserve room for a request, or raise a 429 that says when to come back."""
        self.check(sequences)
        if self.max_tokens is not None and self.sequences and self.tokens + tokens > self.max_tokens:
            raise self._full("tokens")
        self.sequences += sequences
        self.tokens += tokens
        return Reservation(self, sequences, tokens)

    def give_back(self, sequences: int, tokens: int) -> None:
        """Called by a reservation."""
        self.sequences -= sequences
        self.tokens -= tokens
        self._ends.extend([time.monotonic()] * sequences)

    def retry_after(self) -> int:
        """Seconds until about half of what is waiting will have been served, at the recent pace; 1 to 30."""
        waiting = max(self.sequences - self._settings.rows, 0)
        if len(self._ends) < 2 or self._ends[-1] == self._ends[0]:
            return 1
        pace = len(self._ends) / (time.monotonic() - self._ends[0])
        return min(max(math.ceil(waiting / 2 / pace), 1), 30)

    def _full(self, what: str) -> ApiError:
        return ApiError(
            429,
            f"the queue of {what} is full; try again later",
            code="queue_full",
            headers={"Retry-After": str(self.retry_after())},
        )


class Reservation:
    """Room for one request; given back once."""

    def __init__(self, admission: Admission, sequences: int, tokens: int) -> None:
        self._admission, self._sequences, self._tokens = admission, sequences, tokens
        self._held = True

    def release(self) -> None:
        """Give the room back; a second call does nothing."""
        if self._held:
            self._held = False
            self._admission.give_back(self._sequences, self._tokens)
