"""The Mosaic attention kernels equal the reference, refuse what they do not take, and lower for a GPU."""

from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels import shim
from dsv3_jax.kernels.attention import attention, mosaic, mosaic_tiles, others
from dsv3_jax.kernels.attention.shapes import BOUNDS, FLOATS, SHAPES, Shape, cases

interpreted = pytest.mark.skipif(shim.why_not_interpret() is not None, reason=str(shim.why_not_interpret()))
buildable = pytest.mark.skipif(shim.why_not_mosaic() is not None, reason=str(shim.why_not_mosaic()))
SCALE = 0.1


def draw(shape, dtype, seed=0):
    """q, k, v and cotangents of out and lse."""
    rng = np.random.default_rng(seed)
    q, k, v = shape.arrays(dtype)
    B, T, H, _ = q.shape
    shapes = [(x.shape, dtype) for x in (q, k, v)] + [
        ((B, T, H, shape.v_dim), dtype),
        ((B, H, T), jnp.float32),
    ]
    return tuple(jnp.asarray(rng.standard_normal(s), d) for s, d in shapes)


def outputs(arrays, implementation, **options):
    """out, lse and the gradients of q, k and v; an lse of +inf, of a row that sees nothing, as 0."""
    q, k, v, dout, dlse = arrays
    run = functools.partial(attention, scale=SCALE, return_lse=True, implementation=implementation, **options)
    (out, lse), pull = jax.vjp(run, q, k, v)
    seen = ~jnp.isposinf(lse)
    return out, jnp.where(seen, lse, 0.0), *pull((dout, jnp.where(seen, dlse, 0.0))), seen


def assert_equals_reference(arrays, bound, **options):
    with shim.interpret():
        got = jax.jit(functools.partial(outputs, implementation="mosaic", **options))(arrays)
    wide = [x.astype(jnp.float32) for x in arrays]
    want = jax.jit(functools.partial(outputs, implementation="reference", **options))(wide)
    np.testing.assert_array_equal(got[-1], want[-1])
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=False):
        # Absolute where the values are small: the gradients of one score are 0.
        allowed = bound * max(1.0, float(jnp.abs(y).max()))
        error = float(jnp.abs(x.astype(jnp.float32) - y).max())
        assert error <= allowed, f"{name} is off by {error}, allowed {allowed}"
    return got


@interpreted
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("small_token", "bfloat16"),
        ("small", "float16"),
        ("small_odd", "bfloat16"),
        ("small_packed", "bfloat16"),
        ("small_grouped", "bfloat16"),
        ("small_full", "bfloat16"),
    ],
)
def test_output_lse_and_gradients_equal_the_float32_reference(name, dtype):
    shape = SHAPES[name]
    segments_BT = shape.segment_ids(jax.random.key(3)) if shape.segments else None
    arrays = draw(shape, FLOATS[dtype])
    assert_equals_reference(arrays, BOUNDS[dtype], causal=shape.causal, segments_BT=segments_BT)


@interpreted
@pytest.mark.parametrize("causal", [True, False])
def test_segments_of_one_token_rows_of_padding_and_ids_in_any_order(causal):
    T = 200
    ids = np.zeros((3, T), np.int32)
    ids[0] = np.arange(T) + 1
    ids[2] = np.repeat([7, 0, 3, 7, 5], [60, 10, 70, 40, 20])
    arrays = draw(Shape(3, T, 1, 64, 64), jnp.bfloat16)
    got = assert_equals_reference(arrays, BOUNDS["bfloat16"], causal=causal, segments_BT=jnp.asarray(ids))
    for x in (got[0], *got[2:5]):
        assert not np.any(np.asarray(x, np.float32)[ids == 0]), "padding gives zeros and gets no gradient"


@interpreted
def test_queries_and_keys_may_differ_in_number_without_causality():
    arrays = draw(Shape(1, 70, 2, 64, 64, groups=1), jnp.bfloat16)
    _, k, v, _, _ = draw(Shape(1, 333, 2, 64, 64, groups=1), jnp.bfloat16, seed=1)
    arrays = (arrays[0], k, v, *arrays[3:])
    assert_equals_reference(arrays, BOUNDS["bfloat16"], causal=False)
    ids_BT = jnp.asarray(np.arange(70)[None] // 30 + 1, jnp.int32)
    ids_BS = jnp.asarray(np.arange(333)[None] // 120 + 1, jnp.int32)
    assert_equals_reference(arrays, BOUNDS["bfloat16"], causal=False, segments_BT=ids_BT, segments_BS=ids_BS)


@interpreted
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("causal", [True, False])
def test_scores_far_from_zero_overflow_nothing(sign, causal):
    # Every scaled score is near +-400: exp of it, or of the distance of padding's score 0 from it, is infinite.
    q, k, v, dout, dlse = draw(Shape(1, 70, 1, 64, 64), jnp.bfloat16)
    arrays = (8 + 0.1 * q, sign * (8 + 0.1 * k), v, dout, dlse)
    got = assert_equals_reference(arrays, BOUNDS["bfloat16"], causal=causal)
    assert all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in got[:5])


@interpreted
def test_keys_that_no_query_may_see_are_not_read():
    q, k, v, *_ = draw(Shape(1, 384, 1, 64, 64), jnp.bfloat16)
    poisoned = [jnp.where(jnp.arange(384)[None, :, None, None] >= 128, jnp.nan, x) for x in (k, v)]
    with shim.interpret():
        run = jax.jit(functools.partial(attention, scale=SCALE, implementation="mosaic"))
        got, want = run(q, *poisoned), run(q, k, v)
    np.testing.assert_array_equal(got[:, :128], want[:, :128])
    # Segments: the first 128 queries and keys are apart from the rest, in both directions.
    segments_BT = jnp.asarray(np.repeat([1, 2], [128, 256])[None], jnp.int32)
    options = {"causal": False, "segments_BT": segments_BT, "implementation": "mosaic"}
    with shim.interpret():
        got = jax.jit(functools.partial(attention, scale=SCALE, **options))(q, *poisoned)
    assert np.all(np.isfinite(np.asarray(got[:, :128], np.float32)))


@interpreted
def test_no_races_between_the_warpgroups():
    arrays = draw(Shape(1, 260, 2, 64, 64, groups=1), jnp.bfloat16)
    segments_BT = jnp.asarray(np.repeat([1, 2], [100, 160])[None], jnp.int32)
    with shim.interpret(detect_races=True):
        run = jax.jit(functools.partial(outputs, implementation="mosaic", segments_BT=segments_BT))
        jax.block_until_ready(run(arrays))
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    assert not gpu_callbacks.get_races().races_found


@st.composite
def packings(draw_from):
    """Ids of 160 tokens: pieces of any length, ids in any order, some of them padding."""
    lengths = draw_from(st.lists(st.integers(1, 60), min_size=1, max_size=12))
    ids = draw_from(st.permutations(range(1, len(lengths) + 1)))
    gaps = draw_from(st.sets(st.integers(0, len(lengths) - 1)))
    ids_T = np.repeat([0 if i in gaps else n for i, n in enumerate(ids)], lengths)[:160]
    return np.pad(ids_T, (0, 160 - len(ids_T))).astype(np.int32)


tile_ranges = jax.jit(mosaic_tiles.visible_tiles, static_argnums=(1, 3))


@hypothesis.given(ids_T=packings(), tiles=st.sampled_from([(8, 32), (32, 16)]))
@hypothesis.settings(max_examples=40, deadline=None)
def test_tiles_outside_the_visible_range_hold_nothing_visible(ids_T, tiles):
    t, s = tiles
    first, last = np.asarray(tile_ranges(np.where(ids_T > 0, ids_T, -1)[None], t, ids_T[None], s))[0]
    meets = (ids_T[:, None] == ids_T[None]) & (ids_T > 0)[:, None]
    for i, row in enumerate(meets.reshape(len(first), t, -1, s).any((1, 3))):
        seen = np.flatnonzero(row)
        assert first[i] <= last[i]
        assert not len(seen) or (first[i] <= seen[0] and seen[-1] < last[i])


def test_the_visible_range_of_packed_sequences_is_exact():
    ids_BT = jnp.asarray(np.repeat([1, 2, 3, 0], [16, 40, 24, 16])[None], jnp.int32)
    first, last = np.asarray(mosaic_tiles.visible_tiles(jnp.where(ids_BT > 0, ids_BT, -1), 16, ids_BT, 8))[0]
    assert (first.tolist(), last.tolist()) == ([0, 2, 2, 2, 7, 0], [2, 7, 7, 10, 10, 0])


@buildable
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": jnp.float32}, "bfloat16 or float16"),
        ({"qk_dim": 96}, "not 96/64"),
        ({"qk_dim": 64, "v_dim": 128}, "not 64/128"),
        ({"qk_dim": 256, "v_dim": 128}, "not 256/128"),
        ({"mask": True}, "not mask_BTS"),
        ({"scale": -1.0}, "positive scales"),
        ({"batch": 70_000}, "1 to 65535 rows"),
    ],
)
def test_what_it_does_not_take_is_refused_before_launch(changes, reason):
    changes = dict(changes)
    dtype, scale = changes.pop("dtype", jnp.bfloat16), changes.pop("scale", SCALE)
    masked = changes.pop("mask", False)
    shape = Shape(1, 64, 2, 64, 64)._replace(**changes)
    mask = jax.ShapeDtypeStruct((shape.batch, 64, 64), bool) if masked else None
    run = functools.partial(attention, scale=scale, implementation="mosaic")
    with shim.compiling_for(), pytest.raises(ValueError, match=reason):
        jax.eval_shape(lambda q, k, v, mask: run(q, k, v, mask_BTS=mask), *shape.arrays(dtype), mask)


@buildable
def test_a_cuda_that_miscompiles_causal_kernels_is_refused(monkeypatch):
    arrays = (*SHAPES["v3"].arrays(jnp.bfloat16), None, None, None)
    monkeypatch.setattr(mosaic, "_cuda_version", lambda: 12090)
    assert "CUDA 12.9 miscompiles" in str(mosaic.refuses(*arrays, scale=SCALE, causal=True))
    assert mosaic.refuses(*arrays, scale=SCALE, causal=False) is None
    monkeypatch.setattr(mosaic, "_cuda_version", lambda: 13000)
    assert mosaic.refuses(*arrays, scale=SCALE, causal=True) is None


def lowered(case):
    with shim.compiling_for():
        run = jax.jit(functools.partial(case.function, implementation="mosaic"))
        return jax.export.export(run, platforms=["cuda"])(*case.arguments).mlir_module()


@buildable
@pytest.mark.parametrize("name", ["v3_train", "grouped_128_packed"])
def test_lowers_for_cuda_as_one_kernel_forward_and_three_with_backward(name):
    for case in cases():
        if case.shape == name and case.arguments[0].dtype == jnp.bfloat16:
            assert (
                lowered(case).count("custom_call @mosaic_gpu") == {"forward": 1, "backward": 3}[case.program]
            )


@buildable
def test_saving_the_tagged_output_and_lse_avoids_a_second_forward_kernel():
    q, k, v = SHAPES["v3_train"].arrays(jnp.bfloat16)

    def kernels(policy):
        run = functools.partial(attention, scale=SCALE, implementation="mosaic")
        step = jax.checkpoint(lambda *a: run(*a).astype(jnp.float32), policy=policy)
        with shim.compiling_for():
            export = jax.export.export(
                jax.jit(jax.value_and_grad(lambda *a: step(*a).sum(), argnums=(0, 1, 2))), platforms=["cuda"]
            )
            return export(q, k, v).mlir_module().count("custom_call @mosaic_gpu")

    names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    assert (kernels(names), kernels(jax.checkpoint_policies.nothing_saveable)) == (3, 4)


def test_flops_and_bytes_of_the_main_shape_are_those_of_the_formula():
    found = {c.program: c for c in cases() if c.name.endswith("v3_train bfloat16")}
    pairs = 4 * 16 * (4096 * 4097 / 2)
    assert found["forward"].flops == 2 * pairs * (192 + 128)
    assert found["backward"].flops == 2 * pairs * (3 * 192 + 2 * 128)
    tokens = 4 * 4096 * 16
    assert found["forward"].bytes == 2 * tokens * (192 + 192 + 128 + 128) + 4 * tokens
    assert found["backward"].bytes == 2 * 2 * tokens * (192 + 192 + 128 + 128) + 4 * tokens


def test_other_libraries_say_what_they_do_not_take():
    v3, equal = SHAPES["v3"].arrays(jnp.bfloat16), SHAPES["equal_128"].arrays(jnp.bfloat16)
    options = {"scale": SCALE, "causal": True}
    assert "equal head sizes, not 192 and 128" in str(others.cudnn_refuses(*v3, None, None, None, **options))
    assert others.cudnn_refuses(*equal, None, None, None, **options) is None
    assert others.tokamax_refuses(*v3, None, None, None, **options) is None
    ids = jax.ShapeDtypeStruct((4, 4096), jnp.int32)
    assert "segments" in str(others.tokamax_refuses(*equal, ids, ids, None, **options))
    with pytest.raises(ValueError, match="'cudnn' cannot run: it runs on gpu, not on cpu"):
        attention(
            *(jnp.zeros(x.shape, x.dtype) for x in SHAPES["one_block"].arrays()),
            scale=1.0,
            implementation="cudnn",
        )
