"""Muon on stacked leaves: what counts as a matrix, and the update of each against one written out per matrix."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import OptimizerConfig, dims
from dsv3_jax.hf.rules import flatten_paths, hf_entries, rule_for
from dsv3_jax.model import abstract_variables, init_variables
from dsv3_jax.parallel.leaves import sharded_like, storage_shardings
from dsv3_jax.training.muon import matrix_axes, newton_schulz, spread
from dsv3_jax.training.optimizer import make_optimizer
from tests.training import tiny

MUON = OptimizerConfig(name="muon", weight_decay=0.1, clip_norm=0.0)


@functools.cache
def _params() -> Any:
    return jax.device_get(jax.jit(functools.partial(init_variables, tiny.MODEL))(jax.random.key(0)))["params"]


@functools.cache
def _on_one_device(optimizer: OptimizerConfig) -> tuple[Any, Any, Any]:
    """Parameters, state and compiled update."""
    one = make_optimizer(optimizer)
    return _params(), jax.jit(one.init)(_params()), jax.jit(one.update)


def _grads(step: int) -> Any:
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), _params())


def _reference(x: np.ndarray) -> np.ndarray:
    """Muon's update of one matrix, in float64, as published: transpose if tall, five steps, 0.2 sqrt(max(m, n))."""
    scale, tall = 0.2 * np.sqrt(max(x.shape)), x.shape[0] > x.shape[1]
    y = x.T if tall else x
    y = y / (np.linalg.norm(y) + 1e-7)
    for _ in range(5):
        gram = y @ y.T
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    return scale * (y.T if tall else y)


def _by_tensor(tree: Any) -> dict[str, np.ndarray]:
    """Each Hugging Face tensor of a tree of parameters."""
    flat = flatten_paths(tree, "params")
    return {
        entry.name: entry.to_hf(np.asarray(flat[entry.path])[entry.index])
        for entry in hf_entries(tiny.MODEL, {"params": tree})
    }


def test_every_hugging_face_matrix_of_a_layer_is_one_of_ours() -> None:
    sizes = {letter.lower(): size for letter, size in dims(tiny.MODEL).items()}
    chosen = set()
    for path, leaf in flatten_paths(abstract_variables(tiny.MODEL)["params"], "params").items():
        axes = matrix_axes(path)
        name = path.rpartition("/")[2]
        if name.startswith(("embed_", "head_", "router_")) or len(name.rpartition("_")[2]) == 1:
            assert axes is None, path
            continue
        assert axes is not None, path
        chosen.add(name)
        batch = leaf.shape[: len(leaf.shape) - sum(axes)]
        letters = len(rule_for(path).index_letters)
        assert len(batch) == letters, path
        # The pattern itself, through einops, gives the same rows and columns.
        block = np.zeros(leaf.shape[letters:])
        back = " -> ".join(reversed(rule_for(path).pattern.split(" -> ")))
        used = {letter: sizes[letter] for letter in back if letter in sizes}
        rows = leaf.shape[letters : letters + axes[0]]
        assert einops.rearrange(block, back, **used).shape[0] == np.prod(rows), path
    assert {"q_b_HQA", "o_DHU", "gate_up_EPFD", "down_EDF", "gate_up_PID", "proj_DX", "kv_b_HWC"} <= chosen


def test_update_is_that_of_each_matrix_alone() -> None:
    params, state, update = _on_one_device(MUON)
    _, adam_state, adam_update = _on_one_device(OptimizerConfig(weight_decay=0.1, clip_norm=0.0))
    momentum: dict[str, Any] = dict.fromkeys(_by_tensor(params), 0.0)
    for step in range(3):
        updates, state = update(_grads(step), state, params)
        want_adam, adam_state = adam_update(_grads(step), adam_state, params)
        for name, gradient in _by_tensor(_grads(step)).items():
            momentum[name] = 0.95 * momentum[name] + 0.05 * gradient.astype(np.float64)
    have, weights, adam = _by_tensor(updates), _by_tensor(params), _by_tensor(want_adam)
    gradients = _by_tensor(_grads(2))
    matrices = 0
    for name, update_mn in have.items():
        if update_mn.ndim == 2 and not any(part in name for part in ("embed_tokens", "head", "mlp.gate.")):
            want = _reference(0.95 * momentum[name] + 0.05 * gradients[name]) + 0.1 * weights[name]
            matrices += 1
        else:
            want = adam[name]
        np.testing.assert_allclose(update_mn, want, atol=2e-4 * np.abs(want).max(), err_msg=name)
    assert matrices > 80
    # Its size is AdamW's: about 0.2 a weight, whatever the shape (arXiv 2502.16982, section 2.2).
    sizes = {
        name: np.sqrt(np.mean(np.square(u - 0.1 * weights[name])))
        for name, u in have.items()
        if "experts.0" in name
    }
    assert all(0.13 < size < 0.25 for size in sizes.values()), sizes


def test_only_the_leaves_of_adamw_have_a_second_moment() -> None:
    state = jax.eval_shape(make_optimizer(MUON).init, _params())
    nu = flatten_paths(optax.tree_utils.tree_get(state, "nu"))
    mu = flatten_paths(optax.tree_utils.tree_get(state, "mu"))
    assert mu.keys() == flatten_paths(_params()).keys()
    assert nu.keys() == {path for path in mu if matrix_axes(f"params/{path}") is None}
    assert "embed_VD" in nu and "moe/mlp/router/router_ED" in nu and "moe/attention/kv_b_HWC" not in nu


def test_a_matrix_of_zeros_gets_no_update_and_bfloat16_is_near() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 24, 16)).astype(np.float32)
    x[1, 2] = 0.0
    y = np.asarray(newton_schulz(jnp.asarray(x), 5, jnp.float32))
    np.testing.assert_array_equal(y[1, 2], 0.0)
    singular = np.linalg.svd(y[0, 0], compute_uv=False)
    assert 0.6 < singular.min() and singular.max() < 1.3
    near = np.asarray(newton_schulz(jnp.asarray(x), 5, jnp.bfloat16).astype(jnp.float32))
    assert 0 < np.abs(near - y).max() < 0.1


def test_on_eight_devices_the_update_is_that_of_one() -> None:
    params, start, update = _on_one_device(MUON)
    grads = _grads(0)
    want, want_state = update(grads, start, params)
    mesh = tiny.mesh(1, 4, 2)
    many = make_optimizer(MUON, mesh)
    shardings = storage_shardings({"params": params}, mesh)["params"]
    placed, placed_grads = jax.device_put(params, shardings), jax.device_put(grads, shardings)
    moments = jax.jit(many.init)(placed)
    compiled = (
        jax.jit(many.update, out_shardings=(shardings, None)).lower(placed_grads, moments, placed).compile()
    )
    have, state = compiled(placed_grads, moments, placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), have, want)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        jax.tree.leaves(state),
        jax.tree.leaves(want_state),
    )


@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 2, 2)])
def test_experts_are_orthogonalised_where_they_lie(shape: tuple[int, int, int]) -> None:
    mesh = tiny.mesh(*shape)
    experts = {"gate_up_EPFD": (2, 8, 2, 16, 32), "down_EDF": (2, 8, 32, 16)}
    leaves = {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in experts.items()}
    params = {"moe": {"mlp": {"experts": leaves}}}
    where = storage_shardings({"params": params}, mesh)["params"]
    optimizer = make_optimizer(MUON, mesh)
    state = jax.eval_shape(optimizer.init, params)
    state_where = sharded_like(state, params, where, NamedSharding(mesh, P()))

    def placed(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, shardings
        )

    inputs = placed(params, where), placed(state, state_where), placed(params, where)
    program = jax.jit(optimizer.update, out_shardings=(where, state_where)).lower(*inputs).compile().as_text()
    # Whole matrices go to one device and come back; nothing is gathered and no product is summed over devices.
    assert " all-to-all(" in program
    assert " all-gather(" not in program and " all-reduce(" not in program


@pytest.mark.parametrize(
    ("letters", "sizes", "mesh", "spec"),
    [
        # 8 GPUs, expert matrices of V3: experts by `expert`, then by fsdp too.
        (
            ("L", "E", "P"),
            (58, 256, 2),
            dict(fsdp=2, expert=4),
            P(None, ("expert", "fsdp"), None, None, None),
        ),
        # Layers of a dense leaf, where the axis divides them.
        (("L",), (60,), dict(fsdp=4, expert=1), P(("fsdp",), None, None)),
        # Otherwise the matrices themselves stay cut.
        (("L",), (61,), dict(fsdp=4, expert=2), P(None, P.UNCONSTRAINED, P.UNCONSTRAINED)),
        # More layers than experts: `expert` still cuts the experts.
        (("L", "E"), (64, 8), dict(fsdp=2, expert=8), P(("fsdp",), ("expert",), None, None)),
    ],
)
def test_matrices_are_spread_whole_over_the_mesh(
    letters: tuple[str, ...], sizes: tuple[int, ...], mesh: dict[str, int], spec: P
) -> None:
    shape = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, **mesh}
    assert spread(letters, sizes, SimpleNamespace(axis_names=tuple(shape), shape=shape)) == spec  # type: ignore[arg-type]
