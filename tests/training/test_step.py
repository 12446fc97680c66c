"""The step: the same on one device, on eight and in micro-batches; the balance rule; nothing non-finite gets in."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import RunConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.training.guards import WINDOW, Guard
from dsv3_jax.training.step import batch_sharding, init_state, make_eval_step, make_train_step
from tests.training import tiny

# A low learning rate: Adam's first steps are sign-like and would amplify rounding into another choice of experts.
RUN = tiny.replace(tiny.replace(tiny.RUN, "optimizer", lr=1e-3), "training", spike_guard=20.0)
# After step 15 of 20 the bias rate is 0 and the multi-token loss weighs less.
RUN = tiny.replace(RUN, "training", balance_stop_fraction=0.75, mtp_late_weight=0.125, mtp_late_fraction=0.75)


@functools.cache
def _compiled(accumulate: int, mesh: tuple[int, int, int, int]) -> tuple[RunConfig, Any, Any]:
    cfg = tiny.replace(RUN, "training", accumulate=accumulate)
    devices = tiny.mesh(*mesh)
    return cfg, devices, jax.jit(make_train_step(cfg, devices))


def _put(cfg: RunConfig, devices: jax.sharding.Mesh, seed: int = 0) -> dict[str, jax.Array]:
    return jax.device_put(tiny.batch(cfg, seed), batch_sharding(devices))


def _run(
    accumulate: int, mesh: tuple[int, int, int, int], steps: int
) -> tuple[Any, list[dict[str, np.ndarray]]]:
    cfg, devices, step = _compiled(accumulate, mesh)
    state, history = tiny.state(cfg, devices), []
    for number in range(steps):
        state, metrics = step(state, _put(cfg, devices, number))
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


@functools.cache
def _reference() -> tuple[Any, list[dict[str, np.ndarray]]]:
    return _run(1, (1, 1, 1, 1), 5)


@pytest.mark.parametrize(
    ("accumulate", "mesh"),
    [(1, (1, 2, 2, 2)), (1, (2, 1, 4, 1)), (2, (2, 2, 1, 1))],
    ids=["fsdp 2 expert 2 tensor 2", "data 2 expert 4", "data 2 fsdp 2, 2 micro-batches"],
)
def test_first_five_losses_and_biases_do_not_depend_on_the_cut(
    accumulate: int, mesh: tuple[int, int, int, int]
) -> None:
    state, history = _run(accumulate, mesh, 5)
    want_state, want = _reference()
    for key in ("loss", "ce_loss", "mtp_loss", "balance_loss"):
        np.testing.assert_allclose([m[key] for m in history], [m[key] for m in want], atol=1e-5, err_msg=key)
    assert abs(history[0]["loss"] - want[0]["loss"]) <= 1e-6
    for have, expected in zip(history, want, strict=True):
        np.testing.assert_array_equal(have["expert_counts_LE"], expected["expert_counts_LE"])
    jax.tree.map(np.testing.assert_array_equal, state.router, want_state.router)


def test_loss_falls_on_a_batch_seen_again() -> None:
    cfg, devices, step = _compiled(1, (1, 1, 1, 1))
    state, losses = tiny.state(cfg, devices), []
    for _ in range(8):
        state, metrics = step(state, _put(cfg, devices))
        losses.append(float(metrics["ce_loss"]))
    assert losses[-1] < losses[0] - 0.05


def test_balance_rule_moves_each_bias_by_u_towards_the_mean() -> None:
    state, history = _reference()
    want = {"moe": np.zeros((2, 8), np.float32), "mtp": np.zeros((1, 8), np.float32)}
    for metrics in history:
        counts_LE = metrics["expert_counts_LE"]
        assert counts_LE.shape == (3, 8)  # two expert layers and the multi-token module's
        delta_LE = np.float32(RUN.training.balance_update_rate) * np.sign(
            counts_LE.mean(1, keepdims=True) - counts_LE
        )
        want["moe"] += delta_LE[:2]
        want["mtp"] += delta_LE[2:]
    np.testing.assert_array_equal(state.router["moe"]["mlp"]["router"]["bias_E"], want["moe"])
    np.testing.assert_array_equal(state.router["mtp"]["block"]["mlp"]["router"]["bias_E"], want["mtp"])
    assert np.abs(want["mtp"]).max() > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(bad: float) -> None:
    cfg, devices, step = _compiled(1, (1, 1, 1, 1))
    state, _ = step(tiny.state(cfg, devices), _put(cfg, devices))
    poisoned = state.replace(
        params={**state.params, "final_norm_D": state.params["final_norm_D"].at[0].set(bad)}
    )
    after, metrics = step(poisoned, _put(cfg, devices))
    assert int(metrics["skipped"]) == 1 and int(after.step) == int(state.step) + 1
    jax.tree.map(
        np.testing.assert_array_equal,
        (after.params, after.router, after.opt_state),
        (poisoned.params, poisoned.router, poisoned.opt_state),
    )
    _, metrics = step(state, _put(cfg, devices))
    assert int(metrics["skipped"]) == 0


def test_a_spike_is_not_applied_and_counted() -> None:
    cfg, devices, step = _compiled(1, (1, 1, 1))
    state, metrics = step(tiny.state(cfg, devices), _put(cfg, devices))
    assert int(metrics["spike"]) == 0 and int(state.guard.count) == 1
    past = Guard(jnp.full(WINDOW, 0.1), jnp.full(WINDOW, 1e3), jnp.int32(WINDOW))
    after, metrics = step(state.replace(guard=past), _put(cfg, devices))
    assert int(metrics["spike"]) == int(metrics["skipped"]) == 1
    jax.tree.map(
        np.testing.assert_array_equal,
        (after.params, after.router, after.opt_state, after.guard),
        (state.params, state.router, state.opt_state, past),
    )
    calm = Guard(jnp.full(WINDOW, 1e3), jnp.full(WINDOW, 1e3), jnp.int32(WINDOW))
    after, metrics = step(state.replace(guard=calm), _put(cfg, devices))
    assert int(metrics["skipped"]) == 0 and int(after.guard.count) == WINDOW + 1
    assert float(after.guard.losses[0]) == float(metrics["loss"])


def test_evaluation_gives_the_training_cross_entropy() -> None:
    _, history = _reference()
    devices = tiny.mesh(2, 4)
    state = init_state(RUN, devices)  # its own first values, drawn on this mesh
    drawn = tiny.state(RUN, devices)
    for one, other in zip(*map(jax.tree.leaves, jax.device_get((state, drawn))), strict=True):
        # The same random bits; jax 0.12 compiles their normal values for a cut with other roundings (3e-7 at most).
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=0)
    sums = jax.jit(make_eval_step(RUN, devices))(state.params, state.router, _put(RUN, devices))
    assert int(sums.targets) == (tiny.batch(RUN)["targets_BT"] >= 0).sum()
    assert float(sums.nats / sums.targets) == pytest.approx(float(history[0]["ce_loss"]), abs=1e-5)
    assert float(sums.mtp_nats / sums.mtp_targets) == pytest.approx(float(history[0]["mtp_loss"]), abs=1e-5)


def test_metrics_say_how_even_the_load_is_and_how_far_the_biases_spread() -> None:
    _, history = _reference()
    for metrics in history:
        counts_LE = metrics["expert_counts_LE"]
        mean_L1 = counts_LE.mean(1, keepdims=True)
        within = (counts_LE >= 0.5 * mean_L1) & (counts_LE <= 1.5 * mean_L1)
        assert 0 < float(metrics["balanced_fraction"]) == pytest.approx(within.mean(), abs=1e-6)
    # Biases start at 0 and move by u a step; what is told is what the step used.
    assert float(history[0]["bias_max"]) == 0 and not history[0]["bias_std_L"].any()
    u = np.float32(RUN.training.balance_update_rate)
    assert history[1]["bias_std_L"].shape == (3,) and float(history[1]["bias_max"]) == u
    assert float(history[1]["bias_min"]) == -u and 0 < history[1]["bias_std_L"].max() <= u


def test_late_values_of_rate_and_weight_act_inside_the_compiled_step() -> None:
    cfg, devices, step = _compiled(1, (1, 1, 1))
    fresh = tiny.state(cfg, devices)
    for at, weight, moves in ((14, 0.3, True), (16, 0.125, False)):
        after, metrics = step(fresh.replace(step=fresh.step + at - 1), _put(cfg, devices))
        want = metrics["ce_loss"] + weight * metrics["mtp_loss"] + 0.01 * metrics["balance_loss"]
        np.testing.assert_allclose(metrics["loss"], want, rtol=1e-6)
        assert all(np.any(leaf != 0) == moves for leaf in jax.tree.leaves(jax.device_get(after.router)))


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.batch_size is 12; expected a multiple of 8"):
        make_train_step(tiny.replace(RUN, "training", batch_size=12, accumulate=1), tiny.mesh(2, 4))
    ramp = dict(batch_size=16, batch_ramp_start=4, batch_ramp_sizes=2, batch_ramp_steps=3)
    with pytest.raises(ConfigError, match="and 4 in its ramp; expected a multiple of 8"):
        make_train_step(tiny.replace(RUN, "training", **ramp), tiny.mesh(2, 4))
