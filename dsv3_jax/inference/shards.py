"""Several schedulers as one: each has its own rows, tiles and pages, those of one device."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from itertools import chain

from dsv3_jax.inference.pages import PagePool
from dsv3_jax.inference.scheduler import Plan, Scheduler, Sequence, Tile


class Pools:
    """The sums of several pools."""

    def __init__(self, pools: Items[PagePool]) -> None:
        self._pools = pools

    @property
    def total(self) -> int:
        """Pages that can be owned."""
        return sum(pool.total for pool in self._pools)

    @property
    def used(self) -> int:
        """Pages with an owner."""
        return sum(pool.used for pool in self._pools)

    @property
    def cached(self) -> int:
        """Pages kept for their content alone."""
        return sum(pool.cached for pool in self._pools)

    @property
    def evictions(self) -> int:
        """Of all."""
        return sum(pool.evictions for pool in self._pools)

    def clear(self) -> None:
        """Forget every cached prefix."""
        for pool in self._pools:
            pool.clear()


class Shards:
    """The interface of `Scheduler` over several; a request stays with the one it was given to.

    Attributes:
      schedulers: one a device.
      pool: the pages of all.
    """

    def __init__(self, schedulers: list[Scheduler]) -> None:
        self.schedulers = schedulers
        self._home: dict[int, Scheduler] = {}
        self.pool = Pools([scheduler.pool for scheduler in schedulers])

    @property
    def waiting(self) -> deque[Sequence]:
        """Sequences without a row."""
        return deque(chain.from_iterable(scheduler.waiting for scheduler in self.schedulers))

    @property
    def running(self) -> list[Sequence]:
        """Sequences with a row."""
        return [sequence for scheduler in self.schedulers for sequence in scheduler.running]

    @property
    def preemptions(self) -> int:
        """Of all."""
        return sum(scheduler.preemptions for scheduler in self.schedulers)

    @property
    def prefix_hit_tokens(self) -> int:
        """Of all."""
        return sum(scheduler.prefix_hit_tokens for scheduler in self.schedulers)

    def fits(self, prompt: int, max_new: int) -> bool:
        """Whether a request can run on one of them; they are alike."""
        return self.schedulers[0].fits(prompt, max_new)

    def add(self, sequence: Sequence) -> None:
        """To the one with the fewest tokens to come."""

        def load(scheduler: Scheduler) -> int:
            there = [*scheduler.running, *scheduler.waiting]
            return sum(len(s.prompt) + s.max_new - s.written for s in there)

        home = self._home[sequence.ticket] = min(self.schedulers, key=load)
        home.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out; its pages are free at once."""
        self._home.pop(sequence.ticket).remove(sequence)

    def plan(self) -> Plan:
        """One call for all: as many tokens as every one of them has pages for."""
        plans = [scheduler.plan() for scheduler in self.schedulers]
        tiles = [tile for plan in plans for tile in plan.tiles]
        decode = [sequence for plan in plans for sequence in plan.decode]
        steps = min((plan.steps for plan in plans if plan.decode), default=1)
        return Plan(tiles, decode, 1 if tiles else steps)

    def prefilled(self, tile: Tile) -> None:
        """See `Scheduler.prefilled`."""
        self._home[tile.sequence.ticket].prefilled(tile)

    def decoded(self, sequence: Sequence, count: int, tokens: list[int]) -> None:
        """See `Scheduler.decoded`."""
        self._home[sequence.ticket].decoded(sequence, count, tokens)

    def check(self) -> None:
        """Assert what must hold between steps."""
        for scheduler in self.schedulers:
            scheduler.check()
