"""The training step: one pure function (state, batch) -> (state, metrics), for any mesh.

Inside one `jax.shard_map` each device computes loss and gradients of its rows with weights gathered where they are
used (`dsv3_jax.parallel.leaves`); sums over the mesh's batch axes make them those of the global batch, each device
keeping its part. Everything after that is ordinary single-device code on arrays that stay cut as they are stored.
"""

from __future__ import annotations

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
    """

    step: Array
    params: Any
    router: Any
    opt_state: Any
    guard: Guard


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


def state_shardings(cfg: RunConfig, mesh: jax.sharding.Mesh) -> State:
    """Where each leaf of the state lives: weights and moments by the storage table, the rest everywhere."""
    everywhere = NamedSharding(mesh, P())
    variables = abstract_variables(cfg.model)
    where = storage_shardings(variables, mesh)
    opt_state = jax.eval_shape(make_optimizer(cfg.optimizer).init, variables["params"])
    return State(
        everywhere,
        where["params"],
        where["router"],
        sharded_like(opt_state, variables["params"], where["params"], everywhere),
        jax.tree.map(lambda _: everywhere, jax.eval_shape(init_guard)),
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


def _start(cfg: RunConfig, variables: Any) -> State:
    params = variables["params"]
    opt_state = make_optimizer(cfg.optimizer).init(params)
    return State(jnp.zeros((), jnp.int32), params, variables["router"], opt_state, init_guard())


def _placed(x: Any, where: NamedSharding) -> Array:
    """x cut as `where` says. Of a host array each process takes its devices' parts; nothing is sent or compared."""
    if isinstance(x, jax.Array):
        return jax.device_put(x, where)
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


def abstract_state(cfg: RunConfig, mesh: jax.sharding.Mesh) -> State:
    """Shapes and shardings of the state (what a restore and a plan need); no device is touched."""

    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        jax.eval_shape(functools.partial(_start, cfg), abstract_variables(cfg.model)),
        state_shardings(cfg, mesh),
    )


def make_train_step(
    cfg: RunConfig, mesh: jax.sharding.Mesh
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The step of a run on a mesh; jit it with the state donated.

    Raises ConfigError when the batch cannot be cut into devices times micro-batches.

    Metrics: loss, ce_loss, mtp_loss, balance_loss, grad_norm (before clipping), lr, tokens (real tokens of the
    batch), skipped (1 when loss or gradient was not finite or a spike, so that weights and moments were left as they
    were), spike (1 when it was that), maxvio (mean over expert layers), balanced_fraction (of experts within 50 % of
    their layer's mean load), router_entropy (mean over layers and tokens, nats), dropped, expert_counts_LE; bias_min,
    bias_max and bias_std_L of the selection biases the step used.
    """
    parts, accumulate = shards_of(mesh), cfg.training.accumulate
    for size in reversed(batch_schedule(cfg.training).sizes):
        if size % (parts * accumulate):
            ramp = "" if size == cfg.training.batch_size else f", and {size} in its ramp"
            raise ConfigError(
                f"training.batch_size is {cfg.training.batch_size}{ramp}; expected a multiple of {parts} devices x "
                f"training.accumulate = {accumulate}"
            )
    where = state_shardings(cfg, mesh)
    specs = jax.tree.map(lambda sharding: sharding.spec, where.params)
    placed = placements(abstract_variables(cfg.model), mesh)["params"]
    dispatch = dispatch_of(cfg, mesh)
    gradients = jax.shard_map(
        functools.partial(_shard_gradients, cfg, placed, dispatch),
        mesh=mesh,
        in_specs=(specs, P(), P(BATCH_AXES), P()),
        out_specs=(specs, P(), P(), P()),
        check_vma=False,  # sums over the mesh are written out: parallel/leaves.py
    )
    optimizer = make_optimizer(cfg.optimizer, mesh)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        step = state.step + 1
        grads, loss, sums, totals = gradients(
            state.params, state.router, batch, mtp_weight(cfg.training, step)
        )
        lr = learning_rate(cfg.optimizer, cfg.training, step)
        grad_norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(grads)))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
        router = balance_update(cfg.model, state.router, sums.counts_LE, balance_rate(cfg.training, step))
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
        return jax.lax.with_sharding_constraint(State(step, params, router, opt_state, guard), where), metrics

    return train_step


def _shard_gradients(
    cfg: RunConfig,
    placed: Any,
    dispatch: Dispatch | None,
    params: Any,
    router: Any,
    batch: Batch,
    weight: Array,
) -> tuple[Any, Array, Parts, Totals]:
    """This device's part of the gradients of the global batch; loss and sums of that batch."""
    totals = lax.psum(count_totals(batch, cfg.model), BATCH_AXES)
    weights = compute_copies(params, placed, cfg.model.dtype)
    n, kernels = cfg.training.accumulate, parse_kernels(cfg.kernels)

    def one(micro: Batch) -> tuple[tuple[Array, Parts], Any]:
        return jax.value_and_grad(loss_fn, has_aux=True)(
            weights, router, micro, cfg.model, cfg.training, totals, dispatch, weight, kernels
        )

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
    return reduce_gradients(grads, placed), loss, sums, totals


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


def make_eval_step(cfg: RunConfig, mesh: jax.sharding.Mesh) -> Callable[[Any, Any, Batch], EvalSums]:
    """(params, router, batch) -> sums over the mesh (`EvalSums`)."""
    abstract = abstract_variables(cfg.model)
    placed = placements(abstract, mesh)["params"]
    specs = jax.tree.map(lambda sharding: sharding.spec, storage_shardings(abstract, mesh)["params"])
    dispatch = dispatch_of(cfg, mesh)

    def shard(params: Any, router: Any, batch: Batch) -> EvalSums:
        weights = compute_copies(params, placed, cfg.model.dtype)
        sums = evaluation_sums(
            weights, router, batch, cfg.model, cfg.training.loss_chunk, dispatch, parse_kernels(cfg.kernels)
        )
        return lax.psum(sums, BATCH_AXES)

    return jax.shard_map(
        shard, mesh=mesh, in_specs=(specs, P(), P(BATCH_AXES)), out_specs=P(), check_vma=False
    )
