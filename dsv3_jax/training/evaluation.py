"""What is measured on held-out data: the next-token loss, and the multi-token module's worth in decoding."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from dsv3_jax.config import AUTO_KERNELS, Kernels, ModelConfig
from dsv3_jax.model import Transformer
from dsv3_jax.parallel.dispatch import Dispatch
from dsv3_jax.training.losses import (
    IGNORED,
    Logits,
    chunks,
    heads,
    main_logits,
    mtp_inputs_targets,
    mtp_logits,
    next_token_loss,
    over_tokens,
)

Array = jax.Array


@struct.dataclass
class EvalSums:
    """Sums over a batch; the multi-token module's are of depth 1 and 0 for a model without.

    Attributes:
      nats: next-token losses; targets: their number, int32.
      mtp_nats: losses of the module; mtp_targets: their number, int32.
      mtp_right: int32, targets that are the module's most probable token.
      mtp_accepted: int32, targets for which that token is also the main model's most probable one once it has read one
        token more: what greedy speculative decoding would accept.
    """

    nats: Array
    targets: Array
    mtp_nats: Array
    mtp_targets: Array
    mtp_right: Array
    mtp_accepted: Array


def evaluation_sums(
    params: Any,
    router: Any,
    batch: Mapping[str, Array],
    cfg: ModelConfig,
    chunk: int,
    dispatch: Dispatch | None = None,
    kernels: Kernels = AUTO_KERNELS,
) -> EvalSums:
    """The sums of a batch as `loss_fn` takes it; `chunk` tokens' logits exist at a time."""
    model = Transformer(cfg, dispatch=dispatch, kernels=kernels)
    main_head, mtp_head = heads(cfg, params)
    nats, out = next_token_loss(model, params, router, batch, chunk, main_head)
    targets = jnp.sum(batch["targets_BT"] >= 0, dtype=jnp.int32)
    zero = jnp.zeros((), jnp.int32)
    if not cfg.num_nextn_predict_layers:
        return EvalSums(nats, targets, jnp.zeros(()), zero, zero, zero)
    inputs_LBT, targets_LBT = mtp_inputs_targets(batch, cfg.num_nextn_predict_layers)
    where = {"positions_BT": batch["positions_BT"], "segments_BT": batch["segments_BT"]}
    variables = {"params": params, "router": router}
    ahead: Any = model.apply(variables, out.hidden_BTD, inputs_LBT, **where, method="mtp")
    logits = functools.partial(mtp_logits, model, 0)
    mtp_nats = over_tokens(logits, mtp_head, ahead.hidden_LBTD[0], targets_LBT[0], chunk)
    drafts_BT = most_probable(logits, mtp_head, ahead.hidden_LBTD[0], chunk)
    main_BT = most_probable(functools.partial(main_logits, model), main_head, out.hidden_BTD, chunk)
    # The draft at t and the main model's choice at t + 1 are for the same place.
    main_BT = jnp.pad(main_BT[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    real_BT = targets_LBT[0] >= 0

    def count(hit_BT: Array) -> Array:
        return jnp.sum(hit_BT & real_BT, dtype=jnp.int32)

    return EvalSums(
        nats=nats,
        targets=targets,
        mtp_nats=mtp_nats,
        mtp_targets=count(real_BT),
        mtp_right=count(drafts_BT == targets_LBT[0]),
        mtp_accepted=count(drafts_BT == main_BT),
    )


def most_probable(logits: Logits, head: Any, hidden_BTD: Array, chunk: int) -> Array:
    """int32 [B, T]: the token with the largest logit at every position (the lowest id of equals)."""
    B, T, D = hidden_BTD.shape
    hidden_MCD, _ = chunks(hidden_BTD.reshape(-1, D), jnp.zeros(B * T, jnp.int32), chunk)
    ids_MC = lax.map(lambda hidden_CD: jnp.argmax(logits(head, hidden_CD), axis=-1), hidden_MCD)
    return ids_MC.reshape(-1)[: B * T].reshape(B, T).astype(jnp.int32)
