"""Codes mean what the formulas say, nearest is nearest, and what cannot be quantised is refused."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.hf import fp8
from dsv3_jax.quantization import formats
from dsv3_jax.quantization.formats import Format, Parts, parse_format, quantize

FORMATS = ["fp8", "int8", "int8:32", "int4:32", "int4:64", "int4a:32"]


def matrix(rows, columns, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize(
    "text", [*FORMATS, "int4a:128", "int8+act8", "int8:64+act8", "fp8+act8", "fp8:16x32+act8"]
)
def test_names_read_back(text):
    assert str(parse_format(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "int3",
        "fp8:64",
        "int4:7",
        "int4:8",
        "int8+act4",
        "int4+act8",
        "fp8+act4",
        "fp8:16x16+act4",
        "",
        "int8:x",
    ],
)
def test_other_names_are_refused(text):
    with pytest.raises(ConfigError, match="quantisation format"):
        parse_format(text)


def test_the_default_group_of_int4_is_128():
    assert parse_format("int4") == Format("int4", 128)


@pytest.mark.parametrize("text", FORMATS)
def test_every_code_is_the_nearest(text):
    """Against a search over all codes of the format, one value at a time."""
    fmt, w = parse_format(text), matrix(5, 64, 1)
    parts = quantize(w, fmt)
    got = formats.dequantize(parts, fmt, 64)
    if fmt.kind == "fp8":
        candidates = fp8.E4M3_VALUES[np.isfinite(fp8.E4M3_VALUES)]
        scales, zero = np.full((5, 64), parts.scales[0, 0]), 0.0
    else:
        size = fmt.group or 64
        scales = np.repeat(parts.scales, size, axis=1)
        candidates = np.arange(-127, 128) if fmt.kind == "int8" else np.arange(16)
        zero = 0.0 if fmt.kind == "int8" else 8.0
        if parts.zeros is not None:
            zero = np.repeat(parts.zeros, size, axis=1).astype(float)[..., None]
    values = (candidates.astype(float) - zero) * scales[..., None].astype(float)
    best = np.abs(values - w[..., None]).min(-1)
    np.testing.assert_allclose(np.abs(got - w), best, rtol=1e-5, atol=1e-6)


def test_fp8_is_bit_equal_to_the_formula_over_all_codes_and_odd_shapes():
    """code * scale in float32, partial blocks included, by a plain loop and by the converter's own decoder."""
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    rng = np.random.default_rng(0)
    for rows, columns in ((576, 256), (1, 1), (129, 300), (128, 128)):
        c = rng.permutation(np.resize(codes.view(np.uint8), rows * columns)).reshape(rows, columns)
        c = c.view(ml_dtypes.float8_e4m3fn)
        scales = rng.random((-(-rows // 128), -(-columns // 128)), np.float32)
        got = formats.dequantize(Parts(c, scales), Format("fp8"), columns)
        want = np.empty((rows, columns), np.float32)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = (slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128))
                want[block] = c[block].astype(np.float32) * scales[i, j]
        assert got.tobytes() == want.tobytes()
        assert got.tobytes() == fp8.dequantize(c, scales, (128, 128), np.dtype(np.float32)).tobytes()


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_what_lies_on_the_grid_stays(text, rows, groups, seed):
    fmt, columns = parse_format(text), groups * 64
    once = formats.dequantize(quantize(matrix(rows, columns, seed), fmt), fmt, columns)
    twice = formats.dequantize(quantize(once, fmt), fmt, columns)
    np.testing.assert_allclose(twice, once, rtol=2e-6, atol=1e-7)


def test_packing_is_two_codes_a_byte_and_reads_back():
    codes = np.random.default_rng(0).integers(0, 16, (3, 2, 128), np.uint8)
    packed = formats.pack_int4(codes, 64)
    assert packed.shape == (3, 2, 64) and packed.dtype == np.uint8
    assert packed[0, 0, 0] == codes[0, 0, 0] | codes[0, 0, 32] << 4
    np.testing.assert_array_equal(formats.unpack_int4(packed, 64), codes)


def test_zeros_stay_zero_and_extremes_do_not_overflow():
    for text in FORMATS:
        fmt = parse_format(text)
        assert not formats.dequantize(quantize(np.zeros((2, 64), np.float32), fmt), fmt, 64).any()
        big = np.array([[1e38, -1e38] * 32], np.float32)
        assert np.isfinite(formats.dequantize(quantize(big, fmt), fmt, 64)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad):
    w = matrix(2, 64)
    w[1, 3] = bad
    with pytest.raises(DataError, match="not finite"):
        quantize(w, parse_format("int8"))


def test_sizes():
    """int4 in groups of 128 is at most 0.14 of float32, zero points included."""
    w = matrix(64, 1024)
    for text, most in (("int4:128", 0.14), ("int4a:128", 0.14), ("int8", 0.26), ("fp8", 0.26)):
        assert quantize(w, parse_format(text)).nbytes <= most * w.nbytes
