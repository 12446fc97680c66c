"""Expert choice: V3's biased sigmoid within groups, V2's softmax, plain softmax top-k.

Everything here is float32. The bias chooses experts and never weighs them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.module import Array, Module, einsum


@struct.dataclass
class Choice:
    """The router's decision for N = B * T tokens."""

    experts_NK: Array
    """int32 expert numbers."""
    weights_NK: Array
    """float32 combine weights."""
    scores_NE: Array
    """float32 unbiased scores of every expert (sigmoid or softmax)."""


@struct.dataclass
class Routing:
    """Measured expert utilisation of one layer; stacked over layers it gains a leading L.

    Sums are over real tokens (padding excluded) of this call.
    """

    counts_E: Array
    """float32 tokens sent to each expert."""
    entropy: Array
    """Sum over tokens of the entropy (nats) of the normalised scores."""
    tokens: Array
    """Number of real tokens."""
    balance_loss: Array
    """Sequence-wise balance loss, before its alpha (V3 report, eq. 17-20), mean over sequences."""
    dropped: Array
    """Token-expert pairs not computed. Zero unless the dispatch has a fixed capacity."""


def max_violation(counts: Array) -> Array:
    """MaxVio = max load / mean load - 1 over the last axis (arXiv 2408.15664)."""
    mean = jnp.mean(counts, axis=-1)
    return jnp.max(counts, axis=-1) / jnp.maximum(mean, 1e-9) - 1.0


def choose(cfg: ModelConfig, logits_NE: Array, bias_E: Array | None) -> Choice:
    """Top-k experts and their weights from float32 router logits [N, E]. Ties take the lowest index."""
    if cfg.scoring_func == "sigmoid":
        scores_NE = jax.nn.sigmoid(logits_NE)
    else:
        scores_NE = jax.nn.softmax(logits_NE, axis=-1)
    ranking_NE = scores_NE if bias_E is None else scores_NE + bias_E.astype(jnp.float32)[None, :]
    if cfg.topk_method in ("noaux_tc", "group_limited_greedy"):
        ranking_NE = _within_groups(cfg, ranking_NE)
    _, experts_NK = jax.lax.top_k(ranking_NE, cfg.num_experts_per_tok)
    weights_NK = jnp.take_along_axis(scores_NE, experts_NK, axis=-1)
    if cfg.topk_method == "dynamic" or (cfg.topk_method == "noaux_tc" and cfg.norm_topk_prob):
        weights_NK = weights_NK / (jnp.sum(weights_NK, axis=-1, keepdims=True) + 1e-20)
    return Choice(experts_NK, weights_NK * cfg.routed_scaling_factor, scores_NE)


def _within_groups(cfg: ModelConfig, ranking_NE: Array) -> Array:
    """-inf outside the best `topk_group` groups: a zero would win against negative biased scores."""
    N, E = ranking_NE.shape
    grouped = ranking_NE.reshape(N, cfg.n_group, E // cfg.n_group)
    if cfg.topk_method == "noaux_tc":  # sum of the two best biased scores (V3)
        group_scores = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    else:  # the best score (V2)
        group_scores = jnp.max(grouped, axis=-1)
    _, groups_Ng = jax.lax.top_k(group_scores, cfg.topk_group)
    allowed_NG = jnp.any(groups_Ng[:, :, None] == jnp.arange(cfg.n_group)[None, None, :], axis=1)
    return jnp.where(allowed_NG[:, :, None], grouped, -jnp.inf).reshape(N, E)


class Router(Module):
    """Scores and choice; the selection bias lives in the collection "router", not among the weights."""

    @nn.compact
    def __call__(self, x_BTD: Array, token_mask_BT: Array) -> tuple[Choice, Routing]:
        """Route B * T tokens; `token_mask_BT` (bool) marks real tokens for the statistics."""
        B, T, _ = x_BTD.shape
        logits = einsum("BTD,ED->BTE", x_BTD, self.weight("router", "ED"), dtype=jnp.float32)
        bias_E = self.weight("bias", "E", "router") if self.cfg.has_router_bias else None
        choice = choose(self.cfg, logits.reshape(B * T, -1), bias_E)
        return choice, _measure(self.cfg, choice, token_mask_BT)


def _measure(cfg: ModelConfig, choice: Choice, token_mask_BT: Array) -> Routing:
    B, T = token_mask_BT.shape
    E, K = cfg.n_routed_experts, cfg.num_experts_per_tok
    mask_BT = token_mask_BT.astype(jnp.float32)
    chosen_BE = _counts(choice.experts_NK, mask_BT, E)
    # Eq. 18 counts the top K of the unbiased scores, not the experts chosen: the bias evens out the latter, and
    # the loss would then have nothing to push against.
    _, best_NK = jax.lax.top_k(choice.scores_NE, K)
    best_BE = _counts(best_NK, mask_BT, E)
    scores_BTE = choice.scores_NE.reshape(B, T, E)
    share_BTE = scores_BTE / (jnp.sum(scores_BTE, axis=-1, keepdims=True) + 1e-20)
    plogp = jnp.where(share_BTE > 0, share_BTE * jnp.log(jnp.where(share_BTE > 0, share_BTE, 1.0)), 0.0)
    length_B = jnp.maximum(jnp.sum(mask_BT, axis=1), 1.0)
    load_BE = best_BE * (E / K) / length_B[:, None]
    mean_share_BE = (
        jnp.einsum("BTE,BT->BE", share_BTE, mask_BT, precision=jax.lax.Precision.HIGHEST) / length_B[:, None]
    )
    return Routing(
        counts_E=jnp.sum(chosen_BE, axis=0),
        entropy=-jnp.sum(plogp * mask_BT[:, :, None]),
        tokens=jnp.sum(mask_BT),
        balance_loss=jnp.mean(jnp.sum(load_BE * mean_share_BE, axis=-1)),
        dropped=jnp.zeros(()),
    )


def _counts(experts_NK: Array, mask_BT: Array, E: int) -> Array:
    """float32 [B, E]: how often each expert occurs among the real tokens of each row."""
    B, T = mask_BT.shape
    K = experts_NK.shape[1]
    slots = (jnp.arange(B)[:, None] * E + experts_NK.reshape(B, T * K)).reshape(-1)
    return jnp.zeros(B * E).at[slots].add(jnp.repeat(mask_BT.reshape(-1), K)).reshape(B, E)
