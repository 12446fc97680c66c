"""Which requests run, on which pages, and what the next step computes. Host only: it never sees an array of the device.

Order is by arrival. Requests are admitted in that order and the latest one gives its pages back first, so every
request that runs arrived before every request that waits, the oldest one always goes on, and, as no request is taken
that could not have all usable pages at once, each one ends.

A token's latent is always computed by the same program: prompt tokens by the prefill, new ones by the decode step.
So a request that lost its pages recomputes its prompt, then feeds its own tokens again, and ends up with the same
bits; and only pages of prompts are shared between requests.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator

import numpy as np

from dsv3_jax.inference.pages import PagePool, page_keys


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request as the scheduler sees it.

    Attributes:
      ticket: number in order of arrival.
      prompt: int32 ids.
      max_new: new tokens at most.
      tenant: whose cached prefixes it may use.
      find_prefix: whether it may use any; not where every prompt token is to be scored.
      one_by_one: its tokens are wanted as they come, one a step.
      new: tokens so far.
      row: its row of the decode step, -1 while it waits.
      pages: its pages in the order of its ids.
      written: tokens whose latents are in them.
      cached: prompt tokens that the prefix cache saved at the first admission; -1 before it.
      preempted: how often it lost its pages.
    """

    ticket: int
    prompt: np.ndarray
    max_new: int
    tenant: str = ""
    find_prefix: bool = True
    one_by_one: bool = False
    new: list[int] = dataclasses.field(default_factory=list)
    row: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    written: int = 0
    cached: int = -1
    preempted: int = 0
    keys: list[bytes] | None = None

    @property
    def length(self) -> int:
        """Tokens known, prompt and new."""
        return len(self.prompt) + len(self.new)

    @property
    def most_slots(self) -> int:
        """Slots it can come to need; the last token is never written."""
        return len(self.prompt) + max(self.max_new - 1, 0)

    @property
    def in_prompt(self) -> bool:
        """Whether prompt tokens are still to be computed."""
        return self.written < len(self.prompt)

    @property
    def left(self) -> int:
        """Decode steps until `max_new`, those included that feed known tokens again."""
        return self.max_new - (self.written - len(self.prompt) + 1)

    def known(self, start: int, stop: int) -> list[int]:
        """Its new tokens at positions start .. stop - 1, as far as they are known."""
        first = len(self.prompt)
        return self.new[max(start - first, 0) : max(stop - first, 0)]


@dataclasses.dataclass(frozen=True)
class Tile:
    """Prompt tokens start .. stop - 1 of a sequence."""

    sequence: Sequence
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step: tiles of prompts, and rows that decode up to `steps` tokens each."""

    tiles: list[Tile]
    decode: list[Sequence]
    steps: int


class Scheduler:
    """Admission, page tables and preemption.

    Attributes:
      pool: the pages.
      waiting, running: sequences, by arrival.
      preemptions, prefix_hit_tokens: counts since the start.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        rows: int,
        first_row: int = 0,
        page_size: int,
        prefill_tiles: int,
        tile: int,
        most_steps: int,
        prefix_cache: bool = True,
    ) -> None:
        """
        Args:
          rows: sequences that run at once.
          first_row: number of the first of their rows.
          prefill_tiles, tile: tiles of a prefill call, and tokens of a tile.
          most_steps: tokens that a decode call gives a row at most.
        """
        self.pool = pool
        self.page_size = page_size
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prefix_hit_tokens = 0
        self._tiles, self._tile = prefill_tiles, tile
        self._most_steps = most_steps
        self._prefix_cache = prefix_cache
        self._rows = list(range(first_row + rows - 1, first_row - 1, -1))

    def fits(self, prompt: int, max_new: int) -> bool:
        """Whether a request of this size can run, alone if need be."""
        return self._pages_for(prompt + max(max_new - 1, 0)) <= self.pool.total

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; tickets ascend, and it `fits`."""
        assert not self.waiting or self.waiting[-1].ticket < sequence.ticket
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; its pages are free at once."""
        if sequence.row < 0:
            self.waiting.remove(sequence)
            return
        self._leave(sequence)

    def plan(self) -> Plan:
        """Admit, preempt where pages are short, and say what to compute. The plan must be carried out."""
        self._make_room()
        self._admit()
        tiles = list(self._next_tiles())
        decode = [sequence for sequence in self.running if not sequence.in_prompt]
        steps = 1
        if decode and not tiles and not any(sequence.one_by_one for sequence in decode):
            steps = self._reserve_ahead(decode)
        return Plan(tiles, decode, steps)

    def prefilled(self, tile: Tile) -> None:
        """A tile is computed, and finite: its full pages may be found by others."""
        sequence = tile.sequence
        sequence.written = tile.stop
        if self._prefix_cache:
            keys = self._keys(sequence)
            for page in range(tile.start // self.page_size, tile.stop // self.page_size):
                self.pool.publish(sequence.pages[page], keys[page])

    def decoded(self, sequence: Sequence, count: int, tokens: list[int]) -> None:
        """A row has written `count` more tokens and come to know `tokens` new ones."""
        sequence.written += count
        sequence.new += tokens

    def check(self) -> None:
        """Assert what must hold between steps."""
        self.pool.check(sequence.pages for sequence in self.running)
        rows = [sequence.row for sequence in self.running]
        assert len(set(rows) | set(self._rows)) == len(rows) + len(self._rows), "a row is used twice or lost"
        tickets = [sequence.ticket for sequence in [*self.running, *self.waiting]]
        assert tickets == sorted(tickets), "a later request runs while an earlier one waits"
        for sequence in self.waiting:
            assert not sequence.pages and sequence.row == -1 and sequence.written == 0
        for sequence in self.running:
            assert len(sequence.pages) * self.page_size >= sequence.written
            assert len(sequence.pages) <= self._pages_for(sequence.most_slots)

    # --- pages ----------------------------------------------------------------------------------------------

    def _pages_for(self, slots: int) -> int:
        return -(-slots // self.page_size)

    def _keys(self, sequence: Sequence) -> list[bytes]:
        if sequence.keys is None:
            sequence.keys = page_keys(sequence.prompt, self.page_size, sequence.tenant)
        return sequence.keys

    def _missing(self, sequence: Sequence, steps: int) -> int:
        """Pages it lacks to decode `steps` more tokens."""
        slots = min(sequence.written + steps, sequence.most_slots)
        return max(self._pages_for(slots) - len(sequence.pages), 0)

    def _make_room(self) -> None:
        """Pages for one more token of every row, oldest first; the latest arrivals give theirs up if they must."""
        for sequence in list(self.running):
            if sequence.row < 0 or sequence.in_prompt:
                continue
            while (pages := self.pool.take(self._missing(sequence, 1))) is None:
                victim = self.running[-1]
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                sequence.pages += pages

    def _reserve_ahead(self, decode: list[Sequence]) -> int:
        """How many tokens a call may give without another look at the pages; they are reserved."""
        steps = self._most_steps
        while steps > 1 and sum(self._missing(sequence, steps) for sequence in decode) > self.pool.available:
            steps //= 2
        if steps > 1:
            for sequence in decode:
                pages = self.pool.take(self._missing(sequence, steps))
                assert pages is not None
                sequence.pages += pages
        return steps

    def _preempt(self, victim: Sequence) -> None:
        self._leave(victim)
        victim.written = 0
        victim.preempted += 1
        self.preemptions += 1
        self.waiting.appendleft(victim)

    def _leave(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        self._rows.append(sequence.row)
        self.running.remove(sequence)
        sequence.pages, sequence.row = [], -1

    # --- admission and prompts ------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self.waiting and self._rows:
            sequence = self.waiting[0]
            found = self._find_prefix(sequence)
            needed = self._pages_for(min(sequence.length, sequence.most_slots)) - len(found)
            # One page to grow for every row that runs: admitting into the last page would only be undone.
            reserve = len(self.running)
            pages = self.pool.take(needed) if needed + reserve <= self.pool.available else None
            if pages is None:
                self.pool.release(found)
                return
            self.waiting.popleft()
            sequence.pages = found + pages
            sequence.written = len(found) * self.page_size
            sequence.row = self._rows.pop()
            if sequence.cached < 0:
                sequence.cached = sequence.written
            self.prefix_hit_tokens += sequence.written
            self.running.append(sequence)

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        if not (self._prefix_cache and sequence.find_prefix):
            return []
        # The last prompt token is always computed: its hidden state gives the first new token.
        return self.pool.find(self._keys(sequence)[: (len(sequence.prompt) - 1) // self.page_size])

    def _next_tiles(self) -> Iterator[Tile]:
        """A tile for every prompt, oldest first, then the tiles that are left for the oldest."""
        prompts = [sequence for sequence in self.running if sequence.in_prompt][: self._tiles]
        left = self._tiles - len(prompts)
        for sequence in prompts:
            rest = -(-(len(sequence.prompt) - sequence.written) // self._tile)
            count = 1 + min(rest - 1, left)
            left -= count - 1
            for at in range(count):
                start = sequence.written + at * self._tile
                yield Tile(sequence, start, min(start + self._tile, len(sequence.prompt)))
