"""The grouped product and its gradients: right for any grouping, exact in its invariances, sparse in its work."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dsv3_jax.kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from dsv3_jax.kernels.grouped_matmul.reference import ROWS_BY_VECTOR
from dsv3_jax.kernels.grouped_matmul.shapes import DEVICE_SHAPES, SHAPES, Shape

SMALL = ["one_row", "few_rows", "many_experts", "rows_below_tile", "tiles"]


def random_arrays(shape, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(a.shape), a.dtype) for a in shape.arrays()[:2])


def weights_of(N, F):
    return jnp.asarray(np.random.default_rng(9).standard_normal((N, F)), jnp.float32)


@jax.jit
def value_and_gradients(x_ND, w_EFD, group_sizes_E):
    y_NF = grouped_matmul(x_ND, w_EFD, group_sizes_E)
    ct_NF = weights_of(*y_NF.shape)
    dx, dw = jax.grad(lambda x, w: jnp.vdot(grouped_matmul(x, w, group_sizes_E), ct_NF), argnums=(0, 1))(
        x_ND, w_EFD
    )
    return y_NF, dx, dw


def plain(x_ND, w_EFD, group_sizes_E):
    """y, dx, dw by a loop over the experts in float64."""
    x_ND, w_EFD = np.asarray(x_ND, float), np.asarray(w_EFD, float)
    ct_NF = np.asarray(weights_of(len(x_ND), w_EFD.shape[1]), float)
    y, dx, dw = np.zeros_like(ct_NF), np.zeros_like(x_ND), np.zeros_like(w_EFD)
    end = 0
    for e, size in enumerate(group_sizes_E):
        own = slice(end, end := end + size)
        y[own], dx[own], dw[e] = x_ND[own] @ w_EFD[e].T, ct_NF[own] @ w_EFD[e], ct_NF[own].T @ x_ND[own]
    return y, dx, dw


def split(N, E, cuts):
    """Group sizes from fractions of N; they add up to the largest cut, so some rows may be dead."""
    edges = np.sort((np.asarray(cuts) * N).round().astype(int))
    sizes_E = np.zeros(E, np.int32)
    experts = np.linspace(0, E - 1, len(cuts)).round().astype(int)
    np.add.at(sizes_E, experts, np.diff(edges, prepend=0))
    return sizes_E


@pytest.mark.parametrize("name", SMALL)
def test_any_grouping_forward_and_backward(name):
    shape = SHAPES[name]
    x_ND, w_EFD = random_arrays(shape)

    @hypothesis.settings(max_examples=12)
    @hypothesis.given(cuts=st.lists(st.floats(0, 1), min_size=1, max_size=shape.experts))
    @hypothesis.example(cuts=[1.0])  # one hot group
    @hypothesis.example(cuts=[0.0])  # no rows at all
    @hypothesis.example(cuts=[0.5, 0.5, 1.0][: shape.experts])  # an empty group in the middle
    def check(cuts):
        sizes_E = split(shape.rows, shape.experts, cuts)
        got = value_and_gradients(x_ND, w_EFD, jnp.asarray(sizes_E))
        for g, want in zip(got, plain(x_ND, w_EFD, sizes_E), strict=True):
            np.testing.assert_allclose(g, want, atol=1e-4)
        dead = slice(int(sizes_E.sum()), None)
        assert not np.asarray(got[0])[dead].any() and not np.asarray(got[1])[dead].any()

    check()


@pytest.mark.parametrize("name", ["few_rows", "rows_below_tile"])
def test_custom_gradient_against_finite_differences(name):
    shape = SHAPES[name]
    sizes_E = jnp.asarray(split(shape.rows, shape.experts, [0.3, 0.3, 0.9][: shape.experts]))
    run = jax.jit(lambda x, w: grouped_matmul(x, w, sizes_E))
    # The product is linear in each argument, so a wide step has no truncation error.
    check_grads(run, random_arrays(shape), order=1, modes=["rev"], eps=1.0, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shape", [Shape(40, 8, 48, 40), Shape(301, 3, 48, 40)], ids=["by_vector", "by_tile"])
def test_a_row_is_bitwise_independent_of_company_place_and_number_of_rows(shape):
    run = jax.jit(grouped_matmul)
    N, E = shape.rows, shape.experts
    rng = np.random.default_rng(0)
    x_ND, w_EFD = random_arrays(shape)
    expert_N = rng.integers(0, E, N)
    kept_K = rng.choice(N, 20, replace=False)  # these rows go through every run

    def result(rows, expert):
        order = np.argsort(expert, kind="stable")
        sizes_E = jnp.asarray(np.bincount(expert, minlength=E), jnp.int32)
        y = np.asarray(run(jnp.asarray(rows)[order], w_EFD, sizes_E))
        return y[np.argsort(order)]

    want = result(x_ND, expert_N)[kept_K]
    limit = ROWS_BY_VECTOR * E  # within one regime the number of rows may change as well
    for more in [20, N, limit] if limit >= N else [limit + 1, N, 2 * N]:
        expert, place = rng.integers(0, E, more), rng.permutation(more)[:20]
        rows = rng.standard_normal((more, shape.inputs)).astype(np.float32) * 100
        rows[place], expert[place] = np.asarray(x_ND)[kept_K], expert_N[kept_K]
        np.testing.assert_array_equal(result(rows, expert)[place], want)


@pytest.mark.parametrize("name", ["few_rows", "tiles"])
def test_weights_of_experts_without_rows_are_not_read(name):
    shape = SHAPES[name]
    x_ND, w_EFD = random_arrays(shape)
    sizes_E = jnp.zeros(shape.experts, jnp.int32).at[1].set(shape.rows)
    poisoned = jnp.full_like(w_EFD, jnp.nan).at[1].set(w_EFD[1])
    for got, want in zip(
        value_and_gradients(x_ND, poisoned, sizes_E), value_and_gradients(x_ND, w_EFD, sizes_E), strict=True
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("rows", [64, 4096])
def test_no_densification_and_no_gathered_weights(rows):
    N, E, D, F = rows, 32, 64, 96
    arrays = Shape(N, E, D, F).arrays()
    run = jax.grad(lambda x, w, g: (grouped_matmul(x, w, g) ** 2).sum(), argnums=(0, 1))
    compiled = jax.jit(run).lower(*arrays).compile()
    # y and its cotangent, x-sized pieces, a few weights of one expert: nothing of size N F D, N E or E F D.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * (3 * N * (D + F) + 8 * F * D) + 64 * 1024
    products = re.findall(r"f32\[([\d,]+)\]\S* dot\(", compiled.as_text())
    assert products, "no product in the compiled program"
    for dims in products:
        assert np.prod([int(d) for d in dims.split(",")]) <= max(F * D, 256 * F), dims


def test_products_accumulate_in_float32():
    # 2,048 ones: a bfloat16 sum would stop at 256.
    for rows in (4, 64):
        x_ND, w_EFD = jnp.ones((rows, 2048), jnp.bfloat16), jnp.ones((2, 3, 2048), jnp.bfloat16)
        y_NF = jax.jit(grouped_matmul)(x_ND, w_EFD, jnp.array([rows - 1, 1], jnp.int32))
        assert y_NF.dtype == jnp.bfloat16
        np.testing.assert_array_equal(y_NF.astype(jnp.float32), 2048.0)


def test_weight_gradient_of_bfloat16_accumulates_in_float32():
    N = 2048
    x_ND, w_EFD = jnp.ones((N, 2), jnp.bfloat16), jnp.ones((1, 3, 2), jnp.bfloat16)
    run = jax.grad(lambda w: grouped_matmul(x_ND, w, jnp.array([N], jnp.int32)).sum())
    np.testing.assert_array_equal(jax.jit(run)(w_EFD).astype(jnp.float32), N)


def test_gate_and_up_as_one_flattened_weight():
    E, P, F, D, N = 3, 2, 5, 12, 30
    (x_ND, w_EXD), sizes_E = random_arrays(Shape(N, E, D, P * F)), jnp.array([10, 0, 20], jnp.int32)
    w_EPFD = w_EXD.reshape(E, P, F, D)
    y_NPF = grouped_matmul(x_ND, w_EPFD.reshape(E, P * F, D), sizes_E).reshape(N, P, F)
    for p in range(P):  # XLA:CPU of jax 0.12 sums a wider product in another order
        part_NF = grouped_matmul(x_ND, w_EPFD[:, p], sizes_E)
        np.testing.assert_allclose(y_NPF[:, p], part_NF, rtol=1e-5, atol=5e-6)


def test_no_rows():
    _, w_EFD = random_arrays(SHAPES["few_rows"])
    y, dx, dw = value_and_gradients(jnp.zeros((0, 12)), w_EFD, jnp.zeros(8, jnp.int32))
    assert y.shape == (0, 10) and dx.shape == (0, 12) and not np.asarray(dw).any()


@pytest.mark.parametrize("name", ["cpu_100m_decode", "cpu_100m_train", *DEVICE_SHAPES])
def test_full_size_shapes_trace(name):
    x, w, sizes = SHAPES[name].arrays(jnp.bfloat16)
    function = {"grouped_matmul": grouped_matmul, "grouped_swiglu": grouped_swiglu}[SHAPES[name].kind]
    grads = functools.partial(jax.grad, argnums=(0, 1))
    dx, dw = jax.eval_shape(grads(lambda x, w, g: function(x, w, g).sum()), x, w, sizes)
    assert (dx.shape, dw.shape) == (x.shape, w.shape)


def test_shapes_that_disagree_are_refused():
    x_ND, w_EFD = random_arrays(SHAPES["few_rows"])
    with pytest.raises(ValueError, match=r"x \(17, 11\).*disagree"):
        grouped_matmul(x_ND[:, 1:], w_EFD, jnp.zeros(8, jnp.int32))
    with pytest.raises(ValueError, match=r"group_sizes \(7,\) \(E\) disagree"):
        grouped_matmul(x_ND, w_EFD, jnp.zeros(7, jnp.int32))
    with pytest.raises(ValueError, match="x is float32 but w is bfloat16"):
        grouped_matmul(x_ND, w_EFD.astype(jnp.bfloat16), jnp.zeros(8, jnp.int32))
    with pytest.raises(ValueError, match="no implementation 'triton'"):
        grouped_matmul(x_ND, w_EFD, jnp.zeros(8, jnp.int32), implementation="triton")
