"""Spikes against the median of the recent past; only finite values of applied steps get into the window."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.training.guards import (
    WINDOW,
    Guard,
    guard_from_json,
    guard_to_json,
    init_guard,
    judge,
    remember,
)

MADS = 10.0
RNG = np.random.default_rng(0)
LOSSES = (3 + 0.1 * RNG.normal(size=200)).astype(np.float32)
NORMS = (1 + 0.2 * RNG.normal(size=200)).astype(np.float32)
_judge = jax.jit(judge, static_argnums=3)
_remember = jax.jit(remember)


def after(count: int) -> Guard:
    guard = init_guard()
    for loss, norm in zip(LOSSES[:count], NORMS[:count], strict=True):
        guard = _remember(guard, jnp.array(True), loss, norm)
    return guard


def verdict(guard: Guard, loss: float, norm: float, mads: float = MADS) -> tuple[bool, bool]:
    ok, spike = _judge(guard, jnp.float32(loss), jnp.float32(norm), mads)
    return bool(ok), bool(spike)


@pytest.mark.parametrize("count", [20, 63, 64, 101])
def test_the_limit_is_median_plus_so_many_mads(count: int) -> None:
    """Against numpy's median, with a window that is part full, full, and written over."""
    guard = after(count)
    for values, at in ((LOSSES, 0), (NORMS, 1)):
        last = values[:count][-WINDOW:]
        median = np.median(last)
        mad = max(np.median(np.abs(last - median)), 0.01 * median)
        for factor, spike in ((0.98, False), (1.02, True)):
            case = [3.0, 1.0]
            case[at] = float(median + factor * MADS * mad)
            assert verdict(guard, *case) == (not spike, spike)


def test_a_low_value_is_no_spike_and_a_flat_past_leaves_room() -> None:
    assert verdict(after(64), 0.1, 0.01) == (True, False)
    flat = Guard(jnp.full(WINDOW, 3.0), jnp.full(WINDOW, 1.0), jnp.int32(64))
    assert verdict(flat, 3.2, 1.0) == (True, False)  # MAD 0: 1 % of the median counts as one
    assert verdict(flat, 3.4, 1.0) == (False, True)


def test_nothing_is_a_spike_before_there_is_a_past_or_when_it_is_off() -> None:
    assert verdict(after(19), 1e9, 1e9) == (True, False)
    assert verdict(after(64), 1e9, 1e9, mads=0.0) == (True, False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_applied_nor_remembered(bad: float) -> None:
    guard = after(64)
    for case in ((bad, 1.0), (3.0, bad)):
        assert verdict(guard, *case) == (False, False)
        kept = _remember(guard, jnp.array(False), *case)
        jax.tree.map(np.testing.assert_array_equal, kept, guard)
    assert verdict(guard, 3.0, 1.0) == (True, False)  # and the next good step is applied


def test_the_window_comes_back_from_json_to_the_bit() -> None:
    guard = after(101)
    back = guard_from_json(json.loads(json.dumps(guard_to_json(guard), allow_nan=False)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b), strict=True), back, guard)
    jax.tree.map(np.testing.assert_array_equal, guard_from_json(None), init_guard())  # an older checkpoint
