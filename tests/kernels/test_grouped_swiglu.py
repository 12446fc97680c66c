"""Gate, up and SwiGLU in one grouped product: its reference against plain loops, and what each implementation takes."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dsv3_jax.kernels.grouped_matmul import grouped_matmul, grouped_swiglu, mosaic
from dsv3_jax.kernels.grouped_matmul.api import GROUPED_MATMUL
from dsv3_jax.kernels.grouped_matmul.shapes import DEVICE_SHAPES, SHAPES

N, E, D, F = 23, 4, 6, 5
SIZES = jnp.array([9, 0, 3, 6], jnp.int32)  # five rows belong to nobody


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((N, D)), jnp.float32), jnp.asarray(
        rng.standard_normal((E, 2, F, D)), jnp.float32
    )


def plain(x_ND, w_EPFD, sizes_E):
    h_NF, end = np.zeros((len(x_ND), w_EPFD.shape[2])), 0
    for e, size in enumerate(sizes_E):
        own = slice(end, end := end + size)
        gate, up = (np.asarray(x_ND[own], float) @ np.asarray(w, float).T for w in w_EPFD[e])
        h_NF[own] = gate / (1 + np.exp(-gate)) * up
    return h_NF


def test_reference_against_a_float64_loop():
    x_ND, w_EPFD = arrays()
    got = jax.jit(grouped_swiglu)(x_ND, w_EPFD, SIZES)
    np.testing.assert_allclose(got, plain(x_ND, w_EPFD, SIZES), atol=1e-5)
    assert not np.asarray(got)[18:].any()


def test_reference_gradient_against_finite_differences():
    run = jax.jit(lambda x, w: grouped_swiglu(x, w, SIZES))
    check_grads(run, arrays(), order=1, modes=["rev"], eps=1e-2, atol=2e-2, rtol=2e-2)
    dx_ND, dw_EPFD = jax.grad(lambda x, w: grouped_swiglu(x, w, SIZES).sum(), argnums=(0, 1))(*arrays())
    assert not np.asarray(dx_ND)[18:].any() and not np.asarray(dw_EPFD)[1].any()


def test_shapes_that_disagree_are_refused():
    x_ND, w_EPFD = arrays()
    with pytest.raises(ValueError, match=r"expected w \[E, 2, F, D\], got \(4, 1, 5, 6\)"):
        grouped_swiglu(x_ND, w_EPFD[:, :1], SIZES)
    with pytest.raises(ValueError, match=r"x \(23, 5\).*disagree"):
        grouped_swiglu(x_ND[:, 1:], w_EPFD, SIZES)


@pytest.mark.parametrize(
    ("x", "w", "reason"),
    [
        (((64, 128), jnp.float32), (2, 256, 128), "float32"),
        (((64, 96), jnp.bfloat16), (2, 256, 96), "input width 96 is not a multiple of 128"),
        (((64, 128), jnp.bfloat16), (2, 2, 192, 128), "output width 192 is not a multiple of 128"),
        (((0, 128), jnp.bfloat16), (2, 256, 128), "no rows"),
        (((64, 128), jnp.float16), (2, 2, 256, 128), None),
    ],
)
def test_the_gpu_kernels_say_what_they_do_not_take(x, w, reason):
    x = jax.ShapeDtypeStruct(*x)
    got = mosaic.refuses(x, jax.ShapeDtypeStruct(w, x.dtype), jax.ShapeDtypeStruct((w[0],), jnp.int32))
    assert got is None if reason is None else reason in got


@pytest.mark.parametrize("name", DEVICE_SHAPES)
def test_device_shapes_are_taken_and_their_sizes_are_sizes(name):
    shape = SHAPES[name]
    assert mosaic.refuses(*shape.arrays(jnp.bfloat16)) is None
    sizes_E = shape.sizes()
    assert sizes_E.shape == (shape.experts,) and sizes_E.sum() == shape.rows and sizes_E.min() >= 0


def test_a_gpu_kernel_that_cannot_run_here_raises_with_the_reason():
    x_ND, w_EPFD = arrays()
    with pytest.raises(ValueError, match="'mosaic' cannot run: it runs on gpu, not on cpu"):
        grouped_swiglu(x_ND, w_EPFD, SIZES, implementation="mosaic")
    with pytest.raises(ValueError, match="'tokamax' cannot run"):
        grouped_matmul(x_ND, w_EPFD[:, 0], SIZES, implementation="tokamax")


def test_tokamax_is_handed_in_by_out_weights_and_dead_rows_are_cleared(monkeypatch):
    def ragged_dot(x, w_EDF, sizes):  # leaves rows after the last group undefined
        assert w_EDF.shape == (E, D, F)
        y = jax.lax.ragged_dot(x, w_EDF, sizes)
        return jnp.where(jnp.arange(N)[:, None] < sizes.sum(), y, jnp.nan)

    monkeypatch.setitem(sys.modules, "tokamax", types.SimpleNamespace(ragged_dot=ragged_dot))
    x_ND, w_EPFD = arrays()
    got = GROUPED_MATMUL["tokamax"].function(x_ND, w_EPFD[:, 0], SIZES)
    np.testing.assert_allclose(got, grouped_matmul(x_ND, w_EPFD[:, 0], SIZES), atol=1e-5)
