"""Products with quantised weights against the dequantised weight in float64."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export

from dsv3_jax.kernels.quantized_matmul import (
    Coding,
    dequantize,
    grouped_quantized_matmul,
    quantized_matmul,
    reference,
)
from dsv3_jax.kernels.quantized_matmul.coding import e4m3_values
from dsv3_jax.kernels.quantized_matmul.shapes import SHAPES
from dsv3_jax.quantization import formats
from dsv3_jax.quantization.formats import parse_format, quantize

FORMATS = ["fp8", "int8", "int8:32", "int4:32", "int4a:32"]


def case(shape, text, seed=0):
    """x, parts, coding, and the weight that the parts stand for (float64)."""
    rng = np.random.default_rng(seed)
    fmt = parse_format(text)
    lead = (shape.experts,) if shape.experts else ()
    w = rng.standard_normal((*lead, shape.outputs, shape.inputs)).astype(np.float32)
    parts = quantize(w, fmt)
    if fmt.kind == "fp8":
        parts = parts._replace(codes=parts.codes.view(np.uint8))
    x = rng.standard_normal((shape.rows, shape.inputs)).astype(np.float32)
    return x, parts, fmt.coding(shape.inputs), formats.dequantize(parts, fmt, shape.inputs).astype(float)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("name", ["one_token", "odd", "kv_a"])
def test_dense(name, text, monkeypatch):
    x, parts, coding, w = case(SHAPES[name], text)
    monkeypatch.setattr(reference, "SLAB_BYTES", 16 * 1024)  # several slabs, shorter and longer than a block
    got = jax.jit(functools.partial(quantized_matmul, coding=coding))(x, *parts)
    np.testing.assert_allclose(got, x @ w.T, rtol=0, atol=2e-5 * np.abs(x @ w.T).max())
    np.testing.assert_array_equal(dequantize(parts, coding, x.shape[1], jnp.float32), w.astype(np.float32))


@pytest.mark.parametrize(
    ("name", "text"),
    [("kv_a", "int8+act8"), *((n, t) for n in ("kv_a", "experts_decode") for t in (*FORMATS, "fp8+act8"))],
)
def test_without_rows_the_product_and_its_gradient_have_none(name, text):
    shape = SHAPES[name]._replace(rows=0)
    x, parts, coding, _ = case(shape, text)
    if shape.experts:
        sizes = jnp.zeros((shape.experts,), jnp.int32)
        y, backward = jax.vjp(lambda x: grouped_quantized_matmul(x, *parts, sizes, coding=coding), x)
    else:
        y, backward = jax.vjp(lambda x: quantized_matmul(x, *parts, coding=coding), x)
    assert y.shape == (0, shape.outputs) and backward(y)[0].shape == (0, shape.inputs)


@pytest.mark.parametrize("text", FORMATS)
def test_an_accelerator_takes_one_product_without_a_loop(text, monkeypatch):
    x, parts, coding, w = case(SHAPES["odd"], text)
    monkeypatch.setattr(reference, "SLAB_BYTES", 4096)
    dy, columns = np.ones((len(x), len(w)), np.float32), w.shape[1]
    at_once = reference.forward_at_once(x, parts, coding)
    np.testing.assert_allclose(at_once, x @ w.T, rtol=0, atol=2e-5 * np.abs(x @ w.T).max())
    at_once = reference.backward_at_once(dy, parts, coding, columns)
    np.testing.assert_allclose(at_once, dy @ w, rtol=0, atol=2e-5 * np.abs(dy @ w).max())

    def both(x, dy, *parts):
        y, back = jax.vjp(lambda x: quantized_matmul(x, *parts, coding=coding), x)
        return y, back(dy)

    def text_for(platform):
        return export.export(jax.jit(both), platforms=[platform])(x, dy, *parts).mlir_module()

    assert "stablehlo.while" in text_for("cpu") and "stablehlo.while" not in text_for("cuda")


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("name", ["experts_decode", "experts_prefill"])
@pytest.mark.parametrize("hot", [False, True])
def test_grouped(name, text, hot):
    shape = SHAPES[name]
    x, parts, coding, w = case(shape, text)
    sizes = np.zeros(shape.experts, np.int32)
    sizes[1] = shape.rows - 1 if hot else shape.rows // 2
    sizes[3] = 0 if hot else shape.rows // 4  # experts 0 and 2 are empty, rows are left over
    got = jax.jit(functools.partial(grouped_quantized_matmul, coding=coding))(
        x, parts.codes, parts.scales, parts.zeros, sizes
    )
    want, end = np.zeros((shape.rows, shape.outputs)), 0
    for e, size in enumerate(sizes):
        want[end : end + size] = x[end : end + size] @ w[e].T
        end += size
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("experts", [0, 4])
def test_gradient_of_the_activations(experts):
    """The weight is frozen; what flows back is dY times the dequantised weight."""
    shape = SHAPES["experts_prefill" if experts else "odd"]
    x, parts, coding, w = case(shape, "int4a:32")
    dy = np.random.default_rng(5).standard_normal((shape.rows, shape.outputs)).astype(np.float32)
    if experts:
        sizes = np.array([20, 0, 40, 3], np.int32)
        product = lambda x: grouped_quantized_matmul(x, *parts, sizes, coding=coding)  # noqa: E731
        per_row = np.repeat(np.arange(4), sizes)
        want = np.zeros_like(x, dtype=float)
        for n, e in enumerate(per_row):
            want[n] = dy[n] @ w[e]
    else:
        product = lambda x: quantized_matmul(x, *parts, coding=coding)  # noqa: E731
        want = dy @ w
    got = jax.jit(lambda x: jax.vjp(product, x)[1](dy)[0])(x)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("text", ["int8+act8", "int8:32+act8"])
def test_eight_by_eight_is_the_product_of_the_rounded_operands(text):
    x, parts, coding, w = case(SHAPES["odd"], text)
    codes, scale = (np.asarray(a) for a in reference.quantize_activations(jnp.asarray(x)))
    rounded = codes * scale[:, None].astype(float)
    assert np.abs(rounded - x).max() <= scale.max() / 2 * 1.0001
    got = jax.jit(functools.partial(quantized_matmul, coding=coding))(x, *parts)
    np.testing.assert_allclose(got, rounded @ w.T, rtol=0, atol=1e-5 * np.abs(x @ w.T).max())


def test_every_e4m3_code():
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    for given in (codes, codes.view(np.uint8)):
        np.testing.assert_array_equal(jax.jit(e4m3_values)(given), codes.astype(np.float32))
    assert np.signbit(e4m3_values(codes)[0x80])


def test_no_whole_dequantised_weight_is_made():
    """Decode: temporaries of the compiled product are a few slabs, not the weight in float32."""
    rows, columns = 4096, 1024
    coding = Coding("int8", 1, columns)
    args = (
        jax.ShapeDtypeStruct((4, columns), jnp.float32),
        jax.ShapeDtypeStruct((rows, columns), jnp.int8),
        jax.ShapeDtypeStruct((rows, 1), jnp.float32),
    )
    compiled = jax.jit(functools.partial(quantized_matmul, coding=coding)).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * reference.SLAB_BYTES < rows * columns * 4 / 8


def test_what_does_not_fit_is_refused():
    x, parts, coding, _ = case(SHAPES["odd"], "int4:32")
    with pytest.raises(ValueError, match="codes"):
        quantized_matmul(x[:, :64], *parts, coding=coding)
    with pytest.raises(ValueError, match="scales"):
        quantized_matmul(x, parts.codes, parts.scales[:, :1], None, coding=coding)
    with pytest.raises(ValueError, match="no implementation"):
        quantized_matmul(x, *parts, coding=coding, implementation="cutlass")
    with pytest.raises(ValueError, match="8-bit activations"):
        Coding("int4", 1, 32, "int8")
