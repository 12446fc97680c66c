"""XLA implementation of softmax attention: blocks of queries and keys, online softmax, custom VJP.

A few heads at a time go through all of their blocks, so that a block of scores is still in a core's
cache when the softmax and the next product read it. Blocks are read from and written to the arrays
in the caller's layout; nothing is transposed in full. t and s are the lengths of a block of queries
and of keys, h the number of heads at a time, n counts batch rows times groups of heads.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.kernels.registry import full_precision

# Queries and keys visited at a time; up to this length attention is one fused softmax.
BLOCK = 128
# Bytes of one block of scores over the heads that are visited together.
SCORE_BYTES = 128 * 1024

Masks = dict[str, jax.Array]


class Plan(NamedTuple):
    """What is known before any array: hashable, so that it can be static."""

    scale: float
    causal: bool
    t: int
    s: int
    h: int


def attention(
    q_BTHQ: jax.Array,
    k_BSGQ: jax.Array,
    v_BSGU: jax.Array,
    segments_BT: jax.Array | None,
    segments_BS: jax.Array | None,
    mask_BTS: jax.Array | None,
    *,
    scale: float,
    causal: bool,
    block: int = BLOCK,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTHU, lse_BHT), see `api.attention`. Grouped keys and values are repeated to H heads first."""
    B, T, H, _ = q_BTHQ.shape
    S, G = k_BSGQ.shape[1:3]
    k_BSHQ, v_BSHU = (x if G == H else jnp.repeat(x, H // G, axis=2) for x in (k_BSGQ, v_BSGU))
    t, s = _block_size(T, block), _block_size(S, block)
    if segments_BT is None and S % s and not causal:
        # Keys added by padding must be hidden; the causal mask does it already.
        segments_BT, segments_BS = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
    masks: Masks = {}
    if segments_BT is not None and segments_BS is not None:
        masks["segments_BT"], masks["segments_BS"] = _pad(segments_BT, 1, t), _pad(segments_BS, 1, s)
    if mask_BTS is not None:
        masks["mask_BTS"] = _pad(_pad(mask_BTS, 1, t), 2, s)
    h = max(h for h in range(1, H + 1) if H % h == 0 and (h == 1 or h * t * s * 4 <= SCORE_BYTES))
    plan = Plan(scale, causal, t, s, h)
    out_BTHU, lse_BHT = _attention(_pad(q_BTHQ, 1, t), _pad(k_BSHQ, 1, s), _pad(v_BSHU, 1, s), masks, plan)
    return out_BTHU[:, :T], lse_BHT[:, :, :T]


def _block_size(length: int, block: int) -> int:
    """Equal blocks of at most `block`, so that padding is a few rows rather than most of a block."""
    if length <= block:
        return length
    blocks = -(-length // block)
    return -(-length // (8 * blocks)) * 8


def _pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    extra = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, extra if a == axis else 0) for a in range(x.ndim)]) if extra else x


def _einsum(equation: str, *operands: jax.Array) -> jax.Array:
    precision = full_precision(operands[0].dtype)
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32, precision=precision)


class _Group:
    """Blocks of one batch row and h of its heads (the n-th such group), read and written in place."""

    def __init__(self, plan: Plan, n: jax.Array, heads: int):
        groups = heads // plan.h
        self.h, self.row, self.head = plan.h, n // groups, (n % groups) * plan.h

    def take(self, x_BTHQ: jax.Array, i: Any, t: int) -> jax.Array:
        """The i-th block of length t, heads first: [h, t, Q]."""
        sizes = (1, t, self.h, x_BTHQ.shape[3])
        block = lax.dynamic_slice(x_BTHQ, (self.row, i * t, self.head, 0), sizes)
        return einops.rearrange(block, "1 t h q -> h t q")

    def put(self, x_BTHQ: jax.Array, i: Any, block_htQ: jax.Array) -> jax.Array:
        block = einops.rearrange(block_htQ.astype(x_BTHQ.dtype), "h t q -> 1 t h q")
        return lax.dynamic_update_slice(x_BTHQ, block, (self.row, i * block_htQ.shape[1], self.head, 0))

    def take_row(self, x_BHT: jax.Array, i: Any, t: int) -> jax.Array:
        return lax.dynamic_slice(x_BHT, (self.row, self.head, i * t), (1, self.h, t))[0]

    def put_row(self, x_BHT: jax.Array, i: Any, block_ht: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(x_BHT, block_ht[None], (self.row, self.head, i * block_ht.shape[1]))

    def visible(self, masks: Masks, plan: Plan, i: Any, j: Any) -> jax.Array | None:
        """bool [t, s]: which keys of block j each query of block i may attend to; None: all."""
        t, s, parts = plan.t, plan.s, []
        if plan.causal:
            parts.append((i * t + jnp.arange(t))[:, None] >= (j * s + jnp.arange(s))[None, :])
        if "segments_BT" in masks:
            ids_t = lax.dynamic_slice(masks["segments_BT"], (self.row, i * t), (1, t))[0]
            ids_s = lax.dynamic_slice(masks["segments_BS"], (self.row, j * s), (1, s))[0]
            parts.append((ids_t[:, None] == ids_s[None, :]) & (ids_t > 0)[:, None])
        if "mask_BTS" in masks:
            parts.append(lax.dynamic_slice(masks["mask_BTS"], (self.row, i * t, j * s), (1, t, s))[0])
        return functools.reduce(jnp.logical_and, parts) if parts else None


def _masked(scores: jax.Array, visible: jax.Array | None) -> jax.Array:
    return scores if visible is None else jnp.where(visible[None], scores, -jnp.inf)


def _finite(max_ht: jax.Array) -> jax.Array:
    # A row without any visible key has maximum -inf, and -inf - -inf would be NaN.
    return jnp.where(max_ht == -jnp.inf, 0.0, max_ht)


def _loop(count: int, visit: Any, carry: Any) -> Any:
    return visit(0, carry) if count == 1 else lax.fori_loop(0, count, visit, carry)


def _forward(q_BTHQ, k_BSHQ, v_BSHU, masks: Masks, plan: Plan):
    """(out_BTHU, lse_BHT); lse is +inf where a query attends to nothing, so that exp(x - lse) is 0."""
    scale, causal, t, s, h = plan
    (B, T, H, _), (_, S, _, U) = q_BTHQ.shape, v_BSHU.shape
    dtype = v_BSHU.dtype

    def one_block(group, i):
        """Softmax of a block of queries over a single block of keys."""
        scores_hts = _einsum("htq,hsq->hts", group.take(q_BTHQ, i, t), group.take(k_BSHQ, 0, s)) * scale
        scores_hts = _masked(scores_hts, group.visible(masks, plan, i, 0))
        max_ht = scores_hts.max(-1)
        p_hts = jnp.exp(scores_hts - _finite(max_ht)[..., None])
        out_htU = _einsum("hts,hsu->htu", p_hts.astype(dtype), group.take(v_BSHU, 0, s))
        return max_ht, p_hts.sum(-1), out_htU

    def many_blocks(group, i):
        q_htQ = group.take(q_BTHQ, i, t)

        def keys(j, carry):
            max_ht, sum_ht, out_htU = carry
            scores_hts = _einsum("htq,hsq->hts", q_htQ, group.take(k_BSHQ, j, s)) * scale
            scores_hts = _masked(scores_hts, group.visible(masks, plan, i, j))
            new_max_ht = jnp.maximum(max_ht, scores_hts.max(-1))
            shift_ht = _finite(new_max_ht)
            decay_ht = jnp.exp(max_ht - shift_ht)
            p_hts = jnp.exp(scores_hts - shift_ht[..., None])
            part_htU = _einsum("hts,hsu->htu", p_hts.astype(dtype), group.take(v_BSHU, j, s))
            return (
                new_max_ht,
                sum_ht * decay_ht + p_hts.sum(-1),
                out_htU * decay_ht[..., None] + part_htU,
            )

        start = (
            jnp.full((h, t), -jnp.inf, jnp.float32),
            jnp.zeros((h, t), jnp.float32),
            jnp.zeros((h, t, U), jnp.float32),
        )
        # Causal: key blocks wholly in the future of the block of queries are skipped.
        stop = ((i + 1) * t + s - 1) // s if causal else S // s
        return lax.fori_loop(0, stop, keys, start)

    def visit(n, carry):
        group = _Group(plan, n, H)

        def queries(i, carry):
            out_BTHU, lse_BHT = carry
            max_ht, sum_ht, out_htU = (one_block if s == S else many_blocks)(group, i)
            empty_ht = sum_ht == 0
            out_htU = out_htU / jnp.where(empty_ht, 1.0, sum_ht)[..., None]
            lse_ht = jnp.where(empty_ht, jnp.inf, _finite(max_ht) + jnp.log(sum_ht))
            return group.put(out_BTHU, i, out_htU), group.put_row(lse_BHT, i, lse_ht)

        return _loop(T // t, queries, carry)

    start = (jnp.zeros((B, T, H, U), dtype), jnp.zeros((B, H, T), jnp.float32))
    return lax.fori_loop(0, B * (H // h), visit, start)


def _backward(q_BTHQ, k_BSHQ, v_BSHU, masks: Masks, out_BTHU, lse_BHT, dout_BTHU, dlse_BHT, plan: Plan):
    """Gradients of q, k, v (FlashAttention-2, arXiv 2307.08691, algorithm 2).

    Scores are recomputed transposed, keys first: then no product contracts the rows of its left side,
    which XLA:CPU does up to three times slower.
    """
    scale, causal, t, s, h = plan
    (B, T, H, Q), (_, S, _, U) = q_BTHQ.shape, v_BSHU.shape
    dtype = q_BTHQ.dtype
    # d lse / d scores are the weights, so that a cotangent of lse joins delta.
    delta_BHT = _einsum("bthu,bthu->bht", out_BTHU, dout_BTHU) - dlse_BHT

    def pair(group, i, j, k_hsQ, k_hQs, v_hsU):
        q_htQ, dout_htU = group.take(q_BTHQ, i, t), group.take(dout_BTHU, i, t)
        lse_h1t, delta_h1t = group.take_row(lse_BHT, i, t)[:, None], group.take_row(delta_BHT, i, t)[:, None]
        visible_ts = group.visible(masks, plan, i, j)
        visible_st = None if visible_ts is None else einops.rearrange(visible_ts, "t s -> s t")
        scores_hst = _masked(_einsum("hsq,htq->hst", k_hsQ, q_htQ) * scale, visible_st)
        p_hst = jnp.exp(scores_hst - lse_h1t)
        dp_hst = _einsum("hsu,htu->hst", v_hsU, dout_htU)
        ds_hst = (p_hst * (dp_hst - delta_h1t) * scale).astype(dtype)
        dv_hsU = _einsum("hst,htu->hsu", p_hst.astype(dtype), dout_htU)
        dk_hsQ = _einsum("hst,htq->hsq", ds_hst, q_htQ)
        return _einsum("hqs,hst->hqt", k_hQs, ds_hst), dk_hsQ, dv_hsU

    def visit(n, carry):
        group = _Group(plan, n, H)

        def keys(j, carry):
            dq_ihQt, dk_BSHQ, dv_BSHU = carry
            k_hsQ, v_hsU = group.take(k_BSHQ, j, s), group.take(v_BSHU, j, s)
            k_hQs = einops.rearrange(k_hsQ, "h s q -> h q s")

            def queries(i, carry):
                dq_ihQt, dk_hsQ, dv_hsU = carry
                more_dq_hQt, more_dk_hsQ, more_dv_hsU = pair(group, i, j, k_hsQ, k_hQs, v_hsU)
                more_dq_hQt += lax.dynamic_index_in_dim(dq_ihQt, i, 0, keepdims=False)
                dq_ihQt = lax.dynamic_update_index_in_dim(dq_ihQt, more_dq_hQt, i, 0)
                return dq_ihQt, dk_hsQ + more_dk_hsQ, dv_hsU + more_dv_hsU

            if T == t:
                dq_hQt, dk_hsQ, dv_hsU = pair(group, 0, j, k_hsQ, k_hQs, v_hsU)
                dq_ihQt += dq_hQt[None]
            else:
                first = (j * s) // t if causal else 0
                zeros = (jnp.zeros((h, s, Q), jnp.float32), jnp.zeros((h, s, U), jnp.float32))
                dq_ihQt, dk_hsQ, dv_hsU = lax.fori_loop(first, T // t, queries, (dq_ihQt, *zeros))
            return dq_ihQt, group.put(dk_BSHQ, j, dk_hsQ), group.put(dv_BSHU, j, dv_hsU)

        dq_BTHQ, dk_BSHQ, dv_BSHU = carry
        start = (jnp.zeros((T // t, h, Q, t), jnp.float32), dk_BSHQ, dv_BSHU)
        dq_ihQt, dk_BSHQ, dv_BSHU = _loop(S // s, keys, start)
        dq_hTQ = einops.rearrange(dq_ihQt, "i h q t -> h (i t) q")
        return group.put(dq_BTHQ, 0, dq_hTQ), dk_BSHQ, dv_BSHU

    start = tuple(jnp.zeros_like(x) for x in (q_BTHQ, k_BSHQ, v_BSHU))
    return lax.fori_loop(0, B * (H // h), visit, start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_BTHQ, k_BSHQ, v_BSHU, masks, plan):
    return _forward(q_BTHQ, k_BSHQ, v_BSHU, masks, plan)


def _vjp_forward(q_BTHQ, k_BSHQ, v_BSHU, masks, plan):
    out_BTHU, lse_BHT = _forward(q_BTHQ, k_BSHQ, v_BSHU, masks, plan)
    out_BTHU = checkpoint_name(out_BTHU, "attention_out")
    lse_BHT = checkpoint_name(lse_BHT, "attention_lse")
    return (out_BTHU, lse_BHT), (q_BTHQ, k_BSHQ, v_BSHU, masks, out_BTHU, lse_BHT)


def _vjp_backward(plan, saved, cotangents):
    q_BTHQ, k_BSHQ, v_BSHU, masks, out_BTHU, lse_BHT = saved
    dout_BTHU, dlse_BHT = cotangents
    dq, dk, dv = _backward(q_BTHQ, k_BSHQ, v_BSHU, masks, out_BTHU, lse_BHT, dout_BTHU, dlse_BHT, plan)
    return dq, dk, dv, jax.tree.map(lambda m: np.zeros(m.shape, jax.dtypes.float0), masks)


_attention.defvjp(_vjp_forward, _vjp_backward)
