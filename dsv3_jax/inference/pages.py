"""Pages of the latent cache: who owns which, and which hold a prefix that another prompt may use. Host only.

A page is free, owned by one or more requests, or cached: owned by none, its content kept under the hash of the ids
that led to it until the page is needed. Page 0 belongs to nobody and stays zero: it fills the unused entries of block
tables, which the device may load and never lets into a result.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

NULL_PAGE = 0


def page_keys(ids: np.ndarray, page_size: int, tenant: str) -> list[bytes]:
    """One key for every full page of `ids`: SHA-256 of the key before it and the page's ids.

    The chain starts from the tenant's name, so that no tenant can find, or time, what another has cached.
    """
    key = hashlib.sha256(b"dsv3_jax pages" + tenant.encode("utf-8", "surrogatepass")).digest()
    data = np.ascontiguousarray(ids, "<i4")
    keys = []
    for start in range(0, len(data) - page_size + 1, page_size):
        key = hashlib.sha256(key + data[start : start + page_size].tobytes()).digest()
        keys.append(key)
    return keys


class PagePool:
    """Reference counts of pages 1 .. total, and the prefix cache over those that nobody owns.

    Attributes:
      total: pages that can be owned.
      evictions: cached pages whose content was given up for a new owner.
    """

    def __init__(self, pages: int) -> None:
        """Args: pages: of the device's array, the null page included; at least 2."""
        if pages < 2:
            raise ValueError(f"{pages} pages; at least 2 are needed: the null page and one to use")
        self.total = pages - 1
        self.evictions = 0
        self._free = list(range(pages - 1, NULL_PAGE, -1))
        self._owners = [0] * pages
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Pages with a key and no owner, the next one to give up first."""

    @property
    def available(self) -> int:
        """Pages that `take` can hand out."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        """Pages with an owner."""
        return self.total - self.available

    @property
    def cached(self) -> int:
        """Pages kept for their content alone."""
        return len(self._cached)

    def take(self, count: int) -> list[int] | None:
        """`count` pages with one owner each, or None and nothing taken when there are not that many."""
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                self._forget(page)
                self.evictions += 1
            self._owners[page] = 1
            pages.append(page)
        return pages

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the longest known run of `keys`, each with one more owner."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            self._owners[page] += 1
            self._cached.pop(page, None)
            pages.append(page)
        return pages

    def publish(self, page: int, key: bytes) -> None:
        """Let others find an owned, completely written page. A key that is known keeps its first page."""
        assert self._owners[page] > 0, f"page {page} has no owner"
        if key not in self._page_of and page not in self._key_of:
            self._key_of[page] = key
            self._page_of[key] = page

    def release(self, pages: Sequence[int]) -> None:
        """One owner fewer for each of a sequence's pages, which are given in the order of its ids."""
        # Backwards, so that the head of a prefix, which more prompts can share, is given up last.
        for page in reversed(pages):
            assert self._owners[page] > 0, f"page {page} is released and has no owner"
            self._owners[page] -= 1
            if self._owners[page]:
                continue
            if page in self._key_of:
                self._cached[page] = None
            else:
                self._free.append(page)

    def owners(self, page: int) -> int:
        """How many sequences own a page."""
        return self._owners[page]

    def clear(self) -> None:
        """Forget every cached prefix."""
        while self._cached:
            page, _ = self._cached.popitem()
            self._forget(page)
            self._free.append(page)

    def check(self, owned: Iterable[Sequence[int]]) -> None:
        """Assert that `owned`, the pages of every sequence, is what the counts say, and that no page is lost."""
        counts = [0] * len(self._owners)
        for pages in owned:
            assert len(set(pages)) == len(pages), f"a sequence owns a page twice: {pages}"
            for page in pages:
                counts[page] += 1
        assert counts == self._owners, "owners and reference counts differ"
        assert counts[NULL_PAGE] == 0, "the null page has an owner"
        idle = sorted([*self._free, *self._cached])
        assert idle == [page for page in range(1, len(counts)) if counts[page] == 0], (
            "a page is lost or doubled"
        )
        assert {key: page for page, key in self._key_of.items()} == self._page_of
        assert set(self._cached) <= set(self._key_of) and not set(self._free) & set(self._key_of)

    def _forget(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]
