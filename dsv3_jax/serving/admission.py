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

    def take(self, sequences: int) -> Reservation:
        """Room for the sequences of a request, before any work is done for it; or a 429 that says when to come back."""
        if self.sequences and self.sequences + sequences > self._settings.max_sequences:
            raise self._full("requests")
        self.sequences += sequences
        return Reservation(self, sequences)

    def add(self, own: int, tokens: int) -> None:
        """Called by a reservation of `own` sequences. A request that is alone may have as many as it needs."""
        alone = self.sequences == own
        if self.max_tokens is not None and not alone and self.tokens + tokens > self.max_tokens:
            raise self._full("tokens")
        self.tokens += tokens

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
    """Room for one request; given back once, at the end of the `with` unless somebody keeps it."""

    def __init__(self, admission: Admission, sequences: int) -> None:
        self._admission, self._sequences, self._tokens = admission, sequences, 0
        self._held = True
        self.kept = False
        """Whether somebody else gives it back."""

    def add(self, tokens: int) -> None:
        """The tokens the request may need, once they are known. Raises a 429."""
        self._admission.add(self._sequences, tokens)
        self._tokens += tokens

    def release(self) -> None:
        """Give the room back; a second call does nothing."""
        if self._held:
            self._held = False
            self._admission.give_back(self._sequences, self._tokens)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.kept:
            self.release()
