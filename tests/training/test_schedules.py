"""Schedules against the numbers of the V3 report (arXiv 2412.19437, section 4.2) and of their own definitions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import OptimizerConfig, TrainingConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.training.schedules import (
    balance_rate,
    batch_schedule,
    learning_rate,
    mtp_weight,
    progress,
)

# The report's run: 14.8T tokens in rows of 4K, batches from 3072 to 15360 over the first 469B tokens.
V3 = TrainingConfig(
    steps=242_694,
    batch_size=15_360,
    seq_len=4096,
    batch_ramp_start=3072,
    batch_ramp_steps=14_909,
    mtp_late_weight=0.1,
    balance_stop_fraction=14.3 / 14.8,
)


def _rate(optimizer: OptimizerConfig, steps: int, step: int) -> float:
    return float(learning_rate(optimizer, TrainingConfig(steps=steps), jnp.int32(step)))


def _step_at(trillions: float) -> int:
    """The step of the report's run in which this many tokens have been read."""
    batches = batch_schedule(V3)
    read = (
        step
        for step in range(int(trillions / 14.8 * V3.steps), V3.steps)
        if batches.samples(step) * V3.seq_len >= trillions * 1e12
    )
    return next(read, V3.steps)


def test_cosine_rises_to_the_peak_and_ends_at_the_ratio() -> None:
    cosine = OptimizerConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    rates = [_rate(cosine, 110, step) for step in (1, 5, 10, 60, 110)]
    np.testing.assert_allclose(rates, [0.1, 0.5, 1.0, 0.55, 0.1], rtol=1e-5)


@pytest.mark.parametrize(
    ("trillions", "rate"),
    [
        (5.0, 2.2e-4),
        (9.99, 2.2e-4),
        (12.15, 1.21e-4),
        (14.35, 2.2e-5),
        (14.62, 2.2e-5),
        (14.7, 7.3e-6),
        (14.8, 7.3e-6),
    ],
)
def test_v3_has_the_phases_of_the_report(trillions: float, rate: float) -> None:
    v3 = OptimizerConfig(lr=2.2e-4, warmup_steps=2000, schedule="v3")
    assert float(learning_rate(v3, V3, jnp.int32(_step_at(trillions)))) == pytest.approx(rate, rel=1e-3)


def test_constant_stays_at_the_peak() -> None:
    constant = OptimizerConfig(lr=0.5, warmup_steps=4, schedule="constant")
    assert [_rate(constant, 9, step) for step in (2, 4, 9)] == [0.25, 0.5, 0.5]


def test_wsd_stays_then_falls_as_one_minus_the_square_root() -> None:
    wsd = OptimizerConfig(lr=1.0, warmup_steps=10, schedule="wsd", decay_fraction=0.2, min_lr_ratio=0.1)
    rates = [_rate(wsd, 1000, step) for step in (5, 10, 400, 800, 850, 900, 1000)]
    np.testing.assert_allclose(
        rates, [0.5, 1.0, 1.0, 1.0, 1 - 0.9 * 0.5, 1 - 0.9 * np.sqrt(0.5), 0.1], rtol=2e-4
    )


def test_the_ramp_has_the_tokens_of_the_report_in_five_sizes() -> None:
    batches = batch_schedule(V3)
    assert batches.sizes == (3072, 6144, 9216, 12_288, 15_360)
    assert batches.at_step(1) == 3072 and batches.at_step(V3.batch_ramp_steps + 1) == 15_360
    assert batches.samples(V3.batch_ramp_steps) * 4096 == pytest.approx(469e9, rel=1e-3)
    assert batches.samples(V3.steps) * 4096 == pytest.approx(14.8e12, rel=1e-3)


@pytest.mark.parametrize(
    "training",
    [
        TrainingConfig(batch_size=16, batch_ramp_start=4, batch_ramp_sizes=4, batch_ramp_steps=10, steps=30),
        TrainingConfig(batch_size=6, batch_ramp_start=2, batch_ramp_sizes=3, batch_ramp_steps=2, steps=9),
        TrainingConfig(batch_size=5, steps=7),
    ],
)
def test_step_and_position_agree_about_every_batch(training: TrainingConfig) -> None:
    batches, position, sizes = batch_schedule(training), 0, []
    for step in range(1, training.steps + 1):
        assert batches.samples(step - 1) == position
        assert batches.at_position(position) == batches.at_step(step)
        sizes.append(batches.at_step(step))
        position += sizes[-1]
        share = position / batches.samples(training.steps)
        assert float(progress(training, jnp.int32(step))) == pytest.approx(share, rel=1e-6) or share > 1
    assert sizes == sorted(sizes) and set(sizes) == set(batches.sizes)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (dict(batch_ramp_start=16), "batch_ramp_start is 16"),
        (dict(batch_ramp_start=5), "batch_ramp_start is 5"),
        (dict(accumulate=8), "batch_ramp_start is 4"),
        (dict(batch_ramp_sizes=1), "batch_ramp_sizes is 1"),
        (dict(batch_ramp_steps=2), "batch_ramp_steps is 2"),
        (dict(balance_stop_fraction=1.5), r"balance_stop_fraction is 1\.5"),
        (dict(mtp_late_weight=-1.0), r"mtp_late_weight is -1\.0"),
    ],
)
def test_a_ramp_or_share_that_makes_no_sense_is_refused(change: dict[str, Any], key: str) -> None:
    good = TrainingConfig(batch_size=16, batch_ramp_start=4, batch_ramp_sizes=4, batch_ramp_steps=10)
    with pytest.raises(ConfigError, match=key):
        dataclasses.replace(good, **change)


def test_bias_rate_and_multi_token_weight_change_where_the_report_says() -> None:
    rates = [float(balance_rate(V3, jnp.int32(_step_at(t)))) for t in (0.1, 14.2, 14.29, 14.31, 14.79)]
    np.testing.assert_allclose(rates, [1e-3, 1e-3, 1e-3, 0.0, 0.0], rtol=1e-6)
    weights = [float(mtp_weight(V3, jnp.int32(_step_at(t)))) for t in (0.1, 9.99, 10.01, 14.79)]
    np.testing.assert_allclose(weights, [0.3, 0.3, 0.1, 0.1], rtol=1e-6)


def test_without_late_values_nothing_changes_to_the_last_step() -> None:
    training = TrainingConfig(steps=7)
    last = jax.jit(lambda step: (balance_rate(training, step), mtp_weight(training, step)))(jnp.int32(7))
    assert [float(value) for value in last] == [np.float32(1e-3), np.float32(0.3)]
