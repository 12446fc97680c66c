"""Losses: chunked float32 cross-entropy, multi-token prediction, sequence-wise balance.

Every mean is a sum divided by a total that is given (`Totals`), so the sums of micro-batches and of devices add
up to the loss of the global batch, whatever way it is cut.
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

from dsv3_jax.config import AUTO_KERNELS, Kernels, ModelConfig, TrainingConfig
from dsv3_jax.model import Output, Routing, Transformer
from dsv3_jax.model.rounding import rounding_products
from dsv3_jax.parallel.dispatch import Dispatch
from dsv3_jax.parallel.leaves import Sharded

Array = jax.Array
IGNORED = -1  # a target that is none


@struct.dataclass
class Totals:
    """What the sums of a global batch are divided by, all float32.

    Attributes:
      tokens: real tokens (padding excluded).
      targets: tokens to predict.
      mtp_targets_L: tokens to predict at each depth of the multi-token module.
      rows: rows with at least one real token.
    """

    tokens: Array
    targets: Array
    mtp_targets_L: Array
    rows: Array


@struct.dataclass
class Parts:
    """Sums of one micro-batch, already divided by the global totals; adding them over micro-batches is exact.

    Attributes:
      ce: cross-entropy of the next token, nats.
      mtp: multi-token loss, mean over depths, before its weight.
      balance: sequence-wise balance loss summed over layers, before alpha.
      counts_LE: tokens sent to each expert, a row per expert layer: the main model's, then the multi-token module's.
      entropy_L: sum over tokens of the router's entropy, nats.
      dropped: token-expert pairs not computed.
    """

    ce: Array
    mtp: Array
    balance: Array
    counts_LE: Array
    entropy_L: Array
    dropped: Array


Logits = Callable[[Any, Array], Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def sum_cross_entropy(logits: Logits, head: Any, hidden_ND: Array, targets_N: Array, chunk: int) -> Array:
    """Sum over tokens of -log p(target), nats, float32; targets of -1 count nothing.

    The logits of `chunk` tokens exist at a time. Under differentiation the gradients are made in the same visit
    to a chunk, so nothing of size [N, V] is kept and no logit is computed twice; backward only scales them.

    Args:
      logits: (head, hidden [n, D]) -> [n, V] float32; it must not close over arrays.
      head: the weights `logits` reads, any tree.
      chunk: tokens a visit; the last one is padded.
    """
    hidden_MCD, targets_MC = chunks(hidden_ND, targets_N, chunk)

    def visit(total: Array, xs: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _chunk_loss(logits, head, *xs), None

    return lax.scan(visit, jnp.zeros((), jnp.float32), (hidden_MCD, targets_MC))[0]


def chunks(hidden_ND: Array, targets_N: Array, chunk: int) -> tuple[Array, Array]:
    N = targets_N.shape[0]
    chunk = min(chunk, N)
    short = -N % chunk
    hidden = jnp.pad(hidden_ND, ((0, short), (0, 0))).reshape(-1, chunk, hidden_ND.shape[1])
    return hidden, jnp.pad(targets_N, (0, short), constant_values=IGNORED).reshape(-1, chunk)


def _chunk_loss(logits: Logits, head: Any, hidden_CD: Array, targets_C: Array) -> Array:
    logits_CV = logits(head, hidden_CD)
    picked_C = jnp.take_along_axis(logits_CV, jnp.maximum(targets_C, 0)[:, None], axis=-1)[:, 0]
    nll_C = jax.nn.logsumexp(logits_CV, axis=-1) - picked_C
    return jnp.sum(jnp.where(targets_C >= 0, nll_C, 0.0))


def _forward(
    logits: Logits, head: Any, hidden_ND: Array, targets_N: Array, chunk: int
) -> tuple[Array, tuple[Any, Array, Any]]:
    hidden_MCD, targets_MC = chunks(hidden_ND, targets_N, chunk)
    parts, tree = jax.tree.flatten(head)
    floats = [jnp.issubdtype(part.dtype, jnp.floating) for part in parts]  # codes have no gradient

    def whole(own: list[Array]) -> Any:
        rest = iter(own)
        return jax.tree.unflatten(
            tree, [next(rest) if is_float else part for part, is_float in zip(parts, floats, strict=True)]
        )

    head = [part for part, is_float in zip(parts, floats, strict=True) if is_float]

    def visit(carry: tuple[Array, Any], xs: tuple[Array, Array]) -> tuple[tuple[Array, Any], Array]:
        total, d_head = carry
        hidden_CD, targets_C = xs
        loss, (d_chunk, d_hidden) = jax.value_and_grad(
            lambda head, hidden: _chunk_loss(logits, whole(head), hidden, targets_C), argnums=(0, 1)
        )(head, hidden_CD)
        d_head = jax.tree.map(lambda sum_, d: sum_ + d.astype(jnp.float32), d_head, d_chunk)
        return (total + loss, d_head), d_hidden

    # Chunks add up in float32 whatever the type of the head.
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), head)
    start = (jnp.zeros((), jnp.float32), zeros)
    (total, d_head), d_hidden = lax.scan(visit, start, (hidden_MCD, targets_MC))
    d_hidden = d_hidden.reshape(-1, hidden_ND.shape[1])[: hidden_ND.shape[0]]
    grads = iter(d_head)
    d_head = jax.tree.unflatten(
        tree,
        [
            next(grads) if is_float else np.zeros(part.shape, jax.dtypes.float0)
            for part, is_float in zip(parts, floats, strict=True)
        ],
    )
    return total, (
        d_head,
        d_hidden,
        jax.tree.unflatten(tree, [jnp.zeros((0,), part.dtype) for part in parts]),
    )


def _backward(logits: Logits, chunk: int, saved: tuple[Any, Array, Any], g: Array) -> tuple[Any, Array, None]:
    d_head, d_hidden, like = saved
    return (
        jax.tree.map(
            lambda d, leaf: d if d.dtype == jax.dtypes.float0 else (d * g).astype(leaf.dtype), d_head, like
        ),
        (d_hidden * g).astype(d_hidden.dtype),
        None,
    )


sum_cross_entropy.defvjp(_forward, _backward)


def mtp_inputs_targets(batch: Mapping[str, Array], depth: int) -> tuple[Array, Array]:
    """What the multi-token module reads and predicts at each depth k from 0, each [L, B, T].

    At position t it reads the token at t + 1 + k and predicts the one at t + 2 + k, both within t's segment; the
    last k + 1 positions of a segment have no target (-1).
    """
    targets_BT, segments_BT = batch["targets_BT"], batch["segments_BT"]

    def ahead(x_BT: Array, by: int, fill: int) -> Array:
        return jnp.pad(x_BT, ((0, 0), (0, by)), constant_values=fill)[:, by:]

    def within(by: int) -> Array:
        inside = (ahead(segments_BT, by, 0) == segments_BT) & (segments_BT > 0)
        return jnp.where(inside, ahead(targets_BT, by, IGNORED), IGNORED)

    shifted = [within(k) for k in range(depth + 1)]
    return jnp.maximum(jnp.stack(shifted[:-1]), 0), jnp.stack(shifted[1:])


def count_totals(batch: Mapping[str, Array], cfg: ModelConfig) -> Totals:
    """The totals of a batch; sum them over devices for the global ones."""
    real_BT = batch["segments_BT"] > 0
    mtp = jnp.zeros((0,), jnp.float32)
    if cfg.num_nextn_predict_layers:
        _, targets_LBT = mtp_inputs_targets(batch, cfg.num_nextn_predict_layers)
        mtp = jnp.sum(targets_LBT >= 0, axis=(1, 2), dtype=jnp.float32)
    return Totals(
        tokens=jnp.sum(real_BT, dtype=jnp.float32),
        targets=jnp.sum(batch["targets_BT"] >= 0, dtype=jnp.float32),
        mtp_targets_L=mtp,
        rows=jnp.sum(jnp.any(real_BT, axis=1), dtype=jnp.float32),
    )


def main_logits(model: Transformer, head: Any, hidden_ND: Array) -> Array:
    return model.apply({"params": head}, hidden_ND[None], method="logits")[0]


def mtp_logits(model: Transformer, depth: int, head: Any, hidden_ND: Array) -> Array:
    return model.apply({"params": head}, hidden_ND[None], depth, method="mtp_logits")[0]


def heads(cfg: ModelConfig, params: Mapping[str, Any]) -> tuple[Any, Any]:
    """The parts of the tree that the main head and the multi-token head read, whole on this device.

    A cut one is gathered here, in the compute type, once for all chunks of tokens.
    """

    def whole(leaf: Any) -> Any:
        return leaf.astype(cfg.dtype) if isinstance(leaf, Sharded) else leaf

    name = "embed_VD" if cfg.tie_word_embeddings else "head_VD"
    main = {name: whole(params[name])}
    if not cfg.mtp_own_head:
        return main, main
    return main, {"mtp": {"head_VD": whole(params["mtp"]["head_VD"])}}


def over_tokens(logits: Logits, head: Any, hidden_BTD: Array, targets_BT: Array, chunk: int) -> Array:
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    return sum_cross_entropy(logits, head, hidden_ND, targets_BT.reshape(-1), chunk)


def next_token_loss(
    model: Transformer, params: Any, router: Any, batch: Mapping[str, Array], chunk: int, head: Any = None
) -> tuple[Array, Output]:
    """Sum of the next-token losses of a batch, nats, and what the model returned.

    Args:
      head: what the logits read, by default that part of `params`.
    """
    out: Any = model.apply(
        {"params": params, "router": router},
        batch["tokens_BT"],
        positions_BT=batch["positions_BT"],
        segments_BT=batch["segments_BT"],
    )
    logits = functools.partial(main_logits, model)
    head = heads(model.cfg, params)[0] if head is None else head
    return over_tokens(logits, head, out.hidden_BTD, batch["targets_BT"], chunk), out


def loss_fn(
    params: Any,
    router: Any,
    batch: Mapping[str, Array],
    cfg: ModelConfig,
    training: TrainingConfig | None = None,
    totals: Totals | None = None,
    dispatch: Dispatch | None = None,
    mtp_weight: Array | float | None = None,
    kernels: Kernels = AUTO_KERNELS,
) -> tuple[Array, Parts]:
    """The training loss of a (micro-)batch.

    loss = ce + mtp_weight * mtp + balance_loss_alpha * balance, where balance sums over every expert layer,
    the multi-token module's included.

    Args:
      params, router: the two collections of variables; only `params` is to be differentiated.
      batch: tokens_BT, targets_BT (-1: none), segments_BT (0: padding), positions_BT; int32.
      totals: of the global batch, by default of this one.
      dispatch: how tokens reach experts on other devices; None: all are here.
      mtp_weight: of this step, by default training.mtp_loss_weight.
      kernels: which implementation computes each kernel.
    Raises:
      ConfigError: training.products is fp8 and a weight is not plain.
    """
    training = training or TrainingConfig()
    mtp_weight = training.mtp_loss_weight if mtp_weight is None else mtp_weight
    totals = totals if totals is not None else count_totals(batch, cfg)
    model = Transformer(cfg, remat=training.remat, dispatch=dispatch, kernels=kernels)
    main_head, mtp_head = heads(cfg, params)
    if training.products == "fp8":
        params = rounding_products(params, kernels.quantized_matmul)
    ce, out = next_token_loss(model, params, router, batch, training.loss_chunk, main_head)
    ce = ce / jnp.maximum(totals.targets, 1.0)
    mtp = jnp.zeros((), jnp.float32)
    routings: list[Routing] = [] if out.routing is None else [out.routing]
    depth = cfg.num_nextn_predict_layers
    if depth:
        inputs_LBT, targets_LBT = mtp_inputs_targets(batch, depth)
        where = {"positions_BT": batch["positions_BT"], "segments_BT": batch["segments_BT"]}
        variables = {"params": params, "router": router}
        ahead = model.apply(variables, out.hidden_BTD, inputs_LBT, **where, method="mtp")
        routings.append(ahead.routing)
        for k in range(depth):
            logits = functools.partial(mtp_logits, model, k)
            part = over_tokens(logits, mtp_head, ahead.hidden_LBTD[k], targets_LBT[k], training.loss_chunk)
            mtp = mtp + part / jnp.maximum(totals.mtp_targets_L[k], 1.0) / depth
    B = batch["tokens_BT"].shape[0]
    parts = _with_routing(cfg, ce, mtp, routings, B / jnp.maximum(totals.rows, 1.0))
    loss = ce + mtp_weight * mtp + training.balance_loss_alpha * parts.balance
    return loss, parts


def _with_routing(cfg: ModelConfig, ce: Array, mtp: Array, routings: list[Routing], share: Array) -> Parts:
    """`share`: rows of this call over rows of the global batch (the model's balance loss is a mean over its rows)."""
    zero = jnp.zeros((), jnp.float32)
    if not routings:
        return Parts(ce, mtp, zero, jnp.zeros((0, cfg.n_routed_experts)), jnp.zeros((0,)), zero)
    return Parts(
        ce=ce,
        mtp=mtp,
        balance=sum((jnp.sum(r.balance_loss) for r in routings), zero) * share,
        counts_LE=lax.stop_gradient(jnp.concatenate([r.counts_E for r in routings])),
        entropy_L=lax.stop_gradient(jnp.concatenate([r.entropy for r in routings])),
        dropped=sum((jnp.sum(r.dropped) for r in routings), zero),
    )
