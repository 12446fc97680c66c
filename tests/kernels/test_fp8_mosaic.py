"""The Mosaic kernels of FP8 products: tiles, lowering for CUDA, and both kernels in JAX's GPU interpreter.

The interpreter hands out shared memory and results filled with NaN, so a row that is not written shows.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from dsv3_jax.errors import ConfigError
from dsv3_jax.kernels import shim, tables
from dsv3_jax.kernels.fp8_matmul import mosaic_quantize
from dsv3_jax.kernels.fp8_matmul.linear import grouped_linear, linear
from dsv3_jax.kernels.fp8_matmul.mosaic_product import Tile, product
from dsv3_jax.kernels.fp8_matmul.quantize import Coded, quantize_blocks, quantize_lines, values
from dsv3_jax.kernels.fp8_matmul.shapes import (
    CODING,
    DEVICE_SHAPES,
    SHAPES,
    _forward,
    _inputs,
    cases,
)
from dsv3_jax.kernels.grouped_matmul.pipeline import SHARED_BYTES
from dsv3_jax.kernels.quantized_matmul import Coding, quantized_matmul
from dsv3_jax.kernels.quantized_matmul.mosaic_fp8 import default_tile

needs_interpreter = pytest.mark.skipif(
    shim.why_not_interpret() is not None, reason=str(shim.why_not_interpret())
)


@pytest.mark.parametrize("name", SHAPES)
def test_default_tiles_fit_registers_shared_memory_and_the_widths(name):
    shape = SHAPES[name]
    tile = default_tile(shape.rows, shape.experts or 1, shape.outputs)
    assert tile.fits() and tile.shared_bytes() <= SHARED_BYTES


def test_the_space_to_tune_has_the_defaults_and_nothing_that_does_not_fit():
    for case in cases():
        for program, candidates in case.tiles.items():
            tiles = [Tile(**fields) for fields in candidates]
            shape = DEVICE_SHAPES[case.shape]
            assert (
                program == case.kernel
                and default_tile(shape.rows, shape.experts or 1, shape.outputs) in tiles
            )
            assert all(t.fits() and t.shared_bytes() <= SHARED_BYTES for t in tiles)


@pytest.mark.skipif(shim.why_not_mosaic() is not None, reason=str(shim.why_not_mosaic()))
@pytest.mark.parametrize("name", ["v3_gate_up", "v3_kv_a", "v3_q_b_decode"])
def test_it_lowers_for_cuda_as_two_kernels_and_no_weight_is_dequantised(name):
    with shim.compiling_for():
        run = jax.jit(functools.partial(_forward, implementation="mosaic"))
        unchecked = [export.DisabledSafetyCheck.custom_call(f"mosaic_gpu{v}") for v in ("", "_v2")]
        text = export.export(run, platforms=["cuda"], disabled_checks=unchecked)(
            *SHAPES[name].arrays()
        ).mlir_module()
    assert text.count("custom_call @mosaic_gpu") == 2  # activations rounded; the product
    assert "dot_general" not in text
    assert not re.findall(r"stablehlo\.convert .*(?:ui8|f8E4M3FN)", text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=jnp.float32), "results are bfloat16"),
        (dict(columns=200), "not a multiple of 16"),
        (dict(rows=200), "not a multiple of 64"),
        (dict(block=64), "blocks are 64 x 64"),
    ],
)
def test_what_the_kernel_does_not_take_is_said(change, message):
    rows, columns, block = change.get("rows", 128), change.get("columns", 256), change.get("block", 128)
    coding = Coding("fp8", block, block, "fp8")
    x = jnp.zeros((4, columns), change.get("x", jnp.bfloat16))
    codes = jnp.zeros((rows, columns), jnp.uint8)
    scales = jnp.ones(coding.scale_shape(rows, columns), jnp.float32)
    with shim.compiling_for(), pytest.raises(ConfigError, match=message):
        jax.eval_shape(
            lambda x: quantized_matmul(x, codes, scales, coding=coding, implementation="mosaic"), x
        )


# --- interpreted ----------------------------------------------------------------------------------------------


def activations(N, K, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (N, K)) * jnp.exp(3 * jax.random.normal(keys[1], (N, 1)))
    return x.at[N // 2].set(0).astype(dtype)


@needs_interpreter
@pytest.mark.parametrize(
    ("N", "K", "dtype"), [(130, 400, jnp.bfloat16), (7, 64, jnp.bfloat16), (64, 128, jnp.float16)]
)
def test_activations_are_rounded_as_the_reference_does_bit_by_bit(N, K, dtype):
    x = activations(N, K, dtype)
    with shim.interpret(detect_races=True):
        codes, scales = jax.tree.map(np.asarray, jax.jit(mosaic_quantize.quantize_lines)(x))
    want = jax.jit(quantize_lines)(x)
    np.testing.assert_array_equal(codes.view(np.uint8), np.asarray(want.codes).view(np.uint8))
    np.testing.assert_array_equal(scales[:, :N], np.asarray(want.scales).T)
    assert scales.shape[1] % mosaic_quantize.SCALES_ALIGNED == 0


def lined(x):
    """Activations as the kernel reads them."""
    codes, scales_NG = quantize_lines(x)
    return Coded(codes, jnp.pad(scales_NG.T, ((0, 0), (0, -x.shape[0] % 4))))


@functools.partial(jax.jit, static_argnames="tile")
def run_product(x, w, sizes_E, tile):
    return product(x, w, sizes_E, tile, jnp.bfloat16)


@jax.jit
def operands(x, w):
    return lined(x), values(quantize_lines(x)), quantize_blocks(w), values(quantize_blocks(w), 128)


def close(got, want):
    """One rounding to bfloat16, and float32 sums."""
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=2**-8, atol=2e-6 * np.abs(want).max())


# Boundaries inside tiles and at their edges, one row, empty first, middle and last groups, rows left over.
GROUPINGS = {
    "ragged": [90, 0, 1, 150, 30],
    "hot": [0, 0, 300, 0, 0],
    "edges": [64, 64, 128, 0, 44],
    "none": [0] * 5,
}
TILES = {
    "default": Tile(),
    "narrow": Tile(128, 64, 3, 1, "rows", band=1),
    "columns": Tile(64, 128, 3, 2, "columns", band=2),
    "cluster": Tile(64, 128, 3, 2, "columns", band=2, cluster=2),
    "wide": Tile(64, 256, 3, 1, "columns", band=3),
}


@needs_interpreter
@pytest.mark.parametrize(
    ("grouping", "tile"),
    [*((g, "default") for g in GROUPINGS), *(("ragged", t) for t in TILES if t != "default")],
)
def test_the_product_against_float64_without_races(grouping, tile):
    """Weight blocks of 128 rows of which the last is half, a summed axis that ends in part of a block."""
    F, K = 192, 272
    x = activations(300, K)
    x_coded, x_values, w_coded, w_values = operands(x, jax.random.normal(jax.random.key(2), (5, F, K)))
    sizes = GROUPINGS[grouping]
    if sum(sizes) < 300:  # rows left over may hold anything
        x_coded = Coded(x_coded.codes.at[-1].set(jnp.nan), x_coded.scales.at[:, 299].set(jnp.inf))
    with shim.interpret(detect_races=tile != "cluster"):
        got = np.asarray(run_product(x_coded, w_coded, jnp.asarray(sizes, jnp.int32), TILES[tile]))
    want, first = np.zeros((300, F)), 0
    for e, size in enumerate(sizes):
        own = slice(first, first + size)
        want[own] = np.asarray(x_values[own], float) @ np.asarray(w_values[e], float).T
        first += size
    close(got, want)


@needs_interpreter
@pytest.mark.parametrize("name", ["interpret_few", "interpret_experts"])
def test_through_the_api_against_the_reference(name):
    shape = SHAPES[name]
    arrays = _inputs(jax.random.key(1), shape=shape)
    with shim.interpret(), tables.watching() as watch:
        got = np.asarray(jax.jit(functools.partial(_forward, implementation="mosaic"))(*arrays))
    want = jax.jit(functools.partial(_forward, implementation="reference"))(
        arrays[0].astype(jnp.float32), *arrays[1:]
    )
    close(got, np.asarray(want, float))
    assert (shape.kernel, "mosaic") in watch.kernels and shape.kernel in watch.programs


@needs_interpreter
def test_a_rows_bits_do_not_depend_on_the_other_rows():
    w = quantize_blocks(jax.random.normal(jax.random.key(2), (128, 256)))
    x = activations(40, 256)

    @jax.jit
    def run(x):
        return quantized_matmul(x, *w, coding=CODING, implementation="mosaic")

    with shim.interpret():
        np.testing.assert_array_equal(np.asarray(run(x))[5:9], np.asarray(run(x[5:9])))


@needs_interpreter
def test_what_is_not_finite_stays_in_its_row():
    w = quantize_blocks(jax.random.normal(jax.random.key(2), (128, 256)))
    x = activations(6, 256).at[1, 3].set(jnp.inf).at[4, 200].set(jnp.nan)
    with shim.interpret():
        y = np.asarray(
            jax.jit(lambda x: quantized_matmul(x, *w, coding=CODING, implementation="mosaic"))(x), float
        )
    np.testing.assert_array_equal(np.isnan(y).all(axis=1), [False, True, False, False, True, False])
    assert np.isfinite(y[[0, 2, 3, 5]]).all()


@needs_interpreter
def test_the_gradient_is_the_references():
    w = quantize_blocks(jax.random.normal(jax.random.key(2), (128, 256)))
    x, dy = activations(40, 256), activations(40, 128)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(x, name):
        run = functools.partial(quantized_matmul, coding=CODING, implementation=name)
        return jax.vjp(lambda x: run(x, *w), x)[1](dy)[0]

    with shim.interpret():
        got = np.asarray(gradient(x, "mosaic"), float)
    np.testing.assert_array_equal(got, np.asarray(gradient(x, "reference"), float))


@needs_interpreter
@pytest.mark.parametrize("sizes", [None, (40, 0, 23)])
def test_training_products_take_the_kernels_forward_and_backward(sizes):
    """Of experts dW is the grouped kernel's, on operands that bfloat16 holds exactly."""
    x, dy = activations(70, 128), activations(70, 256)
    w = jax.random.normal(jax.random.key(2), (128 * 256 * (3 if sizes else 1),), jnp.bfloat16) / 11
    w = w.reshape((3, 256, 128) if sizes else (256, 128))

    @functools.partial(jax.jit, static_argnums=0)
    def both(name):
        if sizes:
            run = lambda x, w: grouped_linear(x, w, jnp.asarray(sizes, jnp.int32), name, name)  # noqa: E731
        else:
            run = lambda x, w: linear(x, w, name)  # noqa: E731
        y, back = jax.vjp(run, x, w)
        return y, *back(dy)

    with shim.interpret(), tables.watching() as watch:
        got = jax.tree.map(np.asarray, both("mosaic"))
    kernels = {"grouped_fp8_matmul", "grouped_matmul"} if sizes else {"fp8_matmul"}
    assert {kernel for kernel, name in watch.kernels if name == "mosaic"} == kernels
    for one, other in zip(got, both("reference"), strict=True):
        other = np.asarray(other, float)
        np.testing.assert_allclose(one.astype(float), other, rtol=2**-7, atol=2e-5 * np.abs(other).max())
