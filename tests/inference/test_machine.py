"""The scheduler under any sequence of events, and faults planted in it that must not go unseen."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dsv3_jax.inference import scheduler as scheduler_module
from dsv3_jax.inference.pages import PagePool
from dsv3_jax.inference.scheduler import Scheduler
from dsv3_jax.inference.table import RowTable
from tests.inference import machine

RULES = 2500


def test_every_request_ends_right_whatever_happens() -> None:
    seen = machine.run(RULES)
    assert seen["rules"] >= 2000
    for what in (
        "on_two_devices",
        "preempted",
        "prefix_hit_tokens",
        "evictions",
        "length",
        "stop",
        "error",
        "cancelled",
    ):
        assert seen[what] > 0, f"{what}: never seen in {seen}"


def a_page_short(patch: pytest.MonkeyPatch) -> None:
    def missing(self: Scheduler, sequence: Any, steps: int) -> int:
        slots = min(sequence.written + steps, sequence.most_slots) - 1
        return max(self._pages_for(slots) - len(sequence.pages), 0)

    patch.setattr(Scheduler, "_missing", missing)


def an_owner_that_stays(patch: pytest.MonkeyPatch) -> None:
    release = PagePool.release
    patch.setattr(
        PagePool, "release", lambda self, pages: release(self, pages[1:] if len(pages) > 2 else pages)
    )


def a_stale_table_entry(patch: pytest.MonkeyPatch) -> None:
    enter = RowTable.enter

    def stale(self: RowTable, row: int, *rest: Any) -> bool:
        length = self._lengths[row]
        entered = enter(self, row, *rest)
        self._lengths[row] = length
        return entered

    patch.setattr(RowTable, "enter", stale)


def a_page_found_before_it_is_full(patch: pytest.MonkeyPatch) -> None:
    prefilled = Scheduler.prefilled

    def early(self: Scheduler, tile: Any) -> None:
        prefilled(self, tile)
        sequence, at = tile.sequence, tile.stop // self.page_size
        if self._prefix_cache and at < len(self._keys(sequence)):
            self.pool.publish(sequence.pages[at], self._keys(sequence)[at])

    patch.setattr(Scheduler, "prefilled", early)


def a_found_page_without_its_owner(patch: pytest.MonkeyPatch) -> None:
    find = PagePool.find

    def unowned(self: PagePool, keys: Any) -> list[int]:
        pages = find(self, keys)
        for page in pages[:1]:
            self._owners[page] -= 1
        return pages

    patch.setattr(PagePool, "find", unowned)


def a_key_of_the_page_alone(patch: pytest.MonkeyPatch) -> None:
    def keys(ids: np.ndarray, page_size: int, tenant: str) -> list[bytes]:
        pages = [ids[at : at + page_size] for at in range(0, len(ids) - page_size + 1, page_size)]
        return [hashlib.sha256(page.tobytes()).digest() for page in pages]

    patch.setattr(scheduler_module, "page_keys", keys)


def a_victim_that_came_first(patch: pytest.MonkeyPatch) -> None:
    preempt = Scheduler._preempt
    patch.setattr(Scheduler, "_preempt", lambda self, victim: preempt(self, self.running[0]))


@pytest.mark.parametrize(
    "fault",
    [
        a_page_short,
        an_owner_that_stays,
        a_stale_table_entry,
        a_page_found_before_it_is_full,
        a_found_page_without_its_owner,
        a_key_of_the_page_alone,
        a_victim_that_came_first,
    ],
)
def test_a_planted_fault_is_seen(fault: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        with pytest.raises((AssertionError, IndexError, ValueError, KeyError)):
            machine.run(12 * RULES, shrink=False)  # it stops at the first failure
