"""Pages of 8-bit integers: the error of one rounding a slot, nothing leaks, nothing is copied."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsv3_jax.kernels.mla_decode import (
    Int8Pages,
    make_int8_pages,
    paged_latent_attention,
    pallas_gpu,
    write_pages,
)
from dsv3_jax.kernels.mla_decode.int8_pages import quantize

VALUES = dict(value_dim=16, scale=0.3)
run = jax.jit(functools.partial(paged_latent_attention, **VALUES, block=32))
write = jax.jit(write_pages)


@pytest.fixture(scope="module")
def written():
    """Queries, latents [B, S, J], the same written to pages of 16, tables, positions of the last two tokens."""
    rng = np.random.default_rng(0)
    latent_BSJ = rng.standard_normal((3, 48, 24)).astype(np.float32)
    latent_BSJ[1, 5] *= 100  # a slot of another magnitude has its own scale
    latent_BSJ[2, 7] = 0
    tables_BM = rng.permutation(9).reshape(3, 3).astype(np.int32)
    lengths_B1 = np.array([[48], [17], [33]])
    slots_BS = np.broadcast_to(np.arange(48), (3, 48))
    positions = np.where(slots_BS < lengths_B1, slots_BS, -1).astype(np.int32)
    pages = write(make_int8_pages(9, 16, 24), latent_BSJ, tables_BM, positions)
    q_BTHJ = rng.standard_normal((3, 2, 4, 24)).astype(np.float32)
    return q_BTHJ, latent_BSJ, pages, tables_BM, (lengths_B1 - 2 + np.arange(2)).astype(np.int32)


def test_a_slot_is_off_by_at_most_half_its_own_step(written):
    _, latent_BSJ, pages, tables_BM, _ = written
    got = pages.codes_NPJ.astype(jnp.float32) * pages.scales_NP[..., None]
    got_BSJ = np.asarray(got)[tables_BM].reshape(3, 48, 24)
    step_BS = np.abs(latent_BSJ).max(-1) / 127
    for b, length in enumerate((48, 17, 33)):
        error_S = np.abs(got_BSJ - latent_BSJ).max(-1)[b, :length]
        assert (error_S <= 0.5001 * step_BS[b, :length]).all()
    assert not got_BSJ[2, 7].any() and (np.abs(pages.codes_NPJ) <= 127).all()


def test_attention_is_that_over_the_dequantised_pages(written):
    q, _, pages, tables_BM, positions = written
    plain = pages.codes_NPJ.astype(jnp.float32) * pages.scales_NP[..., None]
    np.testing.assert_allclose(
        run(q, pages, tables_BM, positions), run(q, plain, tables_BM, positions), rtol=1e-5, atol=1e-6
    )


def test_the_rounding_costs_little(written):
    q, latent_BSJ, pages, tables_BM, positions = written
    exact = write(
        jnp.zeros(pages.shape), latent_BSJ, tables_BM, np.tile(np.arange(48, dtype=np.int32), (3, 1))
    )
    got, want = (np.asarray(run(q, p, tables_BM, positions)) for p in (pages, exact))
    # Row 1 holds a vector a hundred times as large, whose step decides there; elsewhere steps are 2.5 / 127.
    for b in (0, 2):
        assert 0 < np.abs(got - want)[b].max() < 0.02 * np.abs(want)[b].max()


def test_nan_in_dead_slots_does_not_leak(written):
    q, _, pages, tables_BM, positions = written
    scales = np.array(pages.scales_NP)
    scales[tables_BM[1, 1], 1:] = np.nan  # row 1 has 17 slots
    scales[tables_BM[1, 2]] = np.nan
    poisoned = Int8Pages(pages.codes_NPJ, jnp.asarray(scales))
    np.testing.assert_array_equal(run(q, poisoned, tables_BM, positions), run(q, pages, tables_BM, positions))


def test_a_nan_token_stays_nan():
    _, scale = quantize(jnp.asarray([[[1.0, jnp.nan]]]))
    assert np.isnan(scale).all()


def test_a_scan_that_carries_the_donated_pages_makes_no_copy_of_them():
    def layers(pages, q_BTHJ, tables_BM, positions_BT):
        def layer(carry, index):
            pages, q_BTHJ = carry
            tables = tables_BM + index * (pages.shape[0] // 3)
            pages = write_pages(pages, q_BTHJ[:, :, 0], tables, positions_BT)
            out_BTHC = paged_latent_attention(q_BTHJ, pages, tables, positions_BT, **VALUES)
            return (pages, q_BTHJ.at[..., :16].add(out_BTHC)), None

        return lax.scan(layer, (pages, q_BTHJ), jnp.arange(3))[0]

    def temporaries(count):
        pages = jax.eval_shape(functools.partial(make_int8_pages, 3 * count, 16, 24))
        abstract = jax.ShapeDtypeStruct
        rest = abstract((4, 1, 4, 24), jnp.float32), abstract((4, 9), jnp.int32), abstract((4, 1), jnp.int32)
        compiled = jax.jit(layers, donate_argnums=0).lower(pages, *rest).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(4000) == temporaries(100)


def test_the_gpu_kernel_refuses_them(written):
    q, _, pages, tables_BM, positions = written
    reason = pallas_gpu.refuses(q, pages, tables_BM, positions, **VALUES, mask_BTS=None, block=64)
    assert reason == "queries and pages are float32 and int8, it takes bfloat16"
