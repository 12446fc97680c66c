"""Latent attention over pages: the contiguous result to the bit, whatever the pages, tables and neighbours."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsv3_jax.kernels.mla_decode import (
    latent_attention,
    paged_index_scores,
    paged_latent_attention,
    paged_reference,
    reference,
    write_pages,
)
from dsv3_jax.kernels.mla_decode.shapes import PAGED_SHAPES

BLOCK = 32  # two pages of 16
VALUES = dict(value_dim=16, scale=0.3)
run = jax.jit(functools.partial(paged_latent_attention, **VALUES, block=BLOCK))
together = jax.jit(
    functools.partial(
        paged_reference.latent_attention, **VALUES, block=BLOCK, mask_BTS=None, rows_together=True
    )
)
contiguous = jax.jit(functools.partial(latent_attention, **VALUES, block=BLOCK))
jitted_write = jax.jit(write_pages)


@pytest.fixture(autouse=True, scope="module")
def tiles_of_128_rows():
    """Tiles of 16 tokens at 8 heads, so that "chunk" has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "QUERY_ROWS", 128)
        yield


def random_case(name, seed=0):
    """Random queries, latents in one piece, the same latents in shuffled pages (NaN in the rest), positions."""
    shape, rng = PAGED_SHAPES[name], np.random.default_rng(seed)
    q_BTHJ, pages_NPJ, tables_BM, _ = (
        rng.standard_normal(a.shape).astype(np.float32) for a in shape.arrays()
    )
    B, M = tables_BM.shape
    N, P, J = pages_NPJ.shape
    cache_BSJ = rng.standard_normal((B, M * P, J)).astype(np.float32)
    tables_BM = rng.permutation(N)[: B * M].reshape(B, M).astype(np.int32)
    pages_NPJ[:] = np.nan
    pages_NPJ[tables_BM] = cache_BSJ.reshape(B, M, P, J)
    first_B = rng.integers(0, M * P - shape.tokens, B)
    positions_BT = (first_B[:, None] + np.arange(shape.tokens)).astype(np.int32)
    return q_BTHJ, cache_BSJ, pages_NPJ, tables_BM, positions_BT


@pytest.mark.parametrize("name", ["decode", "draft", "chunk"])
def test_bitwise_equal_to_the_cache_in_one_piece(name):
    q, cache, pages, tables, positions = random_case(name)
    want = contiguous(q, cache[None], 0, positions)
    np.testing.assert_array_equal(run(q, pages, tables, positions), want)


@pytest.mark.parametrize("name", ["decode", "chunk"])
def test_blocks_of_one_page_and_rows_side_by_side_give_the_same(name):
    q, cache, pages, tables, positions = random_case(name)
    want = contiguous(q, cache[None], 0, positions)
    one_page = jax.jit(functools.partial(paged_latent_attention, **VALUES, block=1))(
        q, pages, tables, positions
    )
    np.testing.assert_allclose(one_page, want, atol=1e-5)
    np.testing.assert_allclose(together(q, pages, tables, positions), want, atol=1e-5)


@pytest.mark.parametrize("name", ["draft", "chunk"])
def test_mask_hides_slots_on_top_of_positions(name):
    q, cache, pages, tables, positions = random_case(name)
    mask_BTS = np.random.default_rng(1).random((*positions.shape, cache.shape[1])) < 0.4
    mask_BTS[0, 0] = False  # a query whose selection is empty gives zeros
    got = np.asarray(run(q, pages, tables, positions, mask_BTS=mask_BTS))
    want = contiguous(q, cache[None], 0, positions, mask_BTS=mask_BTS)
    np.testing.assert_array_equal(got, want)
    assert not got[0, 0].any() and got[0, 1].any()


def test_a_mask_for_an_odd_number_of_pages():
    q, cache, pages, tables, positions = random_case("decode")
    cut = slice(0, 5 * 16)  # five pages, blocks of two
    positions = np.minimum(positions, 79)
    mask_BTS = np.random.default_rng(1).random((4, 1, 96)) < 0.5
    got = run(q, pages, tables[:, :5], positions, mask_BTS=mask_BTS[:, :, cut])
    np.testing.assert_array_equal(got, run(q, pages, tables, positions, mask_BTS=mask_BTS))


@pytest.mark.parametrize("name", ["decode", "draft", "chunk"])
def test_a_row_is_bitwise_independent_of_neighbours_place_table_width_and_pages(name):
    q, _, pages, tables, positions = random_case(name)
    want = np.asarray(run(q, pages, tables, positions))
    other_q, _, other_pages, other_tables, other_positions = random_case(name, seed=1)
    for b in range(len(q)):
        place = (b + 1) % len(q)
        live = positions[b].max() // 16 + 1
        moved, wide = other_pages.copy(), np.zeros((len(q), 11), np.int32)
        wide[:, :6] = other_tables
        wide[place] = np.setdiff1d(np.arange(len(moved)), other_tables)[
            0
        ]  # dead entries: any valid id, here NaN
        wide[place, :live] = other_tables[place, ::-1][:live]
        moved[wide[place, :live]] = pages[tables[b, :live]]
        queries, where = other_q.copy(), other_positions.copy()
        queries[place], where[place] = q[b], positions[b]
        np.testing.assert_array_equal(run(queries, moved, wide, where)[place], want[b])
        alone = run(q[b : b + 1], pages, tables[b : b + 1], positions[b : b + 1])
        np.testing.assert_array_equal(alone[0], want[b])


def test_what_lies_behind_a_rows_last_slot_does_not_leak():
    q, _, pages, tables, positions = random_case("draft")
    want = run(q, pages, tables, positions)
    poisoned = pages.copy()
    for b, last in enumerate(positions.max(1)):
        poisoned[tables[b, last // 16], last % 16 + 1 :] = np.nan
        poisoned[tables[b, last // 16 + 1 :]] = np.nan
    np.testing.assert_array_equal(run(q, poisoned, tables, positions), want)
    np.testing.assert_array_equal(
        together(q, poisoned, tables, positions), together(q, pages, tables, positions)
    )


def test_tiles_of_one_sequence_in_several_rows_equal_the_sequence_in_one():
    q, _, pages, tables, _ = random_case("chunk")  # T = 50 in tiles of 16 tokens
    positions = np.stack([np.arange(20, 70), np.full(50, -1)]).astype(np.int32)
    want = np.asarray(run(q, pages, tables, positions))
    tile = reference.QUERY_ROWS // 8
    queries, where = np.zeros((4, tile, *q.shape[2:]), np.float32), np.full((4, tile), -1, np.int32)
    for i in range(4):
        part = q[0, i * tile : (i + 1) * tile]
        queries[i, : len(part)], where[i, : len(part)] = part, positions[0, i * tile : (i + 1) * tile]
    order = [2, 0, 3, 1]
    got = np.asarray(run(queries[order], pages, np.repeat(tables[:1], 4, 0), where[order]))
    got = got[np.argsort(order)].reshape(4 * tile, *got.shape[2:])[:50]
    np.testing.assert_array_equal(got, want[0])
    # The same tokens cut elsewhere: the first tile starts eight tokens late.
    shifted = run(q[:1, 8 : 8 + tile], pages, tables[:1], positions[:1, 8 : 8 + tile])
    np.testing.assert_array_equal(shifted[0], want[0, 8 : 8 + tile])


def test_padding_queries_give_zeros():
    q, cache, pages, tables, positions = random_case("draft")
    positions[0], positions[1, 2] = -1, -1
    for function in (run, together):
        got = np.asarray(function(q, pages, tables, positions))
        assert not got[0].any() and not got[1, 2].any() and got[1, 1].any()
        np.testing.assert_allclose(got, contiguous(q, cache[None], 0, positions), atol=1e-5)
        assert not np.asarray(function(q, pages, tables, np.full_like(positions, -1))).any()


def test_bfloat16_queries_and_pages():
    q, cache, pages, tables, positions = random_case("decode")
    q, cache, pages = (jnp.asarray(x, jnp.bfloat16) for x in (q, cache, pages))
    got = run(q, pages, tables, positions)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, contiguous(q, cache[None], 0, positions))


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    first=st.lists(st.integers(-1, 95), min_size=4, max_size=4),
    live=st.lists(st.integers(0, 3), min_size=4, max_size=4),
)
@hypothesis.example(first=[93, 0, 95, 50], live=[3, 0, 3, 3])
def test_writes_the_live_tokens_and_nothing_else(first, live):
    q, _, pages, tables, _ = random_case("draft")
    pages, new_BTJ = np.nan_to_num(pages), q[:, :, 0]
    positions = np.array(first)[:, None] + np.arange(3)
    positions = np.where(
        (np.array(first)[:, None] >= 0) & (np.arange(3) < np.array(live)[:, None]), positions, -1
    )
    want = pages.copy()
    for b, t in np.argwhere((positions >= 0) & (positions < 96)):
        slot = positions[b, t]
        want[tables[b, slot // 16], slot % 16] = new_BTJ[b, t]
    np.testing.assert_array_equal(jitted_write(pages, new_BTJ, tables, positions.astype(np.int32)), want)


@pytest.mark.parametrize("T", [1, 4])
def test_a_scan_that_carries_the_donated_pages_makes_no_copy_of_them(T):
    def layers(pages_NPJ, q_BTHJ, tables_BM, positions_BT):
        def layer(carry, index):
            pages_NPJ, q_BTHJ = carry
            tables = tables_BM + index * (len(pages_NPJ) // 3)
            pages_NPJ = write_pages(pages_NPJ, q_BTHJ[:, :, 0], tables, positions_BT)
            out_BTHC = paged_latent_attention(q_BTHJ, pages_NPJ, tables, positions_BT, **VALUES)
            return (pages_NPJ, q_BTHJ.at[..., :16].add(out_BTHC)), None

        return lax.scan(layer, (pages_NPJ, q_BTHJ), jnp.arange(3))[0]

    def temporaries(pages, table):
        shape = PAGED_SHAPES["decode"]._replace(tokens=T, pages=3 * pages, table=table)
        q, pages, tables, positions = shape.arrays()
        compiled = jax.jit(layers, donate_argnums=0).lower(pages, q, tables, positions).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(100, 25), temporaries(4000, 1000)
    assert large - small <= 4 * 4 * 975  # the tables' own growth


def test_index_scores_equal_the_plain_formula_and_read_no_dead_page():
    _, cache, pages, tables, positions = random_case("draft")
    positions[1, 2] = -1
    rng = np.random.default_rng(2)
    q = rng.standard_normal((4, 3, 5, 24)).astype(np.float32)
    weights = rng.standard_normal((4, 3, 5)).astype(np.float32)
    for b, last in enumerate(positions.max(1)):
        pages[tables[b, last // 16], last % 16 + 1 :] = np.nan
        pages[tables[b, last // 16 + 1 :]] = np.nan
    got = jax.jit(functools.partial(paged_index_scores, block=BLOCK))(q, weights, pages, tables, positions)
    heads = np.maximum(np.einsum("btyz,bsz->btys", q.astype(float), cache) * 24**-0.5, 0)
    want = np.einsum("btys,bty->bts", heads, weights)
    want[np.arange(96)[None, None] > positions[:, :, None]] = -np.inf
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cpu_100m", "v3_16_heads", "v3", "v3_draft", "v3_batch_1"])
def test_full_size_shapes_trace(name):
    shape = PAGED_SHAPES[name]
    q, *rest = shape.arrays(jnp.bfloat16)
    function = functools.partial(paged_latent_attention, value_dim=shape.latent, scale=0.1)
    assert jax.eval_shape(function, q, *rest).shape == (*q.shape[:3], shape.latent)


def test_shapes_that_disagree_are_refused():
    q, _, pages, tables, positions = random_case("decode")
    with pytest.raises(ValueError, match=r"pages \(40, 16, 23\) \(N P J\) do not hold vectors of 24 columns"):
        paged_latent_attention(q, pages[..., :23], tables, positions, **VALUES)
    with pytest.raises(ValueError, match=r"tables have shape \(3, 6\), expected \(4, pages of a row\)"):
        paged_latent_attention(q, pages, tables[:3], positions, **VALUES)
    with pytest.raises(ValueError, match=r"positions have shape \(3, 1\), expected \(4, 1\)"):
        write_pages(pages, q[:, :, 0], tables, positions[:3])
    with pytest.raises(ValueError, match="value_dim 25 is not within the pages' 24 columns"):
        paged_latent_attention(q, pages, tables, positions, value_dim=25, scale=1.0)
    with pytest.raises(ValueError, match=r"mask has shape \(4, 1, 95\), expected \(4, 1, 96\): 6 pages"):
        paged_latent_attention(q, pages, tables, positions, **VALUES, mask_BTS=jnp.ones((4, 1, 95), bool))
    with pytest.raises(ValueError, match="no implementation 'contiguous'"):
        paged_latent_attention(q, pages, tables, positions, **VALUES, implementation="contiguous")
    with pytest.raises(ValueError, match=r"index weights have shape \(4, 1, 3\), expected \(4, 1, 4\)"):
        paged_index_scores(q, q[..., :3, 0], pages, tables, positions)
