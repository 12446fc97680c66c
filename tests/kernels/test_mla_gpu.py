"""The Mosaic GPU kernel of latent attention: its schedule, its results when interpreted, that it lowers for CUDA."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from dsv3_jax.errors import ConfigError
from dsv3_jax.kernels import shim, tables
from dsv3_jax.kernels.mla_decode import paged_latent_attention, pallas_gpu
from dsv3_jax.kernels.mla_decode.schedule import BLOCK, most_pieces, schedule
from dsv3_jax.kernels.mla_decode.shapes import FULL, PAGED_SHAPES, cases

needs_mosaic = pytest.mark.skipif(shim.why_not_mosaic() is not None, reason=str(shim.why_not_mosaic()))
needs_interpreter = pytest.mark.skipif(
    shim.why_not_interpret() is not None, reason=str(shim.why_not_interpret())
)


def plan_of(lengths, *, slots=2048, workers=7, pieces=3, least=2, most=8, limit=100):
    last_B = jnp.asarray(lengths, jnp.int32) - 1
    options = dict(workers=workers, pieces=pieces, least=least, most=most, limit=limit)
    plan = jax.jit(functools.partial(schedule, slots=slots, **options))(last_B)
    return jax.tree.map(np.asarray, plan)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    lengths=st.lists(st.integers(0, 2048), min_size=5, max_size=5),
    limits=st.sampled_from([(1, 1, 1, 40), (3, 2, 8, 40), (7, 4, 32, 2), (1, 1, 4, 2)]),
)
@hypothesis.example(lengths=[0, 0, 0, 0, 0], limits=(3, 2, 8, 40))
@hypothesis.example(lengths=[1, 64, 65, 0, 2048], limits=(3, 2, 8, 40))
@hypothesis.example(lengths=[2048, 2047, 1, 2048, 2048], limits=(1, 1, 4, 2))
def test_workers_together_take_every_block_of_every_row_once(lengths, limits):
    pieces, least, most, limit = limits
    plan = plan_of(lengths, pieces=pieces, least=least, most=most, limit=limit)
    taken = []
    for w in range(7):
        for i in range(plan.begin_w[w], plan.begin_w[w + 1]):
            row = plan.row_i[i]
            assert plan.piece_B[row] <= i < plan.piece_B[row] + plan.pieces_B[row]
            assert 0 < plan.blocks_i[i] <= max(most, 32 // limit)
            taken += [(row, plan.first_i[i] + k) for k in range(plan.blocks_i[i])]
    assert plan.begin_w[0] == 0 and plan.begin_w[7] == plan.pieces_B.sum() <= len(plan.row_i)
    assert taken == [(b, k) for b, n in enumerate(lengths) for k in range(-(-n // BLOCK))]  # in order


def test_the_pieces_of_a_row_follow_from_its_own_length():
    for length in (1, 300, 2048):
        alone, beside = plan_of([length]), plan_of([2048, 7, length, 0, 1000])
        begin = beside.piece_B[2]
        count = alone.pieces_B[0]
        assert beside.pieces_B[2] == count
        wide = plan_of([length], slots=5 * 2048)
        for other, at in ((beside, begin), (wide, 0)):
            np.testing.assert_array_equal(other.first_i[at : at + count], alone.first_i[:count])
            np.testing.assert_array_equal(other.blocks_i[at : at + count], alone.blocks_i[:count])


def test_workers_get_even_shares():
    rng = np.random.default_rng(0)
    plan = plan_of(rng.integers(1, 4096, 128), slots=4096, workers=132, pieces=2, least=4, most=16)
    loads = [plan.blocks_i[a:b].sum() for a, b in zip(plan.begin_w[:-1], plan.begin_w[1:], strict=True)]
    assert max(loads) <= np.mean(loads) + 16  # one piece


def test_room_for_pieces_does_not_grow_with_the_table_for_ever():
    options = dict(least=4, most=32, limit=8)
    assert most_pieces(128, 4096, pieces=1, **options) == 128 * 2
    assert (
        most_pieces(128, 65536, pieces=1, **options)
        == most_pieces(128, 1 << 20, pieces=1, **options)
        == 128 * 8
    )
    assert most_pieces(4, 65536, pieces=33, **options) == 4 * 33
    assert most_pieces(4, 64, pieces=33, **options) == 4


# --- interpreted -------------------------------------------------------------------------------------------


def random_case(lengths, *, heads, page, table, tokens=1, columns=192, seed=0):
    """Rows of those lengths, the last `tokens` of them queries; NaN in every slot that is not live."""
    rng, B, J = np.random.default_rng(seed), len(lengths), columns
    pages_NPJ = np.full((B * table + 3, page, J), np.nan, np.float32)
    tables_BM = rng.permutation(len(pages_NPJ))[: B * table].reshape(B, table).astype(np.int32)
    positions_BT = np.full((B, tokens), -1, np.int32)
    for b, n in enumerate(lengths):
        values = rng.standard_normal((table * page, J))
        values[n:] = np.nan
        pages_NPJ[tables_BM[b]] = values.reshape(table, page, J)
        live = min(n, tokens)
        positions_BT[b, :live] = np.arange(n - live, n)
    q_BTHJ = 0.5 * rng.standard_normal((B, tokens, heads, J))
    return (
        jnp.asarray(q_BTHJ, jnp.bfloat16),
        jnp.asarray(pages_NPJ, jnp.bfloat16),
        jnp.asarray(tables_BM),
        jnp.asarray(positions_BT),
    )


def options(arrays):
    J = arrays[1].shape[2]
    return dict(value_dim=J - 64, scale=0.2 * (192 / J) ** 0.5)


def interpreted(arrays, *, races=False, **tiles):
    function = functools.partial(paged_latent_attention, **options(arrays), implementation="mosaic")
    instead = {"paged_latent_attention": {"least": 1, "most": 2, **tiles}}
    with shim.interpret(detect_races=races), tables.watching(instead):
        return np.asarray(jax.jit(lambda *a: function(*a))(*arrays), np.float32)


def reference_of(arrays):
    q, pages, *rest = arrays
    want = paged_latent_attention(
        q.astype(jnp.float32), pages.astype(jnp.float32), *rest, **options(arrays), implementation="reference"
    )
    return np.asarray(want)


def check(arrays, got):
    want = reference_of(arrays)
    assert np.isfinite(got).all()
    # Weights and results are rounded to bfloat16 (2^-8); 0.003 was seen.
    np.testing.assert_allclose(got, want, atol=0.01 * np.abs(want).max())
    empty_BT = np.asarray(arrays[3]) < 0
    assert not got[empty_BT].any()


@needs_interpreter
@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ([1, 17, 64, 0, 65, 256], dict(heads=16, page=64, table=4)),  # up to two pieces a row
        ([130, 0], dict(heads=128, page=64, table=3)),
        ([190, 2, 0], dict(heads=16, page=16, table=12, tokens=3)),  # 48 rows, some queries are padding
        ([200, 64], dict(heads=12, page=128, table=2)),  # rows padded to 16
        ([17, 200], dict(heads=16, page=64, table=4, columns=576)),
    ],
    ids=["16 heads", "128 heads", "three tokens, small pages", "12 heads, large pages", "V3's columns"],
)
def test_interpreted_equals_the_reference_whatever_lies_in_dead_slots(lengths, options):
    arrays = random_case(lengths, **options)
    check(arrays, interpreted(arrays, races=len(lengths) == 3))


@needs_interpreter
def test_interpreted_a_row_is_bitwise_independent_of_neighbours_and_place():
    q, pages, tables_BM, positions = random_case([300, 64, 1, 200], heads=16, page=64, table=5)
    got = interpreted((q, pages, tables_BM, positions))
    order = jnp.asarray([3, 2, 0, 1])
    moved = interpreted((q[order], pages, tables_BM[order], positions.at[1].set(-1)[order]))
    np.testing.assert_array_equal(moved[[0, 1, 2]], got[[3, 2, 0]])
    assert not moved[3].any()


@needs_interpreter
def test_interpreted_one_piece_and_many_agree():
    arrays = random_case([320, 256], heads=16, page=64, table=5)
    check(arrays, interpreted(arrays, most=1))
    whole = interpreted(arrays, least=8, most=8)
    check(arrays, whole)


def test_a_prefill_of_many_rows_needs_room_for_one_piece_a_row():
    shape = PAGED_SHAPES["v3"]._replace(batch=8, tokens=128, table=2048)  # 16,384 rows each, 131,072 slots
    function = functools.partial(
        pallas_gpu.latent_attention, value_dim=512, scale=0.1, mask_BTS=None, block=64
    )
    with shim.compiling_for():
        jaxpr = jax.make_jaxpr(function)(*shape.arrays(jnp.bfloat16))
    sizes = {v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars if v.aval.dtype == jnp.float32}
    assert max(sizes) == 8 * 16384 * 512


# --- lowered -----------------------------------------------------------------------------------------------


@needs_mosaic
@pytest.mark.parametrize("name", FULL)
def test_full_shapes_lower_for_cuda(name):
    case = next(case for case in cases() if case.shape == name)
    custom = [export.DisabledSafetyCheck.custom_call(target) for target in ("mosaic_gpu", "mosaic_gpu_v2")]
    with shim.compiling_for():
        function = jax.jit(functools.partial(case.function, implementation="mosaic"))
        lowered = export.export(function, platforms=["cuda"], disabled_checks=custom)(*case.arguments)
    assert lowered.mlir_module().count("@mosaic_gpu") >= 2  # pieces, combination


def abstract(**changes):
    return PAGED_SHAPES["v3"]._replace(**changes).arrays(jnp.bfloat16)


def test_what_the_kernel_does_not_take_is_refused_with_the_reason():
    refuses = functools.partial(pallas_gpu.refuses, scale=0.1, block=256)
    assert refuses(*abstract(), value_dim=512, mask_BTS=None) is None
    assert "mask" in refuses(*abstract(), value_dim=512, mask_BTS=jnp.ones((128, 1, 4096), bool))
    reason = refuses(*abstract(latent=128, rope=32), value_dim=128, mask_BTS=None)
    assert reason.startswith("value_dim 128 of 160 columns")
    assert "pages of 48 slots" in refuses(*abstract(page=48), value_dim=512, mask_BTS=None)
    floats = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in abstract()[:2]] + list(abstract()[2:])
    assert "float32 and float32" in refuses(*floats, value_dim=512, mask_BTS=None)


def test_named_without_a_gpu_it_raises_and_auto_takes_the_reference():
    q, pages, tables_BM, positions = random_case([3], heads=16, page=64, table=1)
    with pytest.raises(ConfigError, match="'mosaic' cannot run: it runs on gpu, not on cpu"):
        paged_latent_attention(
            q, pages, tables_BM, positions, value_dim=128, scale=1.0, implementation="mosaic"
        )
    with tables.watching() as watch:
        paged_latent_attention(q, pages, tables_BM, positions, value_dim=128, scale=1.0)
    assert not watch.kernels
