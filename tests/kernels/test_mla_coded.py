"""Pages of 8-bit codes: the error of one rounding, nothing leaks, nothing is copied."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsv3_jax.errors import ConfigError
from dsv3_jax.kernels import registry
from dsv3_jax.kernels.mla_decode import (
    CodedPages,
    make_coded_pages,
    paged_index_scores,
    paged_latent_attention,
    pallas_gpu,
    write_pages,
)
from dsv3_jax.kernels.mla_decode.coded_pages import dequantize, quantize
from dsv3_jax.kernels.mla_decode.paged import PAGED_LATENT_ATTENTION
from dsv3_jax.kernels.shim import Target

C, R = 160, 8  # two blocks of scales, the second one partial
VALUES = dict(value_dim=C, scale=0.1)
LENGTHS = (48, 17, 33)
run = jax.jit(functools.partial(paged_latent_attention, **VALUES, block=32))
write = jax.jit(write_pages)


@pytest.fixture(scope="module", params=["int8", "fp8"])
def written(request):
    """Queries, latents [B, S, J], the same in pages of 16, tables, positions of the last two tokens."""
    rng = np.random.default_rng(0)
    latent_BSJ = rng.standard_normal((3, 48, C + R)).astype(np.float32)
    latent_BSJ[1, 5] *= 100  # of another magnitude than its neighbours
    latent_BSJ[2, 7, :C] = 0
    latent_BSJ[0, 3, 128:] *= 1e-3  # as is one block of a slot
    tables_BM = rng.permutation(9).reshape(3, 3).astype(np.int32)
    lengths_B1 = np.array(LENGTHS)[:, None]
    slots_BS = np.broadcast_to(np.arange(48), (3, 48))
    positions = np.where(slots_BS < lengths_B1, slots_BS, -1).astype(np.int32)
    pages = write(make_coded_pages(9, 16, C, request.param, exact=R), latent_BSJ, tables_BM, positions)
    q_BTHJ = rng.standard_normal((3, 2, 4, C + R)).astype(np.float32)
    return q_BTHJ, latent_BSJ, pages, tables_BM, (lengths_B1 - 2 + np.arange(2)).astype(np.int32)


@pytest.fixture
def on_hopper(monkeypatch):
    """The registry chooses as it would there."""
    monkeypatch.setattr(registry, "target", lambda: Target("gpu", "H200", 132))
    able = dataclasses.replace(PAGED_LATENT_ATTENTION["mosaic"], missing=None)
    monkeypatch.setitem(PAGED_LATENT_ATTENTION, "mosaic", able)
    registry._log_choice.cache_clear()


def plain(pages: CodedPages) -> np.ndarray:
    """What the pages stand for, [N, P, J]."""
    values = np.asarray(dequantize(pages.codes_NPC, pages.scales_NPG))
    return values if pages.exact_NPR is None else np.concatenate([values, pages.exact_NPR], axis=-1)


def test_a_code_is_off_by_at_most_half_a_step_of_its_block(written):
    _, latent_BSJ, pages, tables_BM, _ = written
    got_BSJ = plain(pages)[tables_BM].reshape(3, 48, C + R)
    for b, length in enumerate(LENGTHS):
        for columns in (slice(0, 128), slice(128, C)):
            got, want = (x[b, :length, columns] for x in (got_BSJ, latent_BSJ))
            most = np.abs(want).max(-1, keepdims=True)
            # int8: half of 1 / 127 of the largest. e4m3: half of 1 / 8 of the number, or of the smallest step.
            int8 = pages.kind == "int8"
            bound = most / 254 if int8 else np.maximum(np.abs(want) / 16, most / 448 * 2.0**-10)
            assert (np.abs(got - want) <= 1.001 * bound).all()
            assert (np.abs(got - want) > 0).mean() > 0.8, "numbers were rounded"
        np.testing.assert_array_equal(got_BSJ[b, :length, C:], latent_BSJ[b, :length, C:])
    assert not got_BSJ[2, 7, :C].any()


def test_what_a_slot_holds_does_not_depend_on_what_is_written_beside_it(written):
    _, latent_BSJ, pages, tables_BM, _ = written
    one = make_coded_pages(9, 16, C, pages.kind, exact=R)
    for slot in (0, 5, 16):
        at = np.full((3, 1), slot, np.int32)
        one = write(one, latent_BSJ[:, slot : slot + 1], tables_BM, at)
        for alone, together in zip(jax.tree.leaves(one), jax.tree.leaves(pages), strict=True):
            place = tables_BM[:, slot // 16], slot % 16
            np.testing.assert_array_equal(np.asarray(alone)[place], np.asarray(together)[place])


def test_attention_is_that_over_the_dequantised_pages(written):
    q, _, pages, tables_BM, positions = written
    np.testing.assert_allclose(
        run(q, pages, tables_BM, positions), run(q, plain(pages), tables_BM, positions), rtol=1e-5, atol=1e-6
    )


def test_rows_side_by_side_give_what_rows_in_turn_do(written, on_hopper):
    q, _, pages, tables_BM, positions = written
    got = paged_latent_attention(q, pages, tables_BM, positions, **VALUES, block=32, implementation="batched")
    np.testing.assert_allclose(got, run(q, pages, tables_BM, positions), rtol=1e-5, atol=1e-6)


def test_the_rounding_costs_little(written):
    q, latent_BSJ, pages, tables_BM, positions = written
    slots = np.tile(np.arange(48, dtype=np.int32), (3, 1))
    exact = write(jnp.zeros(pages.shape), latent_BSJ, tables_BM, slots)
    got, want = (np.asarray(run(q, p, tables_BM, positions)) for p in (pages, exact))
    bound = 0.02 if pages.kind == "int8" else 0.1
    for b in (0, 2):  # row 1 holds a vector a hundred times as large, which decides there
        assert 0 < np.abs(got - want)[b].max() < bound * np.abs(want)[b].max()


def test_nan_in_dead_slots_does_not_leak(written):
    q, _, pages, tables_BM, positions = written
    scales, exact = np.array(pages.scales_NPG), np.array(pages.exact_NPR)
    for part in (scales, exact):
        part[tables_BM[1, 1], 1:] = np.nan  # row 1 has 17 slots
        part[tables_BM[1, 2]] = np.nan
    poisoned = CodedPages(pages.codes_NPC, jnp.asarray(scales), jnp.asarray(exact))
    np.testing.assert_array_equal(run(q, poisoned, tables_BM, positions), run(q, pages, tables_BM, positions))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_block_that_is_not_finite_stays_so_and_no_other_is_touched(kind, bad):
    x = np.ones((1, 2, 256), np.float32)
    x[0, 1, 130] = bad
    values = np.asarray(dequantize(*quantize(jnp.asarray(x), kind)))
    assert not np.isfinite(values[0, 1, 128:]).any()
    np.testing.assert_allclose(values[0, 0], 1.0, rtol=1e-6)
    np.testing.assert_allclose(values[0, 1, :128], 1.0, rtol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_index_scores_are_those_of_the_dequantised_keys(kind):
    rng = np.random.default_rng(1)
    keys_BSZ = rng.standard_normal((2, 32, 16)).astype(np.float32)
    tables, slots = np.array([[3, 1], [0, 2]], np.int32), np.tile(np.arange(32, dtype=np.int32), (2, 1))
    pages = write(make_coded_pages(4, 16, 16, kind), keys_BSZ, tables, slots)
    q, weights = (rng.standard_normal(n).astype(np.float32) for n in ((2, 1, 4, 16), (2, 1, 4)))
    exact = write(jnp.zeros((4, 16, 16)), keys_BSZ, tables, slots)

    def scores(p):
        found = paged_index_scores(q, weights, p, tables, np.array([[20], [31]], np.int32))
        return np.where(np.isfinite(found), found, 0)

    np.testing.assert_allclose(scores(pages), scores(jnp.asarray(plain(pages))), rtol=1e-5, atol=1e-6)
    assert 0 < np.abs(scores(pages) - scores(exact)).max() < 0.1 * np.abs(scores(exact)).max()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_scan_that_carries_the_donated_pages_makes_no_copy_of_them(kind):
    def layers(pages, q_BTHJ, tables_BM, positions_BT):
        def layer(carry, index):
            pages, q_BTHJ = carry
            tables = tables_BM + index * (pages.shape[0] // 3)
            pages = write_pages(pages, q_BTHJ[:, :, 0], tables, positions_BT)
            out_BTHC = paged_latent_attention(q_BTHJ, pages, tables, positions_BT, **VALUES)
            return (pages, q_BTHJ.at[..., :C].add(out_BTHC)), None

        return lax.scan(layer, (pages, q_BTHJ), jnp.arange(3))[0]

    def temporaries(count):
        pages = jax.eval_shape(lambda: make_coded_pages(3 * count, 16, C, kind, exact=R))
        abstract = jax.ShapeDtypeStruct
        rest = (
            abstract((4, 1, 4, C + R), jnp.float32),
            abstract((4, 9), jnp.int32),
            abstract((4, 1), jnp.int32),
        )
        compiled = jax.jit(layers, donate_argnums=0).lower(pages, *rest).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(4000) == temporaries(100)


def test_the_gpu_kernel_refuses_them_and_auto_says_so(written, on_hopper, caplog):
    q, _, pages, tables_BM, positions = written
    pages = CodedPages(pages.codes_NPC, pages.scales_NPG, pages.exact_NPR.astype(jnp.bfloat16))
    arguments = (jnp.asarray(q, jnp.bfloat16), pages, tables_BM, positions)
    reason = f"pages hold {pages.kind} codes, it takes bfloat16"
    assert pallas_gpu.refuses(*arguments, **VALUES, mask_BTS=None, block=64) == reason
    with caplog.at_level("INFO", "dsv3_jax.kernels.registry"):
        jax.eval_shape(functools.partial(paged_latent_attention, **VALUES), *arguments)
    assert f"implementation 'batched' on platform gpu (H200); not 'mosaic': {reason}" in caplog.text
    with pytest.raises(ConfigError, match=f"'mosaic' cannot run: {reason}"):
        paged_latent_attention(*arguments, **VALUES, implementation="mosaic")
