"""Attention equals the plain formula, forward and backward, in linear memory, with every mask."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dsv3_jax.kernels.attention import attention, reference
from dsv3_jax.kernels.attention.shapes import SHAPES

SCALE = 0.3


def plain(q_BTHQ, k_BSGQ, v_BSGU, visible_BTS):
    groups = q_BTHQ.shape[2] // k_BSGQ.shape[2]
    k_BSHQ, v_BSHU = jnp.repeat(k_BSGQ, groups, axis=2), jnp.repeat(v_BSGU, groups, axis=2)
    scores_BHTS = SCALE * jnp.einsum("bthq,bshq->bhts", q_BTHQ, k_BSHQ)
    shown = visible_BTS[:, None]
    weights_BHTS = jnp.where(shown, jnp.exp(scores_BHTS - scores_BHTS.max(-1, keepdims=True)), 0.0)
    total_BHT1 = weights_BHTS.sum(-1, keepdims=True)
    weights_BHTS /= jnp.where(total_BHT1 == 0, 1.0, total_BHT1)
    return jnp.einsum("bhts,bshu->bthu", weights_BHTS, v_BSHU)


def visible(B, T, S, causal, segments_BT=None, segments_BS=None, mask_BTS=None):
    shown_BTS = np.ones((B, T, S), bool)
    if causal:
        shown_BTS &= np.tri(T, S, dtype=bool)[None]
    if segments_BT is not None:
        segments_BS = segments_BT if segments_BS is None else segments_BS
        shown_BTS &= np.equal(segments_BT[:, :, None], segments_BS[:, None, :])
        shown_BTS &= np.asarray(segments_BT > 0)[:, :, None]
    return shown_BTS if mask_BTS is None else shown_BTS & mask_BTS


def random_arrays(shape, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(a.shape), a.dtype) for a in shape.arrays())


def value_and_gradients(function, arrays):
    out = function(*arrays)
    weights = jnp.asarray(np.random.default_rng(9).standard_normal(out.shape), jnp.float32)
    return out, jax.grad(lambda *a: jnp.vdot(function(*a), weights), argnums=(0, 1, 2))(*arrays)


@jax.jit
def plain_jitted(visible_BTS, arrays):
    return value_and_gradients(functools.partial(plain, visible_BTS=visible_BTS), arrays)


def assert_same(function, arrays, visible_BTS):
    got = jax.jit(functools.partial(value_and_gradients, function))(arrays)
    want = plain_jitted(visible_BTS, arrays)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), got, want)


@pytest.mark.parametrize("name", ["one_token", "one_block", "odd_blocks", "grouped_odd_blocks"])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_plain_formula(name, causal):
    shape = SHAPES[name]
    function = functools.partial(attention, scale=SCALE, causal=causal)
    assert_same(function, random_arrays(shape), visible(shape.batch, shape.length, shape.length, causal))


def test_queries_and_keys_may_differ_in_number_without_causality():
    q, _, _ = random_arrays(SHAPES["one_block"])
    _, k, v = random_arrays(SHAPES["odd_blocks"]._replace(heads=3))
    segments_BT = jnp.asarray(np.arange(17)[None] // 6 + np.array([[0], [1]]), jnp.int32)
    segments_BS = jnp.asarray(np.arange(301)[None] // 90 + np.array([[1], [0]]), jnp.int32)
    masks = {"segments_BT": segments_BT, "segments_BS": segments_BS}
    function = functools.partial(attention, scale=SCALE, causal=False, **masks)
    assert_same(function, (q, k, v), visible(2, 17, 301, False, **masks))


@functools.cache
def segmented(T, block):
    # A small block makes the blocked path cheap enough to try many packings of the same shape.
    def run(q, k, v, segments_BT, mask_BTS):
        function = functools.partial(reference.attention, scale=SCALE, causal=True, block=block)
        return value_and_gradients(lambda *a: function(*a, segments_BT, segments_BT, mask_BTS)[0], (q, k, v))

    return jax.jit(run)


@hypothesis.settings(max_examples=20)
@hypothesis.given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    block=st.sampled_from([8, 32]),
    seed=st.integers(0, 99),
)
@hypothesis.example(lengths=[1] * 20, block=8, seed=0)  # segments of length 1
@hypothesis.example(lengths=[20], block=8, seed=0)
@hypothesis.example(lengths=[1], block=8, seed=0)  # nearly all padding
def test_any_packing_and_any_mask(lengths, block, seed):
    T, rng = 20, np.random.default_rng(seed)
    ids_T = np.repeat(np.arange(len(lengths)) + 1, lengths)[:T]
    segments_BT = np.zeros((2, T), np.int32)
    segments_BT[0, : len(ids_T)] = ids_T
    segments_BT[1, T - len(ids_T) :] = ids_T
    mask_BTS = rng.random((2, T, T)) < 0.7
    q, k, v = (jnp.asarray(rng.standard_normal((2, T, 3, d)), jnp.float32) for d in (12, 12, 8))
    got = segmented(T, block)(q, k, v, segments_BT, mask_BTS)
    shown_BTS = visible(2, T, T, True, segments_BT, None, mask_BTS)
    want = plain_jitted(shown_BTS, (q, k, v))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), got, want)
    assert not np.any(np.asarray(got[0])[~shown_BTS.any(-1)]), "a query that sees nothing must give zeros"


@pytest.mark.parametrize("block", [8, 32])
def test_custom_gradient_against_finite_differences(block):
    arrays = random_arrays(SHAPES["one_block"])
    segments_BT = jnp.asarray(np.minimum(np.arange(17)[None] // 5, 2) + np.zeros((2, 1)), jnp.int32)
    function = functools.partial(reference.attention, scale=SCALE, causal=True, block=block)

    def run(q, k, v):
        # Without the five of padding, whose lse is infinite.
        out, lse_BHT = function(q, k, v, segments_BT, segments_BT, None)
        return out, lse_BHT[:, :, 5:]

    check_grads(jax.jit(run), arrays, order=1, modes=["rev"], eps=1e-2, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["one_block", "odd_blocks"])
def test_log_sum_exp_is_that_of_the_scaled_scores(name):
    q, k, v = random_arrays(SHAPES[name])
    T = q.shape[1]
    segments_BT = jnp.asarray(np.minimum(np.arange(T)[None] // 5, 2) + np.zeros((2, 1)), jnp.int32)
    out, lse_BHT = attention(q, k, v, scale=SCALE, segments_BT=segments_BT, return_lse=True)
    shown_BTS = visible(2, T, T, True, segments_BT)
    scores_BHTS = jnp.where(shown_BTS[:, None], SCALE * jnp.einsum("bthq,bshq->bhts", q, k), -jnp.inf)
    some = np.asarray(segments_BT > 0)[:, None] & np.ones((1, q.shape[2], 1), bool)
    np.testing.assert_allclose(lse_BHT[some], jax.nn.logsumexp(scores_BHTS, -1)[some], atol=1e-5)
    assert np.all(np.isposinf(lse_BHT[~some])) and not np.any(np.asarray(out)[~shown_BTS.any(-1)])


def test_memory_of_the_gradient_grows_with_length_not_its_square():
    def bytes_at(T):
        arrays = SHAPES["one_block"]._replace(length=T).arrays()
        run = jax.grad(lambda *a: attention(*a, scale=SCALE).sum(), argnums=(0, 1, 2))
        return jax.jit(run).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    assert bytes_at(4096) < 2.2 * bytes_at(2048)


def test_key_blocks_wholly_in_the_future_are_not_visited():
    q, k, v = random_arrays(SHAPES["odd_blocks"])
    poison = jnp.arange(301)[None, :, None, None] >= 250
    out = attention(q, jnp.where(poison, jnp.nan, k), jnp.where(poison, jnp.nan, v), scale=SCALE)
    np.testing.assert_array_equal(out[:, :100], attention(q, k, v, scale=SCALE)[:, :100])


def test_saving_the_tagged_output_and_lse_avoids_recomputing_the_forward():
    arrays = SHAPES["odd_blocks"].arrays()

    def products(policy):
        step = jax.checkpoint(lambda *a: attention(*a, scale=SCALE), policy=policy)
        jaxpr = jax.make_jaxpr(jax.grad(lambda *a: step(*a).sum(), argnums=(0, 1, 2)))(*arrays)
        return str(jaxpr).count("dot_general")

    names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    recomputed = products(names), products(jax.checkpoint_policies.nothing_saveable)
    assert recomputed[1] - recomputed[0] == 2  # scores, and weights times values


def test_bfloat16_stays_near_float32_and_keeps_its_dtype():
    arrays = random_arrays(SHAPES["odd_blocks"])
    halves = [a.astype(jnp.bfloat16) for a in arrays]
    run = jax.jit(functools.partial(attention, scale=SCALE))
    out = run(*halves)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), run(*arrays), atol=0.05)


@pytest.mark.parametrize("name", ["cpu_100m", "v3_train", "v3"])
def test_full_size_shapes_trace(name):
    q, k, v = SHAPES[name].arrays(jnp.bfloat16)
    out = jax.eval_shape(functools.partial(attention, scale=SCALE), q, k, v)
    assert (out.shape, out.dtype) == (v.shape, v.dtype)


def test_shapes_that_disagree_are_refused_with_both():
    q, k, v = random_arrays(SHAPES["one_block"])
    with pytest.raises(ValueError, match=r"k \(2, 17, 3, 8\) \(B S G Q\).*disagree"):
        attention(q, v, v, scale=SCALE)
    with pytest.raises(ValueError, match="as many queries as keys, got 5 and 17"):
        attention(q[:, :5], k, v, scale=SCALE)
    with pytest.raises(ValueError, match=r"segments_BT has shape \(2, 16\), expected \(2, 17\)"):
        attention(q, k, v, scale=SCALE, segments_BT=jnp.ones((2, 16), jnp.int32))
    with pytest.raises(ValueError, match="segments_BS is needed"):
        attention(q[:, :5], k, v, scale=SCALE, causal=False, segments_BT=jnp.ones((2, 5), jnp.int32))
    with pytest.raises(ValueError, match="3 query heads are no multiple of 2 key and value heads"):
        attention(q, k[:, :, :2], v[:, :, :2], scale=SCALE)
    with pytest.raises(ValueError, match="no implementation 'flash'"):
        attention(q, k, v, scale=SCALE, implementation="flash")
