"""Pages: keys of prefixes, owners, and what is given up first."""

from __future__ import annotations

import numpy as np
import pytest

from dsv3_jax.inference.pages import PagePool, page_keys


def test_a_key_says_all_that_came_before_and_whose_it_is() -> None:
    ids = np.arange(10)
    keys = page_keys(ids, 4, "a")
    assert len(keys) == 2, "only full pages have one"
    assert page_keys(ids[:8], 4, "a") == keys
    assert page_keys(np.concatenate([[9], ids[1:]]), 4, "a")[1] != keys[1]
    other = page_keys(ids, 4, "b")
    assert not set(other) & set(keys), "a tenant finds nothing of another's"


def test_pages_are_taken_all_or_none() -> None:
    pool = PagePool(5)
    taken = pool.take(3)
    assert taken is not None and len(set(taken)) == 3 and 0 not in taken
    assert pool.take(2) is None and pool.available == 1
    pool.release(taken)
    assert pool.available == pool.total == 4


def test_a_released_prefix_is_found_until_its_pages_are_needed() -> None:
    pool = PagePool(5)
    keys = page_keys(np.arange(6), 2, "")
    pages = pool.take(3)
    assert pages is not None
    for page, key in zip(pages, keys, strict=True):
        pool.publish(page, key)
    pool.release(pages)
    assert (pool.used, pool.cached, pool.available) == (0, 3, 4)
    assert pool.find(keys) == pages and pool.used == 3
    pool.release(pages)
    assert pool.take(2) is not None, "the free one, and the end of the prefix"
    assert pool.find(keys) == pages[:2]
    pool.release(pages[:2])
    pool.clear()
    assert pool.find(keys) == [] and pool.available == 2


def test_the_first_page_of_a_key_stays() -> None:
    pool = PagePool(4)
    (one, two) = pool.take(2) or []
    pool.publish(one, b"key")
    pool.publish(two, b"key")
    assert pool.find([b"key"]) == [one] and pool.owners(one) == 2
    pool.check([[one], [one], [two]])
    pool.release([two])
    assert pool.cached == 0, "the copy is free at once"


def test_misuse_is_an_error() -> None:
    pool = PagePool(4)
    pages = pool.take(1) or []
    pool.release(pages)
    with pytest.raises(AssertionError, match="no owner"):
        pool.release(pages)
    with pytest.raises(AssertionError, match="no owner"):
        pool.publish(pages[0], b"key")
    with pytest.raises(AssertionError, match="differ"):
        pool.check([pages])
    with pytest.raises(ValueError, match="at least 2"):
        PagePool(1)
