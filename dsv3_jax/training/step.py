"""The training step: one pure function (state, batch) -> (state, metrics), for any mesh.

Inside one `jax.shard_map` each device computes loss and gradients of its rows with weights gathered where they are
used (`dsv3_jax.parallel.leaves`); sums over the mesh's batch axes make them those of the global batch, each device
keeping its part. Everything after that is ordinary single-device code on arrays that stay cut as they are stored.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import ModelConfig, RunConfig, parse_kernels
from dsv3_jax.errors import ConfigError
from dsv3_jax.finetune import Lora, abstract_pairs, attach, init_pairs
from dsv3_jax.finetune.base import FrozenBase
from dsv3_jax.model import abstract_variables, init_variables, max_violation
from dsv3_jax.parallel import BATCH_AXES
from dsv3_jax.parallel.dispatch import Dispatch, make_dispatch
from dsv3_jax.parallel.leaves import (
    compute_copies,
    placements,
    reduce_gradients,
    sharded_like,
    storage_shardings,
)
from dsv3_jax.training.evaluation import EvalSums, evaluation_sums
from dsv3_jax.training.guards import Guard, init_guard, judge, remember
from dsv3_jax.training.losses import Parts, Totals, count_totals, loss_fn
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.schedules import balance_rate, batch_schedule, learning_rate, mtp_weight

Array = jax.Array
Batch = Mapping[str, Array]
Metrics = dict[str, Array]


@struct.dataclass
class State:
    """Everything a step changes.

    Attributes:
      step: int32, steps done.
      params: float32 master weights.
      router: selection biases of the balance rule.
      opt_state: moments.
      guard: losses and gradient norms of the last applied steps.
      frozen: weights under LoRA pairs, as they are stored; `params` is then the tree of pairs, and `router` is
        frozen too.
    """

    step: Array
    params: Any
    router: Any
    opt_state: Any
    guard: Guard
    frozen: Any = None


def shards_of(mesh: jax.sharding.Mesh) -> int:
    """How many parts a batch is cut into."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Where a batch [B, T] lives."""
    return NamedSharding(mesh, P(BATCH_AXES))


def dispatch_of(cfg: RunConfig, mesh: jax.sharding.Mesh) -> Dispatch | None:
    """How tokens reach experts on this mesh. Raises ConfigError as `make_dispatch` does."""
    return make_dispatch(
        cfg.model,
        mesh.shape["expert"],
        backend=cfg.moe.dispatch,
        chunk=cfg.moe.chunk,
        capacity_factor=cfg.moe.capacity_factor,
        platform=mesh.devices.flat[0].platform,
    )


def abstract_weights(cfg: RunConfig, base: FrozenBase | None) -> tuple[Any, Any, Any]:
    """Shapes of (what is trained, router, what is frozen); without a base the model's weights are trained."""
    if base is None:
        variables = abstract_variables(cfg.model)
        return variables["params"], variables["router"], None
    pairs = abstract_pairs(base.lora, base.abstract)["params"]
    return pairs, base.abstract["router"], base.abstract["params"]


def state_shardings(cfg: RunConfig, mesh: jax.sharding.Mesh, base: FrozenBase | None = None) -> State:
    """Where each leaf of the state lives: weights and moments by the storage table, the rest everywhere."""
    everywhere = NamedSharding(mesh, P())
    params, router, frozen = abstract_weights(cfg, base)
    where = storage_shardings({"params": params, "router": router}, mesh)
    opt_state = jax.eval_shape(make_optimizer(cfg.optimizer).init, params)
    return State(
        everywhere,
        where["params"],
        where["router"],
        sharded_like(opt_state, params, where["params"], everywhere),
        jax.tree.map(lambda _: everywhere, jax.eval_shape(init_guard)),
        None if frozen is None else storage_shardings({"params": frozen}, mesh)["params"],
    )


def init_state(cfg: RunConfig, mesh: jax.sharding.Mesh, variables: Any = None) -> State:
    """Step 0 on a mesh: the given variables, or fresh ones from the seed (the same on every mesh); zero moments."""
    where = state_shardings(cfg, mesh)
    weights = {"params": where.params, "router": where.router}
    if variables is None:
        fresh = jax.jit(functools.partial(init_variables, cfg.model), out_shardings=weights)
        variables = fresh(jax.random.key(cfg.seed))

    placed = jax.tree.map(_placed, variables, weights)
    return jax.jit(functools.partial(_start, cfg), out_shardings=where, donate_argnums=0)(placed)


def init_lora_state(cfg: RunConfig, mesh: jax.sharding.Mesh, base: FrozenBase) -> State:
    """Step 0 of a LoRA run: pairs from the seed, the base as it is stored, zero moments."""
    where = state_shardings(cfg, mesh, base)

    def start(key: Array) -> State:
        pairs = init_pairs(base.lora, base.abstract, key)["params"]
        return _start(cfg, {"params": pairs, "router": None})

    state = jax.jit(start, out_shardings=where.replace(router=None, frozen=None))(jax.random.key(cfg.seed))  # type: ignore[attr-defined]
    return with_frozen(state, where, base)


def with_frozen(state: State, where: State, base: FrozenBase) -> State:
    """The state with the base on its devices: each process reads what they hold."""
    sharded = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    loaded = base.load(jax.tree.map(sharded, base.abstract, {"params": where.frozen, "router": where.router}))
    return state.replace(router=loaded["router"], frozen=loaded["params"])  # type: ignore[attr-defined]


def _start(cfg: RunConfig, variables: Any) -> State:
    params = variables["params"]
    opt_state = make_optimizer(cfg.optimizer).init(params)
    return State(jnp.zeros((), jnp.int32), params, variables["router"], opt_state, init_guard())


def _placed(x: Any, where: NamedSharding) -> Array:
    """x cut as `where` says. Of a host array each process takes its devices' parts; nothing is sent or compared."""
    if isinstance(x, jax.Array):
        return jax.device_put(x, where)
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


def abstract_state(cfg: RunConfig, mesh: jax.sharding.Mesh, base: FrozenBase | None = None) -> State:
    """Shapes and shardings of the state (what a restore and a plan need); no device is touched."""
    params, router, frozen = abstract_weights(cfg, base)
    state = jax.eval_shape(functools.partial(_start, cfg), {"params": params, "router": router})
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        state.replace(frozen=frozen),
        state_shardings(cfg, mesh, base),
    )


def check_batch(cfg: RunConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError when the batch cannot be cut into devices times micro-batches."""
    parts, accumulate = shards_of(mesh), cfg.training.accumulate
    for size in reversed(batch_schedule(cfg.training).sizes):
        if size % (parts * accumulate):
            ramp = "" if size == cfg.training.batch_size else f", and {size} in its ramp"
            raise ConfigError(
                f"training.batch_size is {cfg.training.batch_size}{ramp}; expected a multiple of {parts} devices x "
                f"training.accumulate = {accumulate}"
            )


def make_train_step(
    cfg: RunConfig, mesh: jax.sharding.Mesh, base: FrozenBase | None = None
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The step of a run on a mesh; jit it with the state donated. With a base it trains the pairs alone.

    Raises ConfigError when the batch cannot be cut into devices times micro-batches, or a quantised base over `tensor`.

    Metrics: loss, ce_loss, mtp_loss, balance_loss, grad_norm (before clipping), lr, tokens (real tokens of the
    batch), skipped (1 when loss or gradient was not finite or a spike, so that weights and moments were left as they
    were), spike (1 when it was that), maxvio (mean over expert layers), balanced_fraction (of experts within 50 % of
    their layer's mean load), router_entropy (mean over layers and tokens, nats), dropped, expert_counts_LE; bias_min,
    bias_max and bias_std_L of the selection biases the step used.
    """
    check_batch(cfg, mesh)
    where = state_shardings(cfg, mesh, base)
    layout = weights_layout(cfg, mesh, base)
    specs = layout.specs
    gradients = jax.shard_map(
        functools.partial(_shard_gradients, cfg, layout, dispatch_of(cfg, mesh)),
        mesh=mesh,
        in_specs=(specs, P(), P(BATCH_AXES), P(), layout.frozen_specs),
        out_specs=(specs, P(), P(), P()),
        check_vma=False,  # sums over the mesh are written out: parallel/leaves.py
    )
    optimizer = make_optimizer(cfg.optimizer, mesh)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        step = state.step + 1
        grads, loss, sums, totals = gradients(
            state.params, state.router, batch, mtp_weight(cfg.training, step), state.frozen
        )
        lr = learning_rate(cfg.optimizer, cfg.training, step)
        grad_norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(grads)))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
        router = state.router
        if base is None:
            router = balance_update(cfg.model, router, sums.counts_LE, balance_rate(cfg.training, step))
        # A select, never a product: 0 * NaN is NaN.
        ok, spike = judge(state.guard, loss, grad_norm, cfg.training.spike_guard)
        params, router, opt_state = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old),
            (params, router, opt_state),
            (state.params, state.router, state.opt_state),
        )
        metrics = {
            "loss": loss,
            "ce_loss": sums.ce,
            "mtp_loss": sums.mtp,
            "balance_loss": sums.balance,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": totals.tokens,
            "skipped": 1 - ok.astype(jnp.int32),
            "spike": spike.astype(jnp.int32),
            **routing_metrics(sums, totals),
            **bias_metrics(state.router),
        }
        guard = remember(state.guard, ok, loss, grad_norm)
        new = State(step, params, router, opt_state, guard)
        trained = where.replace(frozen=None)  # type: ignore[attr-defined]
        new = jax.lax.with_sharding_constraint(new, trained)
        return new.replace(frozen=state.frozen), metrics

    return train_step


@dataclasses.dataclass(frozen=True)
class WeightsLayout:
    """How the weights lie on a mesh, and how what is trained and what is frozen make one tree.

    placed, frozen_placed: placements (`parallel.leaves`); specs, frozen_specs: partitions of the stored parts.
    """

    lora: Lora | None
    placed: Any
    specs: Any
    frozen_placed: Any
    frozen_specs: Any

    def joined(self, weights: Any, frozen: Any) -> Any:
        """The tree that the model takes."""
        return weights if self.lora is None else attach(frozen, weights, self.lora)


def weights_layout(cfg: RunConfig, mesh: jax.sharding.Mesh, base: FrozenBase | None = None) -> WeightsLayout:
    """The layout of a run's weights on a mesh. Raises ConfigError for a quantised base cut over `tensor`."""
    params, _, frozen = abstract_weights(cfg, base)
    if base is not None and base.formats and mesh.shape["tensor"] > 1:
        raise ConfigError(
            f"mesh.tensor is {mesh.shape['tensor']}; expected 1 with a quantised base, whose matrices stay whole"
        )

    def both(tree: Any) -> tuple[Any, Any]:
        where = storage_shardings({"params": tree}, mesh)["params"]
        return placements({"params": tree}, mesh)["params"], jax.tree.map(lambda x: x.spec, where)

    return WeightsLayout(
        None if base is None else base.lora,
        *both(params),
        *((None, None) if frozen is None else both(frozen)),
    )


def _shard_gradients(
    cfg: RunConfig,
    layout: WeightsLayout,
    dispatch: Dispatch | None,
    params: Any,
    router: Any,
    batch: Batch,
    weight: Array,
    frozen: Any,
) -> tuple[Any, Array, Parts, Totals]:
    """This device's part of the gradients of the global batch; loss and sums of that batch."""
    totals = lax.psum(count_totals(batch, cfg.model), BATCH_AXES)
    weights = compute_copies(params, layout.placed, cfg.model.dtype)
    frozen = compute_copies(frozen, layout.frozen_placed, cfg.model.dtype)
    n, kernels = cfg.training.accumulate, parse_kernels(cfg.kernels)

    def one(micro: Batch) -> tuple[tuple[Array, Parts], Any]:
        def loss(weights: Any) -> tuple[Array, Parts]:
            whole = layout.joined(weights, frozen)
            return loss_fn(whole, router, micro, cfg.model, cfg.training, totals, dispatch, weight, kernels)

        return jax.value_and_grad(loss, has_aux=True)(weights)

    if n == 1:
        (loss, sums), grads = one(batch)
    else:
        micros = jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), dict(batch))

        def visit(total: Any, micro: Batch) -> tuple[Any, None]:
            return jax.tree.map(lambda sum_, x: sum_ + x.astype(sum_.dtype), total, one(micro)), None

        first = jax.tree.map(lambda x: x[0], micros)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(one, first))
        ((loss, sums), grads), _ = lax.scan(visit, zeros, micros)
    loss, sums = lax.psum((loss, sums), BATCH_AXES)
    return reduce_gradients(grads, layout.placed), loss, sums, totals


def balance_update(cfg: ModelConfig, router: Any, counts_LE: Array, rate: Array | float) -> Any:
    """b += rate * sign(mean(count) - count) for every expert layer (arXiv 2408.15664, V3 report 2.1.2).

    Args:
      router: the collection of biases; {} for models without.
      counts_LE: tokens of the global batch at each expert: the main model's layers, then the multi-token module's.
    """
    if not router:
        return router
    delta_LE = rate * jnp.sign(jnp.mean(counts_LE, axis=1, keepdims=True) - counts_LE)
    main = cfg.num_moe_layers
    rows = {"moe": delta_LE[:main], "mtp": delta_LE[main:]}
    return {stack: jax.tree.map(lambda b: b + rows[stack], tree) for stack, tree in router.items()}  # noqa: B023


def routing_metrics(sums: Parts, totals: Totals) -> Metrics:
    """Expert utilisation of a batch; nothing for a model without experts."""
    if not sums.counts_LE.shape[0]:
        return {}
    return {
        "maxvio": jnp.mean(max_violation(sums.counts_LE)),
        "balanced_fraction": jnp.mean(balanced_fraction(sums.counts_LE)),
        "router_entropy": jnp.mean(sums.entropy_L) / jnp.maximum(totals.tokens, 1.0),
        "dropped": sums.dropped,
        "expert_counts_LE": sums.counts_LE,
    }


def balanced_fraction(counts_LE: Array) -> Array:
    """Share of each layer's experts whose load is within 50 % of the layer's mean, [L]."""
    mean_L1 = jnp.mean(counts_LE, axis=1, keepdims=True)
    return jnp.mean(jnp.abs(counts_LE - mean_L1) <= 0.5 * mean_L1, axis=1, dtype=jnp.float32)


def bias_metrics(router: Any) -> Metrics:
    """How far the selection biases of each expert layer spread, rows as in `counts_LE`; nothing without biases."""
    leaves = [leaf for stack in ("moe", "mtp") for leaf in jax.tree.leaves(router.get(stack, {}))]
    if not leaves:
        return {}
    bias_LE = jnp.concatenate(leaves)
    return {
        "bias_min": jnp.min(bias_LE),
        "bias_max": jnp.max(bias_LE),
        "bias_std_L": jnp.std(bias_LE, axis=1),
    }


def make_eval_step(
    cfg: RunConfig, mesh: jax.sharding.Mesh, base: FrozenBase | None = None
) -> Callable[..., EvalSums]:
    """(params, router, batch[, frozen]) -> sums over the mesh (`EvalSums`)."""
    layout = weights_layout(cfg, mesh, base)
    dispatch = dispatch_of(cfg, mesh)

    def shard(params: Any, router: Any, batch: Batch, frozen: Any) -> EvalSums:
        weights = compute_copies(params, layout.placed, cfg.model.dtype)
        frozen = compute_copies(frozen, layout.frozen_placed, cfg.model.dtype)
        sums = evaluation_sums(
            layout.joined(weights, frozen),
            router,
            batch,
            cfg.model,
            cfg.training.loss_chunk,
            dispatch,
            parse_kernels(cfg.kernels),
        )
        return lax.psum(sums, BATCH_AXES)

    spread = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(layout.specs, P(), P(BATCH_AXES), layout.frozen_specs),
        out_specs=P(),
        check_vma=False,
    )
    return lambda params, router, batch, frozen=None: spread(params, router, batch, frozen)
