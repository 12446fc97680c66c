"""Expert dispatch on simulated devices: every backend is the dense layer, forward and backward, and drops nothing.

Tolerance: float32, 1e-5 relative to the largest element of each compared array; sums differ in order only.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.model.router import choose
from dsv3_jax.parallel import dispatch as dispatch_module
from dsv3_jax.parallel import make_mesh
from dsv3_jax.parallel.dispatch import Dispatch, choose_backend, dispatch_experts, make_dispatch, most_peers
from dsv3_jax.parallel.exchange import first_of_peer
from dsv3_jax.parallel.swap import swap_ragged

BACKENDS = ("gather", "all_to_all", "ragged_all_to_all")
TOKENS, EXPERTS, CHOICES, WIDTH, HIDDEN = 104, 16, 3, 8, 6  # 13 tokens on each of 8 devices


class Case(NamedTuple):
    """One global batch: x [T, D], distinct experts [T, K], weights [T, K], expert weights, and dL/dy."""

    x: np.ndarray
    experts: np.ndarray
    weights: np.ndarray
    up: np.ndarray
    down: np.ndarray
    cotangent: np.ndarray


def routed(kind: str, rng: np.random.Generator, experts: int) -> np.ndarray:
    """Distinct choices of every token."""
    chosen = np.stack([rng.permutation(experts)[:CHOICES] for _ in range(TOKENS)])
    if kind == "hot":  # everything to one expert, what else there is at random
        others = [e for e in range(experts) if e != 5]
        chosen = np.stack([[5, *rng.permutation(others)[: CHOICES - 1]] for _ in range(TOKENS)])
    elif kind == "one shard":  # as much as can be on the first device's experts
        chosen = np.stack([rng.permutation(CHOICES) for _ in range(TOKENS)])
    elif kind == "empty experts":  # only even ones are ever chosen
        chosen = np.stack([2 * rng.permutation(experts // 2)[:CHOICES] for _ in range(TOKENS)])
    elif kind == "padding":  # some tokens have no expert at all, some fewer
        chosen = np.where(rng.random((TOKENS, CHOICES)) < 0.2, -1, chosen)
        chosen[TOKENS // 2 : TOKENS // 2 + 15] = -1
    return chosen.astype(np.int32)


def case(kind: str, experts: int = EXPERTS, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    chosen = routed(kind, rng, experts)
    weights = np.where(chosen < 0, 0.0, rng.random(chosen.shape) + 0.1).astype(np.float32)
    up, down = normal(experts, HIDDEN, WIDTH), normal(experts, WIDTH, HIDDEN)
    return Case(normal(TOKENS, WIDTH), chosen, weights, up, down, normal(TOKENS, WIDTH))


@jax.jit
def dense(batch: Case) -> tuple[jax.Array, ...]:
    """Every expert on every token: y, and the gradients of x, weights and expert weights."""

    def layer(x, weights, up, down):
        y = jnp.zeros_like(x)
        for e in range(up.shape[0]):
            own = jnp.sum(jnp.where(batch.experts == e, weights, 0.0), axis=1)
            hidden = jnp.tanh(jnp.dot(x, up[e].T, precision="highest"))
            y = y + own[:, None] * jnp.dot(hidden, down[e].T, precision="highest")
        return y

    y, pull = jax.vjp(layer, batch.x, batch.weights, batch.up, batch.down)
    return y, *pull(batch.cotangent)


def expert_layer(up: jax.Array, down: jax.Array, rows: jax.Array, sizes: jax.Array) -> jax.Array:
    """The same layer on rows sorted by expert."""
    expert = jnp.sum(jnp.arange(rows.shape[0])[:, None] >= jnp.cumsum(sizes)[None, :], axis=1)
    own = jax.nn.one_hot(expert, up.shape[0], dtype=rows.dtype)
    up, down = up.astype(rows.dtype), down.astype(rows.dtype)
    product = functools.partial(jnp.einsum, precision="highest")
    hidden = jnp.tanh(product("RE,EFD,RD->RF", own, up, rows))
    return product("RE,EDF,RF->RD", own, down, hidden)


def emulated_ragged(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `jax.lax.ragged_all_to_all` is documented to do, out of all-gathers (XLA:CPU lacks it)."""
    me = lax.axis_index(axis_name)
    rows_PR, start_P, count_P, target_P = (
        x if x.ndim > 2 else x[:, me]  # what each peer sends, and its arguments for this device
        for x in (lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets))
    )
    at_R = jnp.arange(operand.shape[0])[None, :]
    place_PR = jnp.where(at_R < recv_sizes[:, None], target_P[:, None] + at_R, output.shape[0])
    # A wrong size on either side shows: rows that the sender did not mean to send are NaN.
    sent_PR = jnp.where(at_R < count_P[:, None], start_P[:, None] + at_R, operand.shape[0])
    block = jax.vmap(lambda rows, index: rows.at[index].get(mode="fill", fill_value=jnp.nan))(
        rows_PR, sent_PR
    )
    return output.at[place_PR].set(block, mode="drop")


def mesh_of(data: int, size: int) -> Mesh:
    return make_mesh(MeshConfig(data=data, fsdp=1, expert=size), jax.devices()[: data * size])


def compile_with_stand_in(function, *arguments):
    """`function` compiled with the emulation of the ragged exchange; the platform check is told of a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        ragged = functools.partial(swap_ragged, primitive=emulated_ragged)
        patch.setattr(dispatch_module, "swap_ragged", ragged)
        return jax.jit(function).lower(*arguments).compile()


@functools.cache
def layer_on(data: int, how: Dispatch, experts: int = EXPERTS, dtype: str = "float32"):
    """(Case) -> y, the four gradients, dropped of every device; one program for all cases."""

    def device(batch: Case):
        def layer(x, weights, up, down):
            compute = functools.partial(expert_layer, up, down)
            return dispatch_experts(x, batch.experts, weights, compute, dispatch=how, num_experts=experts)

        y, pull, dropped = jax.vjp(layer, batch.x, batch.weights, batch.up, batch.down, has_aux=True)
        dx, dweights, dup, ddown = pull(batch.cotangent)
        # Tokens are cut over both axes, expert weights are the same along data.
        return y, dx, dweights, lax.psum(dup, "data"), lax.psum(ddown, "data"), dropped[None]

    tokens, shard = P(("data", "expert")), P("expert")
    sharded = jax.shard_map(
        device,
        mesh=mesh_of(data, how.size),
        in_specs=(Case(tokens, tokens, tokens, shard, shard, tokens),),
        out_specs=(tokens, tokens, tokens, shard, shard, tokens),
        check_vma=False,
    )
    batch = case("random", experts)
    halves = {name: getattr(batch, name).astype(dtype) for name in ("x", "cotangent")}
    return compile_with_stand_in(sharded, batch._replace(**halves))


def assert_dense(outputs: tuple[jax.Array, ...], batch: Case) -> None:
    *ours, dropped = outputs
    for name, one, other in zip(("y", "dx", "dweights", "dup", "ddown"), ours, dense(batch), strict=True):
        other = np.asarray(other)
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max(), err_msg=name)
    assert np.sum(dropped) == 0


KINDS = ("random", "hot", "one shard", "empty experts", "padding")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_every_backend_is_the_dense_layer(backend: str, size: int) -> None:
    """At size 8 "hot" takes two visits of the experts' buffer and two exchanges, "one shard" three visits."""
    run = layer_on(1, Dispatch(size=size, backend=backend, platform="gpu"))
    for kind in KINDS:
        assert_dense(run(case(kind)), case(kind))


def test_one_device_is_the_dense_layer() -> None:
    run = layer_on(1, Dispatch())
    for kind in set(KINDS) - {"padding"}:  # it computes a zero-weighted expert for -1
        assert_dense(run(case(kind)), case(kind))


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_beside_a_data_axis_are_the_dense_layer(backend: str) -> None:
    """Data 2 x expert 4, 13 tokens a device in visits of 5; where one data row is hot, loops differ in length."""
    run = layer_on(2, Dispatch(size=4, backend=backend, chunk=5, platform="gpu"))
    hot, random = case("hot"), case("random")
    mixed = hot._replace(experts=np.concatenate([hot.experts[: TOKENS // 2], random.experts[TOKENS // 2 :]]))
    for batch in (hot, random, mixed, case("padding")):
        assert_dense(run(batch), batch)


@pytest.mark.parametrize("backend", ["gather", "all_to_all"])
def test_one_expert_a_device_is_the_dense_layer(backend: str) -> None:
    run = layer_on(1, Dispatch(size=8, backend=backend, platform="gpu"), experts=8)
    for kind in KINDS:
        assert_dense(run(case(kind, experts=8)), case(kind, experts=8))


@pytest.mark.parametrize("backend", ["gather", "all_to_all"])
def test_bfloat16_tokens_stay_bfloat16(backend: str) -> None:
    """y and dx in the tokens' type, weights' gradients in float32; within bfloat16's rounding of the dense layer."""
    batch = case("hot")
    half = batch._replace(x=batch.x.astype(jnp.bfloat16), cotangent=batch.cotangent.astype(jnp.bfloat16))
    y, dx, dweights, dup, _, _ = layer_on(1, Dispatch(size=8, backend=backend), dtype="bfloat16")(half)
    assert [z.dtype for z in (y, dx, dweights, dup)] == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32]
    for one, other in zip((y, dx, dweights, dup), dense(batch), strict=False):
        np.testing.assert_allclose(
            np.asarray(one, np.float32), other, rtol=0, atol=0.02 * np.abs(other).max()
        )


@functools.cache
def counted_on(how: Dispatch):
    """(experts [T, K]) -> [T], how many pairs of each token came back, and dropped of every device."""

    def device(chosen):
        ones = jnp.ones((chosen.shape[0], 1))
        weights = jnp.where(chosen < 0, 0.0, 1.0)
        y, dropped = dispatch_experts(
            ones, chosen, weights, lambda rows, sizes: rows, dispatch=how, num_experts=EXPERTS
        )
        return y[:, 0], dropped[None]

    spec = P("expert")
    sharded = jax.shard_map(
        device, mesh=mesh_of(1, how.size), in_specs=spec, out_specs=(spec, spec), check_vma=False
    )
    return compile_with_stand_in(sharded, np.zeros((TOKENS, CHOICES), np.int32))


# Distinct choices, any of which may be absent: a permutation's head, masked.
TOKEN = st.tuples(
    st.lists(st.integers(0, EXPERTS - 1), min_size=CHOICES, max_size=CHOICES, unique=True),
    st.integers(0, 2**CHOICES - 1),
)


def chosen_from(kinds: list[tuple[list[int], int]]) -> np.ndarray:
    """Tokens that repeat a few drawn ones, so that routing is as uneven as it gets."""
    rows = [[-1 if mask >> k & 1 else e for k, e in enumerate(experts)] for experts, mask in kinds]
    return np.array([rows[t * len(rows) // TOKENS] for t in range(TOKENS)], np.int32)


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(kinds=st.lists(TOKEN, min_size=1, max_size=12))
def test_every_pair_comes_back_once(backend: str, kinds: list[tuple[list[int], int]]) -> None:
    chosen = chosen_from(kinds)
    came, dropped = counted_on(Dispatch(size=8, backend=backend, platform="gpu"))(chosen)
    np.testing.assert_array_equal(came, np.sum(chosen >= 0, axis=1))
    assert np.sum(dropped) == 0


@pytest.mark.parametrize("backend", ["all_to_all", "ragged_all_to_all"])
@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(kinds=st.lists(TOKEN, min_size=1, max_size=12))
def test_a_fixed_capacity_drops_what_it_says(backend: str, kinds: list[tuple[list[int], int]]) -> None:
    """8 rows a peer: each device's first eight tokens for a peer are kept, their later ones for it dropped."""
    chosen = chosen_from(kinds)
    how = Dispatch(size=8, backend=backend, capacity_factor=1.0, platform="gpu")
    came, dropped = counted_on(how)(chosen)
    expected_came, expected_dropped = np.zeros(TOKENS), np.zeros(8)
    for device in range(8):
        taken = np.zeros(8, int)
        for t in range(device * 13, device * 13 + 13):
            peers = chosen[t][chosen[t] >= 0] // (EXPERTS // 8)
            kept = taken < 8
            taken += np.isin(np.arange(8), peers)
            expected_came[t] = np.sum(kept[peers])
            expected_dropped[device] += np.sum(~kept[peers])
    np.testing.assert_array_equal(came, expected_came)
    np.testing.assert_array_equal(dropped, expected_dropped)


def test_a_small_capacity_does_drop() -> None:
    """The property above is not empty: 13 tokens a device to one expert, 8 rows for it."""
    chosen = np.tile(np.array([[5, -1, -1]], np.int32), (TOKENS, 1))
    how = Dispatch(size=8, backend="all_to_all", capacity_factor=1.0, platform="gpu")
    np.testing.assert_array_equal(counted_on(how)(chosen)[1], np.full(8, 5.0))


def test_the_ragged_exchange_lowers_for_cuda_and_nowhere_else() -> None:
    how = Dispatch(size=8, backend="ragged_all_to_all", platform="cuda")
    batch = case("random")

    def device(x, experts, weights, up, down):
        def loss(x, up, down):
            compute = functools.partial(expert_layer, up, down)
            y, _ = dispatch_experts(x, experts, weights, compute, dispatch=how, num_experts=EXPERTS)
            return jnp.sum(y**2)

        return jax.grad(loss, argnums=(0, 1, 2))(x, up, down)

    spec = P("expert")
    sharded = jax.shard_map(
        device, mesh=mesh_of(1, 8), in_specs=(spec,) * 5, out_specs=(spec,) * 3, check_vma=False
    )
    text = jax.jit(sharded).trace(*batch[:5]).lower(lowering_platforms=("cuda",)).as_text()
    assert "ragged_all_to_all" in text
    with pytest.raises(ConfigError, match="cannot run on cpu"):
        choose_backend(Dispatch(size=8, backend="ragged_all_to_all"), CHOICES)


def test_the_backend_follows_the_shape_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    v3 = ModelConfig()
    dispatch_module._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, "dsv3_jax.parallel.dispatch"):
        chosen = {size: make_dispatch(v3, size).backend for size in (4, 8, 16, 64)}
        make_dispatch(v3, 64)
    assert chosen == {4: "gather", 8: "gather", 16: "gather", 64: "all_to_all"}
    assert [r.getMessage() for r in caplog.records if "of 64" in r.getMessage()] == [
        "expert dispatch: backend 'all_to_all', as a token's experts lie on only 8 of 64 devices"
    ]
    assert make_dispatch(v3, 4, capacity_factor=1.5).backend == "all_to_all"
    assert make_dispatch(v3, 4, backend="all_to_all").backend == "all_to_all"
    assert make_dispatch(v3, 1) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 3}, r"mesh.expert is 3; expected a divisor of model.n_routed_experts = 256"),
        ({"size": 4, "backend": "broadcast"}, r"backend is 'broadcast'; expected one of auto, gather"),
        ({"size": 4, "backend": "gather", "capacity_factor": 1.0}, r"which drops nothing"),
        ({"size": 4, "chunk": -1}, r"chunk is -1"),
        ({"size": 4, "backend": "ragged_all_to_all"}, r"cannot run on cpu: XLA implements it for GPUs only"),
    ],
)
def test_a_dispatch_that_cannot_work_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_dispatch(ModelConfig(), **arguments)


@pytest.mark.parametrize(
    ("size", "n_group", "topk_group", "expected"),
    [(8, 8, 2, 2), (4, 8, 2, 2), (16, 8, 2, 4), (32, 8, 1, 4), (8, 1, 1, 6), (2, 8, 4, 2), (16, 2, 1, 6)],
)
def test_node_limited_routing_bounds_the_fan_out(
    size: int, n_group: int, topk_group: int, expected: int
) -> None:
    """A token is sent to at most `most_peers` devices, and the bound is met by some token."""
    cfg = ModelConfig(n_routed_experts=64, num_experts_per_tok=6, n_group=n_group, topk_group=topk_group)
    assert most_peers(cfg, size) == expected
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(400, 64)), jnp.float32)
    sent = first_of_peer(choose(cfg, scores, None).experts_NK // (64 // size)) >= 0
    fan_out = np.sum(np.asarray(sent), axis=1)
    assert fan_out.max() == expected
