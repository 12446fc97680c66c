"""Latent attention over the cache: the formula, exact invariance, cost by live length, writes in place."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsv3_jax.kernels.mla_decode import latent_attention, reference, write_cache
from dsv3_jax.kernels.mla_decode.shapes import SHAPES

BLOCK = 32
run = jax.jit(functools.partial(latent_attention, value_dim=16, scale=0.3, block=BLOCK))


@pytest.fixture(autouse=True, scope="module")
def tiles_of_128_rows():
    """Tiles of 16 tokens at 8 heads, so that "chunk" has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "QUERY_ROWS", 128)
        yield


def random_case(name, seed=0):
    shape, rng = SHAPES[name], np.random.default_rng(seed)
    q, cache, _ = (jnp.asarray(rng.standard_normal(a.shape), jnp.float32) for a in shape.arrays())
    first_B = rng.integers(0, shape.slots - shape.tokens, shape.batch)
    return q, cache, jnp.asarray(first_B[:, None] + np.arange(shape.tokens), jnp.int32)


def plain(q_BTHJ, keys_BSJ, positions_BT, value_dim=16, scale=0.3, mask_BTS=None):
    shown_BTS = np.arange(keys_BSJ.shape[1])[None, None] <= np.asarray(positions_BT)[:, :, None]
    if mask_BTS is not None:
        shown_BTS &= mask_BTS
    scores_BTHS = np.einsum("bthj,bsj->bths", np.asarray(q_BTHJ, float), keys_BSJ) * scale
    weights_BTHS = np.exp(scores_BTHS) * shown_BTS[:, :, None]
    total_BTH1 = weights_BTHS.sum(-1, keepdims=True)
    weights_BTHS /= np.where(total_BTH1 == 0, 1.0, total_BTH1)
    return np.einsum("bths,bsc->bthc", weights_BTHS, np.asarray(keys_BSJ, float)[..., :value_dim])


@pytest.mark.parametrize("name", ["decode", "draft", "chunk"])
def test_equals_the_plain_formula(name):
    q, cache, positions_BT = random_case(name)
    for layer in (0, 2):
        got = run(q, cache, layer, positions_BT)
        np.testing.assert_allclose(got, plain(q, cache[layer], positions_BT), atol=2e-6)


@pytest.mark.parametrize("name", ["draft", "chunk"])
def test_mask_hides_slots_on_top_of_positions(name):
    q, cache, positions_BT = random_case(name)
    mask_BTS = np.random.default_rng(1).random((*positions_BT.shape, cache.shape[2])) < 0.4
    mask_BTS[0, 0] = False  # a query whose selection is empty gives zeros
    got = np.asarray(run(q, cache, 1, positions_BT, mask_BTS=mask_BTS))
    np.testing.assert_allclose(got, plain(q, cache[1], positions_BT, mask_BTS=mask_BTS), atol=2e-6)
    assert not got[0, 0].any()


def test_padding_queries_give_zeros():
    q, cache, positions_BT = random_case("draft")
    positions_BT = positions_BT.at[0].set(-1).at[1, 2].set(-1)
    got = np.asarray(run(q, cache, 1, positions_BT))
    assert not got[0].any() and not got[1, 2].any()
    np.testing.assert_allclose(got, plain(q, cache[1], positions_BT), atol=2e-6)
    assert not np.asarray(run(q, cache, 1, jnp.full_like(positions_BT, -1))).any()


@pytest.mark.parametrize("name", ["decode", "draft", "chunk"])
def test_a_row_is_bitwise_independent_of_cache_length_and_of_other_rows(name):
    q, cache, positions_BT = random_case(name)
    want = np.asarray(run(q, cache, 1, positions_BT))
    other_q, other_cache, other_positions_BT = random_case(name, seed=1)
    longer = np.zeros((*cache.shape[:2], cache.shape[2] + 5 * BLOCK, cache.shape[3]), np.float32)
    longer[:, :, : cache.shape[2]] = cache
    for b in range(len(q)):
        alone = np.asarray(run(q[b : b + 1], cache[:, b : b + 1], 1, positions_BT[b : b + 1]))
        np.testing.assert_array_equal(alone[0], want[b])
        others = np.asarray(
            run(
                other_q.at[b].set(q[b]),
                jnp.asarray(longer).at[:, :b, : cache.shape[2]].set(other_cache[:, :b]),
                1,
                (other_positions_BT + 4 * BLOCK).at[b].set(positions_BT[b]),
            )
        )
        np.testing.assert_array_equal(others[b], want[b])


def test_slots_beyond_the_live_blocks_of_a_row_are_not_read():
    q, cache, _ = random_case("decode")
    positions_BT = jnp.full((4, 1), BLOCK - 1, jnp.int32).at[3].set(95)
    poisoned = cache.at[:, :3, BLOCK:].set(jnp.nan)
    np.testing.assert_array_equal(run(q, poisoned, 1, positions_BT), run(q, cache, 1, positions_BT))


def test_bfloat16_queries_and_a_float32_cache():
    q, cache, positions_BT = random_case("decode")
    got = run(q.astype(jnp.bfloat16), cache, 1, positions_BT)
    assert got.dtype == jnp.bfloat16
    want = plain(q.astype(jnp.bfloat16).astype(jnp.float32), cache[1], positions_BT)
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.01)


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    first=st.lists(st.integers(-1, 95), min_size=4, max_size=4),
    live=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    layer=st.integers(0, 2),
)
@hypothesis.example(first=[93, 0, 95, 50], live=[3, 0, 1, 3], layer=2)
def test_writes_the_live_tokens_and_nothing_else(first, live, layer):
    q, cache, _ = random_case("draft")
    new_BTJ = q[:, :, 0]
    positions_BT = np.array(first)[:, None] + np.arange(3)
    positions_BT = np.where(
        (np.array(first)[:, None] >= 0) & (np.arange(3) < np.array(live)[:, None]), positions_BT, -1
    )
    want = np.array(cache)
    for b, t in np.argwhere((positions_BT >= 0) & (positions_BT < 96)):
        want[layer, b, positions_BT[b, t]] = new_BTJ[b, t]
    np.testing.assert_array_equal(jitted_write(cache, layer, new_BTJ, jnp.asarray(positions_BT)), want)


jitted_write = jax.jit(write_cache)


@pytest.mark.parametrize("T", [1, 4])
def test_a_scan_that_carries_the_donated_cache_makes_no_copy_of_it(T):
    def layers(cache_LBSJ, q_BTHJ, positions_BT):
        def layer(carry, index):
            cache_LBSJ, q_BTHJ = carry
            cache_LBSJ = write_cache(cache_LBSJ, index, q_BTHJ[:, :, 0], positions_BT)
            out_BTHC = latent_attention(q_BTHJ, cache_LBSJ, index, positions_BT, value_dim=16, scale=0.3)
            return (cache_LBSJ, q_BTHJ.at[..., :16].add(out_BTHC)), None

        return lax.scan(layer, (cache_LBSJ, q_BTHJ), jnp.arange(len(cache_LBSJ)))[0]

    def temporaries(S):
        q, cache, positions = SHAPES["decode"]._replace(tokens=T, slots=S).arrays()
        compiled = jax.jit(layers, donate_argnums=0).lower(cache, q, positions).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8192) == temporaries(512)


@pytest.mark.parametrize("name", ["cpu_100m", "v3_16_heads", "v3"])
def test_full_size_shapes_trace(name):
    shape = SHAPES[name]
    q, cache, positions = shape.arrays(jnp.bfloat16)
    function = functools.partial(latent_attention, value_dim=shape.latent, scale=0.1)
    out = jax.eval_shape(function, q, cache, 0, positions)
    assert out.shape == (*q.shape[:3], shape.latent)


def test_shapes_that_disagree_are_refused():
    q, cache, positions_BT = random_case("decode")
    with pytest.raises(ValueError, match="cache length 96 is not a multiple of the block of 256"):
        latent_attention(q, cache, 0, positions_BT, value_dim=16, scale=1.0)
    with pytest.raises(ValueError, match=r"\(B T H J\) and cache .* disagree"):
        latent_attention(q[:2], cache, 0, positions_BT, value_dim=16, scale=1.0, block=BLOCK)
    with pytest.raises(ValueError, match="value_dim 25 is not within the cache's 24 columns"):
        latent_attention(q, cache, 0, positions_BT, value_dim=25, scale=1.0, block=BLOCK)
    with pytest.raises(ValueError, match=r"mask has shape \(4, 1, 95\), expected \(4, 1, 96\)"):
        mask_BTS = jnp.ones((4, 1, 95), bool)
        latent_attention(q, cache, 0, positions_BT, value_dim=16, scale=1.0, block=BLOCK, mask_BTS=mask_BTS)
    with pytest.raises(ValueError, match="do not fit the cache"):
        write_cache(cache, 0, q[:, :, 0, :5], positions_BT)
    with pytest.raises(ValueError, match="no implementation 'paged'"):
        write_cache(cache, 0, q[:, :, 0], positions_BT, implementation="paged")
