"""AdamW: clipping, what weight decay applies to, and moments in bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsv3_jax.config import OptimizerConfig
from dsv3_jax.model import abstract_variables
from dsv3_jax.training.optimizer import decay_mask, make_optimizer
from tests.training import tiny


def test_decay_is_for_matrices_alone() -> None:
    mask = decay_mask(abstract_variables(tiny.MODEL)["params"])
    assert (
        mask["embed_VD"]
        and mask["moe"]["attention"]["kv_b_HWC"]
        and mask["moe"]["mlp"]["experts"]["gate_up_EPFD"]
    )
    assert not mask["final_norm_D"] and not mask["moe"]["attention_norm_D"] and not mask["mtp"]["norm_D"]


def test_update_is_adamw_with_clipping() -> None:
    # First step of Adam: the bias-corrected ratio is sign(g), whatever the clipping; decay is added to it.
    params = {"w_DI": jnp.full((2, 2), 2.0), "norm_D": jnp.ones(2)}
    grads = jax.tree.map(lambda p: jnp.full_like(p, 100.0), params)
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1, clip_norm=1.0))
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w_DI"], 1.0 + 0.1 * 2.0, rtol=1e-5)
    np.testing.assert_allclose(updates["norm_D"], 1.0, rtol=1e-5)
    mu = state[1].mu
    np.testing.assert_allclose(mu["norm_D"], 0.1 * 1.0 / np.sqrt(6), rtol=1e-5)  # clipped to norm 1


def test_moments_in_bfloat16_are_kept_so_and_used_in_float32() -> None:
    params = {"w_DI": jnp.full((2, 3), 2.0), "norm_D": jnp.ones(3)}
    narrow, wide = (
        make_optimizer(OptimizerConfig(moment_dtype=dtype, weight_decay=0.0, clip_norm=0.0))
        for dtype in ("bfloat16", "float32")
    )
    state, reference = narrow.init(params), wide.init(params)
    for number in range(1, 30):
        grads = jax.tree.map(
            lambda p, n=number: jnp.sin(n + jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), params
        )
        updates, state = narrow.update(grads, state, params)
        want, reference = wide.update(grads, reference, params)
    moments = optax.tree_utils.tree_get(state, "mu"), optax.tree_utils.tree_get(state, "nu")
    assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {jnp.dtype("bfloat16")}
    assert optax.tree_utils.tree_get(state, "count").dtype == jnp.int32
    for have, expected in zip(jax.tree.leaves(updates), jax.tree.leaves(want), strict=True):
        assert have.dtype == jnp.float32
        # A moment is rounded to 2^-9 of itself in every step and forgets at a rate of at least 5 %.
        np.testing.assert_allclose(have, expected, atol=0.02)
        assert np.abs(have - expected).max() > 0
