"""The products of training in FP8 against float64: exactly those of rounded operands, near those of unrounded ones."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.kernels.fp8_matmul.linear import by_token_blocks, grouped_linear, linear

E4M3 = ml_dtypes.float8_e4m3fn


def rounded(x, axis, block=128, powers=False):
    """What e4m3 codes with a scale (a power of two) per `block` along `axis` stand for, numpy, float64."""
    x = np.moveaxis(np.asarray(x, np.float32), axis, -1)
    out = np.zeros(x.shape)
    for b in range(0, x.shape[-1], block):
        own = x[..., b : b + block]
        scale = np.maximum(np.abs(own).max(-1, keepdims=True) / np.float32(448), np.finfo(np.float32).tiny)
        if powers:
            scale = np.exp2(np.ceil(np.log2(scale.astype(float)))).astype(np.float32)
        codes = np.clip(own * (np.float32(1) / scale), -448, 448).astype(E4M3)
        out[..., b : b + block] = codes.astype(np.float32) * scale
    return np.moveaxis(out, -1, axis)


def rounded_weight(w, block=128):
    out = np.zeros(w.shape)
    for r in range(0, w.shape[0], block):
        for k in range(0, w.shape[1], block):
            own = w[r : r + block, k : k + block]
            scale = np.maximum(np.abs(own).max() / np.float32(448), np.finfo(np.float32).tiny)
            codes = np.clip(own * (np.float32(1) / scale), -448, 448).astype(E4M3)
            out[r : r + block, k : k + block] = codes.astype(np.float32) * scale
    return out


def oracle(x, w, dy):
    """y, dX, dW of rounded operands, float64."""
    x8, w8 = rounded(x, 1), rounded_weight(w)
    dw = rounded(dy, 0, powers=True).T @ rounded(x8, 0, powers=True)  # x is rounded again, along tokens
    return x8 @ w8.T, rounded(dy, 1) @ w8, dw


def draw(N, R, K, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((N, K)) * np.exp(rng.uniform(-2, 2, (N, 1)))
    w, dy = (
        rng.standard_normal((R, K)) / K**0.5,
        rng.standard_normal((N, R)) * np.exp(rng.uniform(-2, 2, (N, 1))),
    )
    return (a.astype(np.float32) for a in (x, w, dy))


def close(got, want, relative=1e-5):
    for name, one, other in zip(("y", "dx", "dw"), got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=relative * np.abs(other).max(), err_msg=name)


@jax.jit
def both(x, w, dy):
    y, back = jax.vjp(linear, x, w)
    return y, *back(dy)


@pytest.mark.parametrize(("N", "R", "K"), [(40, 24, 32), (300, 200, 270)])
def test_forward_and_gradients_are_those_of_the_rounded_operands(N, R, K):
    x, w, dy = draw(N, R, K)
    close(both(x, w, dy), oracle(x, w, dy))


def test_gradients_stay_within_the_bound_of_rounding():
    """Each operand is off by at most 2^-4 of its size (x twice in dW), at random: norms by less than a tenth."""
    x, w, dy = draw(300, 200, 270)
    exact = x.astype(float) @ w.T, dy.astype(float) @ w, dy.T.astype(float) @ x
    for got, want in zip(both(x, w, dy), exact, strict=True):
        off = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert 1e-3 < off < 0.1, off


def test_what_is_kept_for_backward_is_e4m3():
    x, w, _ = (jnp.asarray(a, jnp.bfloat16) for a in draw(300, 200, 270))
    kept = jax.tree.leaves(jax.eval_shape(lambda x, w: jax.vjp(linear, x, w)[1], x, w))
    of_x = [a for a in kept if a.shape == x.shape]
    assert [a.dtype for a in of_x] == [jnp.float8_e4m3fn]


def test_bfloat16_rounds_results_only():
    x, w, dy = (jnp.asarray(a, jnp.bfloat16) for a in draw(64, 48, 96))
    got = both(x, w, dy)
    assert {a.dtype for a in got} == {jnp.dtype(jnp.bfloat16)}
    close([a.astype(float) for a in got], oracle(*(np.asarray(a, np.float32) for a in (x, w, dy))), 2**-8)


def test_along_tokens_bfloat16_holds_every_value():
    x = next(draw(300, 8, 16)) * 10.0 ** np.linspace(-30, 30, 16, dtype=np.float32)
    got = np.asarray(jax.jit(by_token_blocks)(x, np.array([300], np.int32))[0])[:300]
    np.testing.assert_array_equal(got, got.astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(got, rounded(x, 0, powers=True))


SIZES = {"ragged": [130, 0, 1, 150, 16], "hot": [0, 0, 300, 0, 0], "none": [0] * 5, "few": [3, 0, 2, 0, 1]}


@functools.partial(jax.jit, static_argnums=4)
def grouped_both(x, w, sizes, dy, implementation="auto"):
    y, back = jax.vjp(lambda x, w: grouped_linear(x, w, sizes, implementation), x, w)
    return y, *back(dy)


@pytest.mark.parametrize("name", SIZES)
def test_experts(name):
    """Rows left over give zeros and no gradient; an expert without rows has a gradient of zeros."""
    sizes, E, F, D = SIZES[name], 5, 72, 136
    rows = sum(sizes) + 3
    x, _, dy = draw(rows, F, D)
    w = np.random.default_rng(9).standard_normal((E, F, D)).astype(np.float32) / D**0.5
    y, dx, dw = np.zeros((rows, F)), np.zeros((rows, D)), np.zeros((E, F, D))
    first = 0
    for e, size in enumerate(sizes):
        own = slice(first, first + size)
        if size:
            y[own], dx[own], dw[e] = oracle(x[own], w[e], dy[own])
        first += size
    got = grouped_both(x, w, np.asarray(sizes, np.int32), dy)
    close(got, (y, dx, dw))
    assert not got[0][first:].any() and not got[1][first:].any()


def test_token_blocks_begin_with_their_group_and_hold_every_row_once():
    sizes = np.array([130, 0, 5, 128, 0], np.int32)
    x = np.arange(1, 271, dtype=np.float32)[:, None] * np.ones((1, 2), np.float32)
    got, padded = (np.asarray(a) for a in jax.jit(by_token_blocks)(x, sizes))
    assert padded.tolist() == [256, 0, 128, 128, 0] and got.shape == (128 * (270 // 128 + 5), 2)
    live = np.concatenate([np.arange(130), 256 + np.arange(5), 384 + np.arange(128)])
    np.testing.assert_allclose(got[live, 0], x[:263, 0], rtol=2**-4)
    assert np.count_nonzero(got[:, 0]) == 263  # neither the fill nor the rows left over


def test_without_rows_the_weights_gradient_is_zero():
    x, w = jnp.zeros((0, 256), jnp.bfloat16), jnp.ones((128, 256), jnp.bfloat16)
    y, backward = jax.vjp(linear, x, w)
    dx, dw = backward(y)
    assert y.shape == (0, 128) and dx.shape == x.shape
    np.testing.assert_array_equal(np.asarray(dw, np.float32), np.zeros(w.shape))
