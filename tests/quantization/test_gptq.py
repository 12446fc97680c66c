"""GPTQ against rounding to nearest, on inputs that are correlated, white, dead and missing."""

import weakref

import numpy as np
import pytest

from dsv3_jax.errors import DataError
from dsv3_jax.quantization import formats
from dsv3_jax.quantization.clipping import CLIPPINGS
from dsv3_jax.quantization.formats import parse_format, quantize
from dsv3_jax.quantization.gptq import factor, gptq, gptq_each

FORMATS = ["int8", "int4:32", "int4a:32"]


def correlated(count, size, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 6)) @ rng.standard_normal((6, size)) + 0.1 * rng.standard_normal(
        (count, size)
    )


def loss(w, parts, fmt, x):
    error = x @ (w - formats.dequantize(parts, fmt, w.shape[1])).T.astype(float)
    return float((error**2).sum())


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("columns", [64, 192])
def test_it_beats_nearest_where_inputs_are_correlated(text, columns):
    """On inputs that it was not calibrated with, drawn alike."""
    fmt = parse_format(text)
    x = correlated(600, columns)
    w = np.random.default_rng(1).standard_normal((24, columns)).astype(np.float32)
    seen, unseen = x[:400], x[400:]
    ours = loss(w, gptq(w, seen.T @ seen, fmt), fmt, unseen)
    assert ours < 0.5 * loss(w, quantize(w, fmt), fmt, unseen)


@pytest.mark.parametrize("text", FORMATS)
def test_white_inputs_leave_nothing_to_make_up_for(text):
    fmt = parse_format(text)
    w = np.random.default_rng(1).standard_normal((5, 192)).astype(np.float32)
    unclipped = gptq(w, np.eye(192), fmt, clippings=(1.0,))
    for ours, nearest in zip(unclipped, quantize(w, fmt), strict=True):
        np.testing.assert_array_equal(ours, nearest)


def test_the_loss_is_that_of_a_plain_solver():
    """The published recursion, one column at a time with the inverse updated by elimination, in float64."""
    fmt = parse_format("int8")
    x = correlated(100, 12)
    H = x.T @ x
    w = np.random.default_rng(2).standard_normal((3, 12)).astype(np.float32)
    got = formats.dequantize(gptq(w, H, fmt), fmt, 12)
    damped = H + 0.01 * np.mean(np.diag(H)) * np.eye(12)
    inverse, left, want = np.linalg.inv(damped), w.astype(float), np.zeros((3, 12))
    scale = np.abs(w).max(1) / np.float32(127)
    for k in range(12):
        want[:, k] = np.clip(np.rint(left[:, k] / scale), -127, 127) * scale
        left -= np.outer((left[:, k] - want[:, k]) / inverse[k, k], inverse[k])
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def falling(count, size):
    """Correlated inputs whose columns are of very different size, in no order."""
    sizes = np.random.default_rng(7).permutation(np.geomspace(0.1, 10, size))
    return correlated(count, size) * sizes


@pytest.mark.parametrize("text", FORMATS)
def test_order_by_activations_is_that_of_a_plain_solver(text):
    """The published recursion on permuted columns, every group's grid taken before any rounding."""
    fmt, K = parse_format(text), 96
    x = falling(300, K)
    H = x.T @ x
    w = np.random.default_rng(2).standard_normal((3, K)).astype(np.float32)
    parts = gptq(w, H, fmt, clippings=(1.0,), act_order=True)
    scales, zeros = formats.grid(w, fmt)
    np.testing.assert_array_equal(parts.scales, scales)
    low, high = (-127, 127) if text == "int8" else (0, 15)
    damped = H + 0.01 * np.mean(np.diag(H)) * np.eye(K)
    inverse, left, want = np.linalg.inv(damped), w.astype(float), np.zeros((3, K))
    for k in np.argsort(-np.diag(H)):
        group = k // fmt.coding(K).block_columns
        scale, zero = scales[:, group].astype(float), 0 if text == "int8" else 8
        if zeros is not None:
            zero = zeros[:, group].astype(float)
        want[:, k] = (np.clip(np.rint(left[:, k] / scale) + zero, low, high) - zero) * scale
        left -= np.outer((left[:, k] - want[:, k]) / inverse[k, k], inverse[k])
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    np.testing.assert_allclose(formats.dequantize(parts, fmt, K), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", FORMATS)
def test_order_by_activations_helps_where_inputs_differ_in_size(text):
    """On inputs that it was not calibrated with."""
    fmt, x = parse_format(text), falling(600, 192)
    w = np.random.default_rng(1).standard_normal((24, 192)).astype(np.float32)
    seen, unseen = x[:400], x[400:]
    ordered, plain = (
        loss(w, gptq(w, seen.T @ seen, fmt, act_order=order), fmt, unseen) for order in (True, False)
    )
    assert ordered < 0.9 * plain


def test_inputs_of_falling_size_are_in_order_already():
    """One group: nothing is permuted, so the codes are those without the order."""
    fmt = parse_format("int8")
    x = falling(300, 64)
    x = x[:, np.argsort(-(x**2).sum(0))]
    w = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    for ours, plain in zip(gptq(w, x.T @ x, fmt, act_order=True), gptq(w, x.T @ x, fmt), strict=True):
        np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize("text", ["int4:32", "int4a:32"])
def test_of_clippings_the_cheapest_is_taken(text):
    """White inputs: every group's squared error is the least of all clippings, and some groups gain."""
    fmt = parse_format(text)
    w = np.random.default_rng(1).standard_t(5, (24, 64)).astype(np.float32)

    def errors(clippings):
        back = formats.dequantize(gptq(w, np.eye(64), fmt, clippings), fmt, 64)
        return ((w - back) ** 2).reshape(24, 2, 32).sum(-1)

    least = np.min([errors((clipping,)) for clipping in CLIPPINGS], axis=0)
    np.testing.assert_allclose(errors(CLIPPINGS), least, rtol=1e-4)
    assert least.sum() < 0.97 * errors((1.0,)).sum()


@pytest.mark.parametrize("text", FORMATS)
def test_pieces_side_by_side_are_each_matrix_alone(text, monkeypatch):
    """Several matrices a piece, and several pieces a matrix: as one by one, up to a tie in rounding."""
    fmt = parse_format(text)
    rng = np.random.default_rng(1)
    matrices = rng.standard_normal((5, 24, 64)).astype(np.float32)
    hessians = [x.T @ x for x in (correlated(100, 64, seed) for seed in range(5))]
    alone = [gptq(w, H, fmt) for w, H in zip(matrices, hessians, strict=True)]
    for nbytes in (2 * 24 * 64 * 8, 7 * 64 * 8):
        asked = []
        monkeypatch.setattr("dsv3_jax.quantization.gptq._PIECE_BYTES", nbytes)
        together = gptq_each(matrices, lambda i, asked=asked: asked.append(i) or factor(hessians[i]), fmt)
        assert sorted(asked) == list(range(5))  # once each, however many pieces
        for b, one in enumerate(alone):
            for ours, theirs in zip(together, one, strict=True):
                if theirs is not None:
                    np.testing.assert_allclose(ours[b], theirs, rtol=1e-6)


def test_few_factors_are_held_at_once(monkeypatch):
    """Matrices of many pieces: two for each processor at most, and none is left at the end."""
    monkeypatch.setattr("dsv3_jax.quantization.gptq._PIECE_BYTES", 2 * 32 * 8)
    monkeypatch.setattr("dsv3_jax.quantization.gptq.os.cpu_count", lambda: 2)
    alive, most = weakref.WeakSet(), []

    def make(_):
        one = factor(np.eye(32))
        held = one.upper_KK.view(Watched)
        alive.add(held)
        most.append(len(alive))
        return one._replace(upper_KK=held)

    gptq_each(np.ones((12, 8, 32), np.float32), make, parse_format("int4:32"))
    assert len(most) == 12 and max(most) <= 4 and not alive


class Watched(np.ndarray):
    """An array that can be referred to weakly, and by itself."""

    __hash__ = object.__hash__


def test_a_factor_is_that_of_the_inverse():
    x = correlated(100, 40)
    H = x.T @ x
    upper, dead, order = factor(H)
    assert order is None and not dead.any() and (np.tril(upper, -1) == 0).all()
    damped = H + 0.01 * np.mean(np.diag(H)) * np.eye(40)
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(40), atol=1e-9)


def test_columns_that_no_input_reaches_are_harmless():
    fmt = parse_format("int4:32")
    x = correlated(50, 64)
    x[:, 7] = 0
    w = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    parts = gptq(w, x.T @ x, fmt)
    assert np.isfinite(parts.scales).all()
    assert not formats.dequantize(parts, fmt, 64)[:, 7].any()
    assert np.isfinite(formats.dequantize(gptq(w, np.zeros((64, 64)), fmt), fmt, 64)).all()


def test_what_is_not_finite_is_refused():
    w = np.ones((2, 32), np.float32)
    with pytest.raises(DataError, match="not finite"):
        gptq(w, np.full((32, 32), np.nan), parse_format("int4:32"))
