"""Experts spread over devices inside the model: one layer and the whole against one device, and no weight gathered.

Tolerance: float32, 1e-5 relative to the largest element of each compared array; sums differ in order only.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.model import Transformer, abstract_variables
from dsv3_jax.model.experts import MoE
from dsv3_jax.parallel import make_mesh
from dsv3_jax.parallel.dispatch import Dispatch, make_dispatch


def mesh_of(size: int) -> Mesh:
    return make_mesh(MeshConfig(fsdp=1, expert=size), jax.devices()[:size])


# Sizes whose products differ, so that an array's size says what it is.
MOE = ModelConfig(
    hidden_size=24, moe_intermediate_size=10, n_routed_experts=16, num_experts_per_tok=3, n_group=8, topk_group=4
)  # fmt: skip


def expert_specs(tree, of_experts: P):
    """Partition of a tree of variables: the experts' leaves by `of_experts`, others replicated."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: of_experts if "'experts'" in jax.tree_util.keystr(path) else P(), tree
    )


def summed_but_experts(grads, specs):
    """Gradients over the axis: an expert's is complete where it lives, others are sums over devices."""
    return jax.tree.map(lambda g, spec: g if spec else lax.psum(g, "expert"), grads, specs)


def assert_same_tree(ours, expected) -> None:
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(ours), strict=True
    ):
        atol = 1e-5 * float(jnp.max(jnp.abs(one)))
        np.testing.assert_allclose(other, one, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def all_gathers(text: str) -> set[int]:
    """Elements of every all-gather's results in compiled HLO."""
    found = set()
    for line in text.splitlines():
        if re.search(r"= .*all-gather(-start)?\(", line):
            for dims in re.findall(r"\w+\[([\d,]+)\]", line.split("all-gather")[0].split("= ")[1]):
                found.add(int(np.prod([int(d) for d in dims.split(",")])))
    return found


def moe_gradients(how: Dispatch | None, variables: dict, x: jax.Array):
    """d sum(y^2) / d (params, x) of an expert layer on one device's tokens."""

    def loss(params, x):
        y, _ = MoE(MOE, how).apply({**variables, "params": params}, x, jnp.ones(x.shape[:2], bool))
        return jnp.sum(y**2)

    return jax.grad(loss, argnums=(0, 1))(variables["params"], x)


def test_padding_is_not_dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it takes no real token's place in a fixed capacity and is not counted as dropped."""
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), moe_shapes())
    seen = []

    def record(x_ND, experts_NK, weights_NK, compute, **how):
        seen.extend([np.asarray(experts_NK), np.asarray(weights_NK)])
        return x_ND, jnp.float32(7)

    monkeypatch.setattr("dsv3_jax.model.experts.dispatch_experts", record)
    real = np.array([[True, False, True, False]])
    _, routing = MoE(MOE, Dispatch(size=2)).apply(variables, jnp.ones((1, 4, 24)), real)
    experts, weights = seen
    assert np.all(experts[~real[0]] == -1) and np.all(experts[real[0]] >= 0)
    assert np.all(weights[~real[0]] == 0) and np.all(weights[real[0]] > 0)
    assert routing.dropped == 7


def moe_shapes() -> dict:
    """The variables of one expert layer of `MOE`, abstract."""
    return jax.eval_shape(
        lambda: MoE(MOE).init(jax.random.key(0), jnp.zeros((1, 2, 24)), jnp.ones((1, 2), bool))
    )


@functools.cache
def moe_on_one_device():
    """Variables, tokens, and the gradients without any dispatch."""
    rng = np.random.default_rng(2)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    variables = jax.tree.map(lambda leaf: normal(*leaf.shape), moe_shapes())
    x = normal(8, 24, 24)  # a row of 24 tokens a device
    return variables, x, jax.jit(functools.partial(moe_gradients, None))(variables, x)


@pytest.mark.parametrize("backend", ["gather", "all_to_all"])
def test_an_expert_layer_gathers_no_expert_weight(backend: str) -> None:
    """Only tokens, and their choices with weights, are: 192 x 24 and 192 x 6; with all_to_all nothing is.

    And forward and backward through the real router and kernels equal one device.
    """
    variables, x, expected = moe_on_one_device()
    specs = expert_specs(variables, P("expert"))

    def device(variables, x):
        params, dx = moe_gradients(Dispatch(size=8, backend=backend), variables, x)
        return summed_but_experts(params, specs["params"]), dx

    sharded = jax.shard_map(
        device,
        mesh=mesh_of(8),
        in_specs=(specs, P("expert")),
        out_specs=(specs["params"], P("expert")),
        check_vma=False,
    )
    program = jax.jit(sharded).lower(variables, x).compile()
    assert all_gathers(program.as_text()) == ({192 * 24, 192 * 6} if backend == "gather" else set())
    assert "all-to-all" in program.as_text() or backend == "gather"
    assert_same_tree(program(variables, x), expected)


def test_the_check_sees_a_gathered_weight() -> None:
    gather = jax.shard_map(
        lambda w: lax.all_gather(w, "expert", tiled=True),
        mesh=mesh_of(8),
        in_specs=P("expert"),
        out_specs=P(),
        check_vma=False,
    )
    text = jax.jit(gather).lower(np.ones((16, 2, 10, 24), np.float32)).compile().as_text()
    assert all_gathers(text) == {16 * 2 * 10 * 24}


MODEL = ModelConfig(
    vocab_size=61, hidden_size=24, intermediate_size=32, moe_intermediate_size=10, num_hidden_layers=1,
    num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2, first_k_dense_replace=0, q_lora_rank=8,
    kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_group=2, topk_group=1,
    max_position_embeddings=64, num_nextn_predict_layers=1, initializer_range=0.1,
)  # fmt: skip


def model_loss(
    model: Transformer, params, router, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """A sum over real positions that reads the main model and the multi-token module; and dropped pairs."""
    where = {"positions_BT": batch["positions_BT"], "segments_BT": batch["segments_BT"]}
    out = model.apply({"params": params, "router": router}, batch["tokens_BT"], **where)
    next_LBT = batch["targets_BT"][None]
    ahead = model.apply({"params": params, "router": router}, out.hidden_BTD, next_LBT, **where, method="mtp")
    real = (batch["segments_BT"] > 0)[:, :, None]
    both = (out.hidden_BTD + 2.0 * ahead.hidden_LBTD[0]) * batch["cotangent_BTD"]
    return jnp.sum(jnp.where(real, both, 0.0)), jnp.sum(out.routing.dropped) + jnp.sum(ahead.routing.dropped)


def test_a_model_over_four_devices_is_the_model_on_one() -> None:
    """Main model and multi-token module, rows with padding, two visits of 6 tokens a device, rematerialised."""
    rng = np.random.default_rng(1)
    B, T = 4, 12
    segments = np.where(np.arange(T)[None, :] < np.array([[12], [7], [3], [10]]), 1, 0).astype(np.int32)
    batch = {
        "tokens_BT": rng.integers(0, 61, (B, T)).astype(np.int32),
        "targets_BT": rng.integers(0, 61, (B, T)).astype(np.int32),
        "segments_BT": segments,
        "positions_BT": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)) * segments,
        "cotangent_BTD": rng.normal(size=(B, T, 24)).astype(np.float32),
    }
    variables = jax.tree.map(
        lambda leaf: (0.2 * rng.normal(size=leaf.shape)).astype(np.float32), abstract_variables(MODEL)
    )
    params, router = variables["params"], variables["router"]
    specs = expert_specs(params, P(None, "expert"))

    def device(params, router, batch):
        how = make_dispatch(MODEL, 4, backend="gather", chunk=6)
        loss = functools.partial(model_loss, Transformer(MODEL, remat="latents", dispatch=how))
        (value, dropped), grads = jax.value_and_grad(loss, has_aux=True)(params, router, batch)
        return *lax.psum((value, dropped), "expert"), summed_but_experts(grads, specs)

    sharded = jax.shard_map(
        device,
        mesh=mesh_of(4),
        in_specs=(specs, P(), P("expert")),
        out_specs=(P(), P(), specs),
        check_vma=False,
    )
    value, dropped, grads = jax.jit(sharded)(params, router, batch)
    alone = jax.jit(jax.value_and_grad(functools.partial(model_loss, Transformer(MODEL)), has_aux=True))
    (expected, _), expected_grads = alone(params, router, batch)
    assert dropped == 0
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_same_tree(grads, expected_grads)
