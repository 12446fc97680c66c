"""Training with FP8 products: what is rounded and what is not, devices agree, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig, parse_kernels
from dsv3_jax.errors import ConfigError
from dsv3_jax.hf.rules import flatten_paths
from dsv3_jax.kernels.fp8_matmul import linear as fp8
from dsv3_jax.model import abstract_variables, init_variables
from dsv3_jax.model.rounding import Rounding, rounding_products
from dsv3_jax.training.losses import loss_fn
from dsv3_jax.training.step import init_state, make_train_step
from tests.training import tiny

# Two layers, no multi-token module: little to compile.
MODEL = dataclasses.replace(tiny.MODEL, num_hidden_layers=2, num_nextn_predict_layers=0)
EXACT = dataclasses.replace(tiny.RUN, model=MODEL)
RUN = tiny.replace(EXACT, "training", products="fp8")


@pytest.fixture(scope="module")
def variables():
    return init_variables(MODEL, jax.random.key(0))


@functools.partial(jax.jit, static_argnums=(3, 4))
def loss_and_gradients(params, router, batch, cfg, training):
    return jax.value_and_grad(lambda p: loss_fn(p, router, batch, cfg, training)[0])(params)


def test_matrices_of_attention_and_feed_forward_layers_are_rounded_and_nothing_else():
    params = jax.tree.map(lambda a: jnp.zeros(a.shape), abstract_variables(tiny.MODEL)["params"])
    rounded = {
        p
        for p, leaf in flatten_paths(rounding_products(params, "auto")).items()
        if isinstance(leaf, Rounding)
    }
    names = {path.rpartition("/")[2] for path in rounded}
    assert names == {
        "q_a_AD", "q_b_HQA", "kv_a_JD", "kv_b_HWC", "o_DHU", "gate_up_PID", "down_DI", "gate_up_PMD", "down_DM",
        "gate_up_EPFD", "down_EDF",
    }  # fmt: skip
    left = {path.rpartition("/")[2] for path in flatten_paths(params) if path not in rounded}
    assert {"embed_VD", "head_VD", "router_ED", "proj_DX"} <= left


def test_every_rounded_product_is_an_fp8_product(variables, monkeypatch):
    """Forward and backward: as many of each as the model has products (main layers are scanned: traced once)."""
    seen = []
    for name in ("linear", "grouped_linear"):
        real = getattr(fp8, name)
        monkeypatch.setattr(
            f"dsv3_jax.model.module.{name}",
            lambda *a, real=real, name=name: (seen.append((name, a[1].shape)), real(*a))[1],
        )
    jax.eval_shape(
        lambda p: loss_fn(p, variables["router"], tiny.batch(), MODEL, RUN.training)[0],
        variables["params"],
    )
    shapes = {shape for name, shape in seen if name == "linear"}
    H, Q, A, D, C, W = 2, 12, 16, 32, 16, 16
    attention = {(A, D), (H * Q, A), (C + 4, D), (H * W, C), (D, H * 8)}
    assert shapes == attention | {(2 * 48, D), (D, 48), (2 * 16, D), (D, 16)}
    assert {shape for name, shape in seen if name == "grouped_linear"} == {(8, 32, 32), (8, 32, 16)}


def test_loss_and_gradients_are_near_those_of_the_compute_type_and_not_equal():
    """Without routing, where one rounding can send a token to another expert: two layers of width 32, whose products,
    one after another, are each off by a few per cent."""
    cfg = dataclasses.replace(MODEL, first_k_dense_replace=2)
    variables = init_variables(cfg, jax.random.key(0))
    (loss, grads), (exact_loss, exact) = (
        loss_and_gradients(variables["params"], variables["router"], tiny.batch(), cfg, run.training)
        for run in (RUN, EXACT)
    )
    assert 1e-5 < abs(loss - exact_loss) / exact_loss < 5e-3
    grads, exact = flatten_paths(grads), flatten_paths(exact)
    for path, want in exact.items():
        assert grads[path].dtype == want.dtype == jnp.float32
        off = np.linalg.norm(grads[path] - want) / np.linalg.norm(want)
        assert 0.01 < off < 0.25, (path, off)
    whole, want = (np.concatenate([np.ravel(tree[path]) for path in exact]) for tree in (grads, exact))
    assert whole @ want / np.linalg.norm(whole) / np.linalg.norm(want) > 0.98


def test_eight_devices_train_as_one():
    """Two steps, experts over four devices. Rows and weights are rounded alike everywhere; only the blocks of tokens
    that share a scale in dW are other ones."""
    mesh = dict(fsdp=2, expert=4)
    found = []
    for where in (dict(), mesh):
        cfg = dataclasses.replace(RUN, mesh=MeshConfig(**{"fsdp": 1, **where}))
        devices = tiny.mesh(**where)
        state, step = tiny.state(cfg, devices), jax.jit(make_train_step(cfg, devices))
        losses = []
        for seed in range(2):
            state, metrics = step(state, tiny.batch(cfg, seed))
            losses.append(float(metrics["loss"]))
        found.append((losses, float(metrics["grad_norm"])))
    (one, one_norm), (eight, eight_norm) = found
    assert eight[0] == pytest.approx(one[0], rel=1e-5)  # before any update
    assert eight[1] == pytest.approx(one[1], rel=2e-3) and eight_norm == pytest.approx(one_norm, rel=2e-2)


def test_master_weights_and_moments_stay_float32():
    state = jax.eval_shape(lambda: init_state(RUN, tiny.mesh()))
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state))} <= {
        jnp.dtype("float32"), jnp.dtype("int32"),
    }  # fmt: skip


def test_what_it_does_not_go_with_is_refused(variables):
    with pytest.raises(ConfigError, match=r"mesh.tensor is 2; expected 1 with training.products = fp8"):
        dataclasses.replace(RUN, mesh=MeshConfig(tensor=2))
    params = dict(variables["params"])
    moe = dict(params["moe"], attention=dict(params["moe"]["attention"], q_a_AD=object()))
    with pytest.raises(ConfigError, match="q_a_AD is object"):
        rounding_products(params | {"moe": moe}, "auto")


def test_kernels_are_chosen_for_it(variables):
    """A named kernel that cannot run here ends the trace: each choice reaches its products, and no others."""

    def gradients(kernels):
        chosen = dict(kernels=parse_kernels(kernels))
        loss = lambda p: loss_fn(p, variables["router"], tiny.batch(), MODEL, RUN.training, **chosen)[0]  # noqa: E731
        jax.eval_shape(jax.grad(loss), variables["params"])

    with pytest.raises(ConfigError, match="fp8_matmul: implementation 'mosaic' cannot run"):
        gradients("quantized_matmul=mosaic")
    with pytest.raises(ConfigError, match="grouped_matmul: implementation 'mosaic' cannot run"):
        gradients("grouped_matmul=mosaic")
    gradients("quantized_matmul=reference,grouped_matmul=auto")
