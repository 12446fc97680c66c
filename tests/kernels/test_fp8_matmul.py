"""e4m3 times e4m3: what activations are rounded to, and the products against float64."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

from dsv3_jax.kernels.fp8_matmul.quantize import nearest, quantize_blocks, quantize_lines, values
from dsv3_jax.kernels.quantized_matmul import Coding, grouped_quantized_matmul, quantized_matmul, reference
from dsv3_jax.quantization.formats import parse_format, quantize

E4M3 = ml_dtypes.float8_e4m3fn
TINY = np.finfo(np.float32).tiny


def formula(x, block=128):
    """Codes and scales of `quantize_lines` in numpy, line by line as the module's text has it."""
    codes, scales = np.empty(x.shape, E4M3), np.empty((*x.shape[:-1], -(-x.shape[-1] // block)), np.float32)
    for b in range(scales.shape[-1]):
        own = x[..., b * block : (b + 1) * block].astype(np.float32)
        scale = np.maximum(np.abs(own).max(-1) / np.float32(448), TINY)
        quotients = own * (np.float32(1) / scale[..., None])
        codes[..., b * block : (b + 1) * block] = np.clip(quotients, -448, 448).astype(E4M3)
        scales[..., b] = scale
    return codes, scales


def same_bits(got, want):
    np.testing.assert_array_equal(np.asarray(got.scales), want[1])
    np.testing.assert_array_equal(np.asarray(got.codes).view(np.uint8), want[0].view(np.uint8))


lines = jax.jit(quantize_lines, static_argnums=1)
blocks = jax.jit(quantize_blocks, static_argnums=1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.0, 3.0, 30.0]))
def test_lines_are_bit_equal_to_the_formula(seed, spread):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((7, 300)) * np.exp(rng.uniform(-spread, spread, (7, 300)))
    x = np.where(rng.random(x.shape) < 0.1, 0, x).astype(np.float32)
    same_bits(lines(x, 128), formula(x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_activations_are_rounded_once(dtype):
    x = np.asarray(jax.random.normal(jax.random.key(3), (64, 256), dtype))
    same_bits(lines(x, 128), formula(x))


def test_every_quotient_goes_to_the_nearest_code():
    """Lines whose largest value is 448 have scale 1: numbers between and at the middle of all neighbours."""
    grid = np.unique(np.abs(np.arange(127, dtype=np.uint8).view(E4M3).astype(np.float32)))
    middle = (grid[1:] + grid[:-1]) / 2
    numbers = np.concatenate([grid, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)])
    x = np.full((len(numbers), 128), 448, np.float32)
    x[:, 1], x[:, 2] = numbers, -numbers
    got = lines(x, 128)
    assert (np.asarray(got.scales) == 1).all()
    same_bits(got, formula(x))


def test_the_rounding_in_arithmetic_is_that_of_the_type():
    """And it is done in arithmetic: a GPU program leaves out a conversion there and back."""
    text = export.export(jax.jit(lambda x: values(quantize_lines(x))), platforms=["cuda"])(
        jnp.ones((2, 128))
    ).mlir_module()
    assert "round_nearest_even" in text
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-448, 448, 20000), rng.uniform(-0.05, 0.05, 20000)])
    grid = np.arange(127, dtype=np.uint8).view(E4M3).astype(np.float32)
    middle = (grid[1:] + grid[:-1]) / 2
    x = np.concatenate([x, grid, -grid, middle, -middle, [0.0, -0.0, np.nan]]).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(nearest)(x), x.astype(E4M3).astype(np.float32))


def test_zeros_and_tiny_lines():
    x = np.zeros((5, 256), np.float32)
    x[1, 0], x[2, 130], x[3, 5] = 1e-38, 1e-40, -3e38
    got = lines(x, 128)
    assert np.isfinite(got.scales).all() and (np.asarray(got.scales) >= TINY).all()
    assert not np.asarray(got.codes[0]).astype(np.float32).any()
    same_bits(got, formula(np.where(np.abs(x) < TINY, 0, x)))  # XLA's comparisons know no subnormal numbers
    assert values(got)[3, 5] == pytest.approx(-3e38, rel=1e-6)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_makes_its_own_row_nan_and_no_other(bad):
    fmt = parse_format("fp8+act8")
    w = np.random.default_rng(0).standard_normal((20, 256)).astype(np.float32)
    x = np.ones((3, 256), np.float32)
    good = jax.jit(functools.partial(quantized_matmul, coding=fmt.coding(256)))(x, *quantize(w, fmt))
    x[1, 200] = bad
    y = np.asarray(jax.jit(functools.partial(quantized_matmul, coding=fmt.coding(256)))(x, *quantize(w, fmt)))
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(y[[0, 2]], np.asarray(good)[[0, 2]])


@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (3, 130, 257)])
def test_blocks_are_the_released_format(shape):
    """Scales bit-equal to what the converters write; they divide, so codes next to a middle may be neighbours."""
    w = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    got, want = blocks(w, 128), quantize(w, parse_format("fp8"))
    np.testing.assert_array_equal(got.scales, want.scales)
    apart = np.asarray(got.codes).view(np.uint8).astype(int) - want.codes.view(np.uint8)
    assert np.abs(apart).max() <= 1 and (apart != 0).mean() < 1e-4


# --- products -------------------------------------------------------------------------------------------------


def oracle(x, parts, coding):
    """y[n, r] = sum over blocks b of (codes . codes) scale_x[n, b] scale_w[r / 128, b], float64, promoted by block."""
    codes_NK, scales_NG = formula(x, coding.block_columns)
    N, K = x.shape
    codes_RK = parts.codes.view(E4M3).astype(float)
    y = np.zeros((N, codes_RK.shape[0]))
    for b in range(scales_NG.shape[1]):
        own = slice(b * coding.block_columns, (b + 1) * coding.block_columns)
        sums = codes_NK[:, own].astype(float) @ codes_RK[:, own].T
        scale_R = np.repeat(parts.scales[:, b].astype(float), coding.block_rows)[: codes_RK.shape[0]]
        y += sums * scales_NG[:, b, None].astype(float) * scale_R
    return y


def drawn(rows, outputs, inputs, text, experts=0, seed=0):
    rng = np.random.default_rng(seed)
    fmt = parse_format(text)
    lead = (experts,) if experts else ()
    parts = quantize(rng.standard_normal((*lead, outputs, inputs)).astype(np.float32), fmt)
    x = (rng.standard_normal((rows, inputs)) * np.exp(rng.uniform(-3, 3, (rows, 1)))).astype(np.float32)
    return x, parts._replace(codes=parts.codes.view(np.uint8)), fmt.coding(inputs)


@pytest.mark.parametrize("text", ["fp8+act8", "fp8:48x32+act8"])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 12, 64), (3, 37, 96), (2, 576, 256), (9, 300, 200)]
)
def test_dense_against_float64(rows, outputs, inputs, text, monkeypatch):
    monkeypatch.setattr(reference, "SLAB_BYTES", 16 * 1024)  # several slabs
    x, parts, coding = drawn(rows, outputs, inputs, text)
    want = oracle(x, parts, coding)
    most = np.abs(want).max(axis=1, keepdims=True)
    for run in (quantized_matmul, lambda x, *parts, coding: reference.fp8_by_block(x, parts, coding)):
        got = jax.jit(functools.partial(run, coding=coding))(x, *parts)
        np.testing.assert_allclose(got / most, want / most, rtol=0, atol=1e-6)


def test_an_accelerator_scales_after_each_block_of_exact_products():
    x, parts, coding = drawn(2, 576, 256, "fp8+act8")
    run = jax.jit(functools.partial(quantized_matmul, coding=coding))
    text = export.export(run, platforms=["cuda"])(x, *parts).mlir_module()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert (
        len(products) == 1
        and "(tensor<2x128xbf16>, tensor<576x128xbf16>) -> tensor<2x576xf32>" in products[0]
    )


@pytest.mark.parametrize("sizes", [[3, 0, 1, 2], [0, 60, 0, 9]])
def test_grouped_against_float64(sizes):
    rows = sum(sizes) + 1  # one row is left over
    x, parts, coding = drawn(rows, 24, 192, "fp8+act8", experts=4)
    got = jax.jit(functools.partial(grouped_quantized_matmul, coding=coding))(
        x, parts.codes, parts.scales, None, np.asarray(sizes, np.int32)
    )
    want, first = np.zeros((rows, 24)), 0
    for e, size in enumerate(sizes):
        own = slice(first, first + size)
        want[own] = oracle(x[own], parts._replace(codes=parts.codes[e], scales=parts.scales[e]), coding)
        first += size
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


def test_bfloat16_activations_round_only_the_result():
    x, parts, coding = drawn(8, 64, 256, "fp8+act8")
    x = jnp.asarray(x, jnp.bfloat16)
    got = jax.jit(functools.partial(quantized_matmul, coding=coding))(x, *parts)
    want = oracle(np.asarray(x, np.float32), parts, coding)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(float), want, rtol=2**-8, atol=1e-6 * np.abs(want).max())


def test_the_gradient_is_that_of_activations_that_were_not_rounded():
    x, parts, coding = drawn(5, 40, 96, "fp8+act8")
    dy = np.random.default_rng(2).standard_normal((5, 40)).astype(np.float32)
    got = jax.jit(lambda x: jax.vjp(lambda x: quantized_matmul(x, *parts, coding=coding), x)[1](dy)[0])(x)
    scale = np.repeat(np.repeat(parts.scales, 128, 0)[:40], 128, 1)[:, :96]
    want = dy.astype(float) @ (parts.codes.view(E4M3).astype(float) * scale)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_no_whole_dequantised_weight_is_made():
    rows, columns = 4096, 1024
    coding = Coding("fp8", 128, 128, "fp8")
    args = (
        jax.ShapeDtypeStruct((4, columns), jnp.float32),
        jax.ShapeDtypeStruct((rows, columns), jnp.uint8),
        jax.ShapeDtypeStruct((rows // 128, columns // 128), jnp.float32),
    )
    compiled = jax.jit(functools.partial(quantized_matmul, coding=coding)).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * reference.SLAB_BYTES < rows * columns * 4 / 8
