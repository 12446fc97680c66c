"""AWQ's scales: what they gain where a few inputs are large, and that they are powers of two."""

import numpy as np
import pytest

from dsv3_jax.quantization import awq
from dsv3_jax.quantization.clipping import quantize_clipped
from dsv3_jax.quantization.formats import dequantize, parse_format, quantize


def inputs(count, size, seed=0):
    """A few columns thirty times as large as the others."""
    x = np.random.default_rng(seed).standard_normal((count, size))
    x[:, ::17] *= 30
    return x


def reader(w, x, fmt):
    return awq.Reader(w, lambda: x.T @ x, fmt)


@pytest.mark.parametrize("text", ["int8", "int4:32", "int4a:32"])
def test_scaled_columns_lose_less_where_inputs_differ(text):
    """On inputs that the scales were not chosen with."""
    fmt = parse_format(text)
    seen, unseen = inputs(300, 96), inputs(100, 96, seed=1)
    w = np.random.default_rng(2).standard_normal((40, 96)).astype(np.float32)
    scales = awq.best_scales([reader(w, seen, fmt)])

    def loss(back):
        return (((w - back) @ unseen.T) ** 2).sum()

    scaled = dequantize(quantize(w * scales, fmt), fmt, 96) / scales
    assert loss(scaled) < 0.5 * loss(dequantize(quantize(w, fmt), fmt, 96))
    assert (np.exp2(np.rint(np.log2(scales))) == scales).all() and scales[17] > scales[1]


def test_readers_of_the_same_inputs_share_their_scales_and_the_grid_holds_no_scaling():
    fmt = parse_format("int4:32")
    white = np.random.default_rng(0).standard_normal((300, 64))
    w = np.random.default_rng(2).standard_normal((2, 16, 64)).astype(np.float32)
    assert (awq.best_scales([reader(w[0], white, fmt)]) == 1).all()
    together = awq.best_scales([reader(w[0], white, fmt), reader(w[1], inputs(300, 64), fmt)])
    assert together[17] > together[1]


def test_clipping_weighs_columns_by_their_cost():
    """A large weight that no input sees is clipped away for the sake of the others."""
    fmt = parse_format("int4:32")
    w = np.random.default_rng(0).uniform(-1, 1, (8, 32)).astype(np.float32)
    w[:, 3] = 1.15
    cost = np.ones(32, np.float32)
    cost[3] = 0
    clipped, whole = quantize_clipped(w, cost, fmt), quantize(w, fmt)
    errors = [(((dequantize(parts, fmt, 32) - w) * cost) ** 2).sum() for parts in (clipped, whole)]
    assert errors[0] < 0.9 * errors[1] and (clipped.scales <= whole.scales).all()
