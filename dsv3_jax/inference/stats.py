"""The engine's counts."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Literal


@dataclasses.dataclass
class Stats:
    """Counts and seconds since the engine was made, compiling apart; and how things stand now.

    Attributes:
      first_tokens, decode_tokens: new tokens that calls of prompts gave, one a request, and that decode steps gave.
      running, waiting: requests now.
      pages_used, pages_cached, pages_total: pages with an owner, pages kept for their content alone, and all.
      cache_token_bytes: bytes of the cache for each token, all layers.
      prefix_hit_tokens: prompt tokens that the prefix cache saved.
      preemptions: how often a request gave its pages up.
      drafted, accepted: tokens of speculative decoding that were checked, and that were right.
      drafting_calls: decode calls with drafts.
      drafting_pays: whether they bring tokens faster, as last measured; None while that is not known.
      first_token_seconds: from admission to the first token, of the latest requests.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    first_tokens: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    decode_calls: int = 0
    compile_seconds: float = 0.0
    programs: int = 0
    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    pages_total: int = 0
    cache_token_bytes: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    drafting_calls: int = 0
    drafting_pays: bool | None = None
    first_token_seconds: collections.deque[float] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=4096)
    )

    @contextlib.contextmanager
    def timed(self, phase: Literal["prefill", "decode"]) -> Iterator[None]:
        """Add the seconds of a block to a phase."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        if phase == "prefill":
            self.prefill_seconds += seconds
        else:
            self.decode_seconds += seconds
