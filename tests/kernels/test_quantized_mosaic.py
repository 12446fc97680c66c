"""The Mosaic kernel of products with quantised weights: its codes, its tiles, and all of it in JAX's GPU interpreter.

The interpreter hands out shared memory and results filled with NaN, so a row that is not written shows.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export

from dsv3_jax.errors import ConfigError
from dsv3_jax.kernels import shim
from dsv3_jax.kernels.grouped_matmul.pipeline import SHARED_BYTES
from dsv3_jax.kernels.quantized_matmul import Coding, dequantize, mosaic, quantized_matmul
from dsv3_jax.kernels.quantized_matmul.coding import e4m3_values
from dsv3_jax.kernels.quantized_matmul.mosaic_codes import as_lanes, joined, offset, ordered, slices, unpack
from dsv3_jax.kernels.quantized_matmul.mosaic_product import Tile, product
from dsv3_jax.kernels.quantized_matmul.shapes import (
    DEVICE,
    SHAPES,
    Shape,
    arguments,
    cases,
    coding,
    inputs,
    run,
    tiles,
)
from dsv3_jax.quantization.formats import parse_format, quantize
from dsv3_jax.quantization.leaf import implemented, quantized_leaf

needs_interpreter = pytest.mark.skipif(
    shim.why_not_interpret() is not None, reason=str(shim.why_not_interpret())
)
FORMATS = ["int4", "int4:64", "int4:32", "int4a", "int4a:32", "int8", "int8:128", "int8:64", "int8:32", "fp8"]
TYPES = [jnp.bfloat16, jnp.float16]


@pytest.fixture
def as_interpreted(monkeypatch):
    """The arithmetic of the interpreted kernel on plain arrays, on any version of jax."""
    monkeypatch.setattr(shim, "interpreting", lambda: True)


def weight_of(arrays, shape, text):
    """The matrices that the parts stand for, float64."""
    codes, scales, *rest = arrays[1:]
    zeros = rest[0] if text.startswith("int4a") else None
    own = coding(text, shape.inputs)
    return np.asarray(dequantize((codes, scales, zeros), own, shape.inputs, jnp.float32), np.float64)


def oracle(arrays, shape, text, sizes=None):
    """y in float64, before any rounding."""
    x, w = np.asarray(arrays[0], np.float64), weight_of(arrays, shape, text)
    if not shape.experts:
        return x @ w.T
    sizes = np.asarray(arrays[-1] if sizes is None else sizes)
    y, end = np.zeros((shape.rows, shape.outputs)), 0
    for e, size in enumerate(sizes):
        y[end : end + size] = x[end : end + size] @ w[e].T
        end += size
    return y


def assert_rounded_once(got, want, dtype):
    """Within half a unit of the last place of the exact result, beside float32 sums."""
    got = np.asarray(got, np.float64)
    assert np.isfinite(got).all()
    half = 2.0 ** -(jnp.finfo(dtype).nmant + 1)
    bound = half * np.abs(want) * (1 + 2**-6) + 2**-19 * np.abs(want).max(initial=0)
    assert (np.abs(got - want) <= bound).all(), np.abs(got - want).max() / np.abs(want).max()


# --- codes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_every_pair_of_bytes_becomes_its_codes_exactly(kind, dtype, as_interpreted):
    lanes = np.arange(2**16, dtype=np.uint16)
    low, high = (lanes & 0xFF).astype(np.uint8), (lanes >> 8).astype(np.uint8)
    found = np.stack(unpack(jnp.asarray(lanes), kind, dtype, offset(None, dtype)))
    if kind == "int4":
        want = np.stack([low & 0xF, low >> 4, high & 0xF, high >> 4]).astype(float) - 8
    elif kind == "int8":
        want = np.stack([low, high]).view(np.int8).astype(float)
    else:
        want = np.asarray(e4m3_values(jnp.stack([low, high])), float)
        number = np.isfinite(want)  # the two codes of NaN count as 480
        want = np.where(number, want, np.copysign(480, want))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(float), want)


def test_the_device_scales_subnormal_e4m3_exactly():
    """What the interpreter's arithmetic stands for: bfloat16 times 2^120, here by a type that has subnormal numbers."""
    codes = np.arange(256, dtype=np.uint16)
    bits = (codes & 0x80) << 8 | (codes & 0x7F) << 4
    found = bits.view(ml_dtypes.bfloat16) * ml_dtypes.bfloat16(2.0**120)
    want = codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(float)
    np.testing.assert_array_equal(found[np.isfinite(want)].astype(float), want[np.isfinite(want)])


@pytest.mark.parametrize("dtype", TYPES)
def test_every_code_and_zero_point_of_int4(dtype, as_interpreted):
    lanes = jnp.arange(2**16, dtype=jnp.uint16)[None, :].repeat(16, 0)
    less = jnp.broadcast_to(offset(jnp.arange(16, dtype=jnp.uint8), dtype)[:, None], lanes.shape)
    for i, piece in enumerate(unpack(lanes, "int4", dtype, less)):
        want = (np.arange(2**16) >> 4 * i & 0xF)[None, :] - np.arange(16)[:, None]
        np.testing.assert_array_equal(np.asarray(piece, float), want)


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        *((text, 384) for text in FORMATS),
        *((text, 320) for text in ("int4:64", "int4a:32", "int8", "int8:32")),
    ],
)
def test_pieces_of_a_weight_are_its_columns_in_the_order_of_the_activations(text, columns, as_interpreted):
    shape, own = Shape(1, 64, columns), coding(text, columns)
    cut = slices(own, columns)
    _, codes, scales, *zeros = inputs(jax.random.key(1), shape, text)

    @jax.jit
    def scaled_pieces(lanes, scales, zeros):
        found = []
        for g in range(columns // cut.group):
            mine = lanes[:, g * cut.lanes : (g + 1) * cut.lanes]
            zero = offset(zeros[0][:, g] if zeros else None, jnp.bfloat16)
            pieces = unpack(mine, own.kind, jnp.bfloat16, jnp.broadcast_to(zero.reshape(-1, 1), mine.shape))
            pieces = joined(pieces, cut)
            assert all(piece.shape[1] == cut.width for piece in pieces)
            at = cut.scale_of(jnp.int32(g)) if cut.scaled else 0
            blocks = jnp.repeat(scales[:, at], own.block_rows)[:64, None]
            found += [piece.astype(jnp.float32) * blocks for piece in pieces]
        return jnp.concatenate(found, axis=1)

    weight = dequantize((codes, scales, zeros[0] if zeros else None), own, columns, jnp.float32)
    want = ordered(weight, cut, own.kind)
    np.testing.assert_array_equal(scaled_pieces(as_lanes(codes), scales, zeros), want)


def _refused_by(shape, text, dtype=jnp.bfloat16):
    x, codes, scales, *rest = arguments(shape, text, dtype)
    parts = codes, scales, rest[0] if text.startswith("int4a") else None
    return x, parts, coding(text, shape.inputs)


# --- tiles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "text"), DEVICE)
def test_tiles_fit_shared_memory_and_leave_no_part_empty(name, text):
    shape, own = SHAPES[name], coding(text, SHAPES[name].inputs)
    cut = slices(own, shape.inputs)
    with shim.compiling_for():
        if shape.experts:
            tile = mosaic.default_grouped_tile(*shape[:1], shape.experts, *shape[1:3], own)
        else:
            tile = mosaic.default_tile(*shape[:3], own)
    assert tile.shared_bytes(cut) <= SHARED_BYTES and tile.fits_registers() and tile.stages >= 2
    steps = shape.inputs // cut.columns
    assert steps * cut.columns == shape.inputs
    assert -(-steps // tile.splits) * (tile.splits - 1) < steps
    if not shape.experts:  # no more than a third of the device idles
        blocks = -(-shape.outputs // tile.rows) * -(-shape.rows // tile.tokens) * tile.splits
        assert blocks / (-(-blocks // 132) * 132) >= 2 / 3
    assert next(iter(tiles(shape, text).values()))


# --- what is taken -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "text", "dtype", "reason"),
    [
        (Shape(2, 64, 256), "int8", jnp.float32, "x is float32"),
        (Shape(2, 72, 256), "int8", jnp.bfloat16, "output width 72"),
        (Shape(2, 64, 272), "int8", jnp.bfloat16, "input width 272"),
        (Shape(2, 64, 192), "int4:48", jnp.bfloat16, "int4 groups of 48"),
        (Shape(2, 64, 256), "int4:16", jnp.bfloat16, "int4 groups of 16"),
        (Shape(0, 64, 256), "fp8", jnp.bfloat16, "no rows"),
    ],
)
def test_what_is_refused_says_why(shape, text, dtype, reason):
    assert reason in mosaic.refuses(*_refused_by(shape, text, dtype))


def test_blocks_and_quantised_activations_that_are_refused():
    x = jax.ShapeDtypeStruct((2, 256), jnp.bfloat16)
    codes = jax.ShapeDtypeStruct((64, 256), jnp.uint8)
    blocks = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    assert "blocks of 32 rows" in mosaic.refuses(x, (codes, blocks, None), Coding("fp8", 32, 128))
    rows = Coding("int8", 1, 256, activations="int8")
    assert "activations" in mosaic.refuses(x, (codes, blocks, None), rows)


def test_without_a_gpu_it_is_an_error_to_name_it():
    arrays = inputs(jax.random.key(0), SHAPES["interpret"], "int4")
    with pytest.raises(ConfigError, match="quantized_matmul: implementation 'mosaic' cannot run"):
        run(*arrays, shape=SHAPES["interpret"], text="int4", implementation="mosaic")


# --- the kernel, lowered for a GPU that is not here --------------------------------------------------------


@pytest.mark.skipif(shim.why_not_mosaic() is not None, reason=str(shim.why_not_mosaic()))
@pytest.mark.parametrize(
    ("name", "text"),
    [("v3_o_16", "int4"), ("v3_o_16", "int8"), ("v3_kv_a_16", "fp8"), ("v3_experts_512", "int4a")],
)
def test_it_lowers_to_one_kernel_and_nothing_as_large_as_the_weight(name, text):
    shape = SHAPES[name]
    with shim.compiling_for():
        call = jax.jit(functools.partial(run, shape=shape, text=text, implementation="mosaic"))
        unchecked = [export.DisabledSafetyCheck.custom_call(f"mosaic_gpu{v}") for v in ("", "_v2")]
        module = export.export(call, platforms=["cuda"], disabled_checks=unchecked)(*arguments(shape, text))
    text = module.mlir_module()
    assert text.count("custom_call @mosaic_gpu") == 1 and "dot_general" not in text
    # The codes are reshaped and seen as 16 bits, nothing else happens to them.
    assert f"tensor<{shape.outputs}x{shape.inputs}xbf16>" not in text


# --- the kernel, interpreted -------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("shape", "text", "implementation"))
def computed(*arrays, shape, text, implementation):
    return run(*arrays, shape=shape, text=text, implementation=implementation)


def interpreted(arrays, shape, text):
    with shim.interpret():
        return np.asarray(computed(*arrays, shape=shape, text=text, implementation="mosaic"))


@needs_interpreter
@pytest.mark.parametrize("text", FORMATS)
def test_dense_is_rounded_once_and_no_worse_than_the_reference(text):
    shape = Shape(11, 192, 384)  # an odd number of tokens, rows that do not fill the last tile
    arrays = inputs(jax.random.key(2), shape, text)
    want = oracle(arrays, shape, text)
    got = interpreted(arrays, shape, text)
    assert_rounded_once(got, want, jnp.bfloat16)
    reference = np.asarray(run(*arrays, shape=shape, text=text, implementation="reference"), np.float64)
    assert np.abs(got - want).mean() <= np.abs(reference - want).mean()
    np.testing.assert_allclose(got.astype(float), reference, rtol=0, atol=0.01 * np.abs(want).max())


@needs_interpreter
@pytest.mark.parametrize("text", ["int4a", "int8", "fp8"])
def test_float16(text):
    shape = Shape(9, 64, 256)
    arrays = inputs(jax.random.key(3), shape, text, jnp.float16)
    assert_rounded_once(interpreted(arrays, shape, text), oracle(arrays, shape, text), jnp.float16)


SIZES = {
    "ragged": [13, 0, 1, 17, 4],
    "hot": [0, 0, 40, 0, 0],
    "edges": [8, 8, 8, 8, 8],
    "none": [0, 0, 0, 0, 0],
}


@needs_interpreter
@pytest.mark.parametrize(
    ("grouping", "text"),
    [
        *(("ragged", t) for t in ("int4", "int4a:64", "int8", "int8:64", "fp8")),
        *((s, "int4a") for s in SIZES),
    ],
)
def test_grouped(grouping, text):
    shape = SHAPES["interpret_experts"]
    *arrays, _ = inputs(jax.random.key(4), shape, text)
    sizes = jnp.asarray(SIZES[grouping], jnp.int32)
    got = interpreted((*arrays, sizes), shape, text)
    assert_rounded_once(got, oracle(arrays, shape, text, sizes), jnp.bfloat16)
    assert not got[int(sizes.sum()) :].any()


@needs_interpreter
@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(
    rows=st.sampled_from([1, 2, 7, 8, 9, 33, 65, 130]),
    outputs=st.sampled_from([64, 128, 320]),
    slices_=st.integers(1, 5),
    text=st.sampled_from(["int4:64", "int4a", "int8", "fp8"]),
)
def test_any_size(rows, outputs, slices_, text):
    shape = Shape(rows, outputs, 128 * slices_)
    arrays = inputs(jax.random.key(rows), shape, text)
    assert_rounded_once(interpreted(arrays, shape, text), oracle(arrays, shape, text), jnp.bfloat16)


@needs_interpreter
@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(sizes=st.lists(st.integers(0, 25), min_size=5, max_size=5))
def test_any_group_sizes(sizes):
    shape = SHAPES["interpret_experts"]
    *arrays, _ = inputs(jax.random.key(5), shape, "int4")
    sizes = jnp.asarray(np.diff(np.minimum(np.cumsum(sizes), shape.rows), prepend=0), jnp.int32)
    got = interpreted((*arrays, sizes), shape, "int4")
    assert_rounded_once(got, oracle(arrays, shape, "int4", sizes), jnp.bfloat16)


TILES = {
    "split": Tile(16, 2, 3, splits=3),
    "split_over_tiles": Tile(8, 1, 2, splits=2),
    "cluster": Tile(16, 1, 2, cluster=2),
    "three": Tile(16, 3, 2),
    "four": Tile(8, 4, 4),
    "shallow": Tile(32, 2, 1),
}


@needs_interpreter
@pytest.mark.parametrize("name", TILES)
def test_tiles_that_tuning_may_choose(name):
    shape, text = Shape(20, 256, 768), "int4a"
    arrays = inputs(jax.random.key(6), shape, text)
    x, codes, scales, zeros = arrays
    with shim.interpret():
        got = product(x, (codes, scales, zeros), coding(text, shape.inputs), TILES[name])
    assert_rounded_once(got, oracle(arrays, shape, text), jnp.bfloat16)


def test_tiles_that_leave_a_part_empty_are_refused():
    shape = Shape(8, 64, 512)
    x, codes, scales = inputs(jax.random.key(6), shape, "int4")
    with pytest.raises(ValueError, match="not made of tiles"):
        product(x, (codes, scales, None), coding("int4", 512), Tile(8, 1, 2, splits=3))


@needs_interpreter
def test_int8_with_a_scale_for_several_rows():
    """No format makes it, but a `Coding` may say it: rows beyond the first of a block have that block's scale."""
    coding, shape = Coding("int8", 64, 256), Shape(3, 128, 256)
    x, codes, _ = inputs(jax.random.key(5), shape, "int8")
    scales = jnp.asarray([[0.5], [2.0]], jnp.float32)
    with shim.interpret():
        got = quantized_matmul(x, codes, scales, coding=coding, implementation="mosaic")
    w = np.asarray(codes, np.float64) * np.repeat([0.5, 2.0], 64)[:, None]
    assert_rounded_once(got, np.asarray(x, np.float64) @ w.T, jnp.bfloat16)


@needs_interpreter
def test_gradient_is_the_references():
    for name, text in (("interpret", "int4a"), ("interpret_experts", "fp8")):
        shape = SHAPES[name]
        x, *rest = inputs(jax.random.key(7), shape, text)
        dy = jax.random.normal(jax.random.key(8), (shape.rows, shape.outputs)).astype(x.dtype)

        def gradient(implementation, shape=shape, text=text, x=x, rest=rest, dy=dy):
            forward = functools.partial(run, shape=shape, text=text, implementation=implementation)
            return jax.jit(lambda x: jax.vjp(lambda x: forward(x, *rest), x)[1](dy)[0])(x)

        with shim.interpret():
            got = np.asarray(gradient("mosaic"), np.float32)
        np.testing.assert_array_equal(got, np.asarray(gradient("reference"), np.float32))
        assert got.any()


@needs_interpreter
def test_a_row_is_bitwise_independent_of_company_and_place():
    shape, text = SHAPES["interpret_experts"], "int4"
    x, codes, scales, _ = inputs(jax.random.key(9), shape, text)
    at = {}
    for grouping, start in (("ragged", 14), ("edges", 25)):  # expert 3's rows
        sizes = jnp.asarray(SIZES[grouping], jnp.int32)
        moved = jax.random.normal(jax.random.key(start), x.shape).astype(x.dtype)
        moved = moved.at[start : start + 6].set(x[:6])
        at[grouping] = interpreted((moved, codes, scales, sizes), shape, text)[start : start + 6]
    np.testing.assert_array_equal(at["ragged"].view(np.uint16), at["edges"].view(np.uint16))


@needs_interpreter
def test_weights_of_experts_without_rows_and_rows_of_nobody_are_not_used():
    shape, text = SHAPES["interpret_experts"], "int8:64"
    x, codes, scales, _ = inputs(jax.random.key(10), shape, text)
    sizes = jnp.asarray(SIZES["ragged"], jnp.int32)
    want = interpreted((x, codes, scales, sizes), shape, text)
    dead = int(sizes.sum())
    spoilt = interpreted((x.at[dead:].set(jnp.nan), codes, scales.at[1].set(jnp.nan), sizes), shape, text)
    np.testing.assert_array_equal(want.astype(float), spoilt.astype(float))


@needs_interpreter
@pytest.mark.parametrize(
    ("text", "tile"),
    [("int4a", Tile(8, 2, 2)), ("int8:64", Tile(8, 1, 3, cluster=2)), ("fp8", Tile(8, 1, 2, splits=2))],
)
def test_no_races_where_slots_are_filled_again(text, tile):
    shape = Shape(11, 128, 1280)
    x, codes, scales, *zeros = inputs(jax.random.key(11), shape, text)
    with shim.interpret(detect_races=True):
        y = product(x, (codes, scales, zeros[0] if zeros else None), coding(text, shape.inputs), tile)
        jax.block_until_ready(y)


@needs_interpreter
def test_no_races_by_expert():
    shape, text = SHAPES["interpret_experts"], "fp8"
    x, codes, scales, sizes = inputs(jax.random.key(11), shape, text)
    with shim.interpret(detect_races=True):
        jax.block_until_ready(product(x, (codes, scales, None), coding(text, 256), Tile(8, 1, 1), sizes))


@needs_interpreter
def test_small_cases_are_right_within_their_bound():
    case = next(c for c in cases() if c.size == "small" and c.kernel == "grouped_quantized_matmul")
    arrays = case.make(jax.random.key(12))
    with shim.interpret():
        got = np.asarray(jax.jit(functools.partial(case.function, implementation="mosaic"))(*arrays), float)
    shape, _, text = case.shape.partition(" ")
    want = oracle(arrays, SHAPES[shape], text)
    assert np.abs(got - want).max() <= case.bound * np.abs(want).max()


@needs_interpreter
@pytest.mark.parametrize("text", ["fp8", "int4a:64"])
def test_a_leaf_multiplies_by_it(text):
    """Gate and up of 192 rows: of FP8, whose blocks of 128 rows would straddle them, two products; of int4 one."""
    rng = np.random.default_rng(13)
    fmt, (E, F, D) = parse_format(text), (3, 192, 128)
    leaf = quantized_leaf(
        quantize(rng.standard_normal((E, 2, F, D)).astype(np.float32), fmt), fmt.coding(D), (F, D)
    )
    x_ND = jnp.asarray(rng.standard_normal((9, D)), jnp.bfloat16)
    sizes_E = jnp.asarray([4, 0, 5], jnp.int32)

    def both(leaf):
        return np.asarray(leaf.layer(1).product(x_ND), float), np.asarray(leaf.grouped(x_ND, sizes_E), float)

    with shim.interpret():
        got = both(implemented(leaf, "mosaic"))
    for ours, want in zip(got, both(leaf), strict=True):
        assert ours.shape == (9, 2 * F)
        np.testing.assert_allclose(ours, want, rtol=0, atol=0.01 * np.abs(want).max())
