"""Softmax attention with equal numbers of query and key heads, as in expanded MLA."""

from __future__ import annotations

import jax

from dsv3_jax.kernels.attention import reference
from dsv3_jax.kernels.registry import Implementation, call

ATTENTION = {"reference": Implementation(reference.attention)}


def attention(
    q_BTHQ: jax.Array,
    k_BSHQ: jax.Array,
    v_BSHU: jax.Array,
    *,
    scale: float,
    causal: bool = True,
    segments_BT: jax.Array | None = None,
    segments_BS: jax.Array | None = None,
    mask_BTS: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """softmax(scale q k^T) v with causal, segment and explicit masks; memory linear in length.

    A query that may attend to nothing gives zeros. Differentiable in q, k and v; the backward pass
    keeps only the output and the log-sum-exp, tagged "attention_out" and "attention_lse" for
    `jax.checkpoint` policies, and recomputes the rest.

    Args:
      q_BTHQ, k_BSHQ, v_BSHU: queries, keys, values; Q and U may differ (192 and 128 in V3).
      scale: softmax scale.
      causal: query t sees keys s <= t; needs T == S.
      segments_BT: int32; equal positive ids attend to each other, 0 is padding and attends to nothing.
      segments_BS: the keys' ids; by default the queries' (T == S).
      mask_BTS: bool, True = may attend, on top of the other masks.
      implementation: "auto" or "reference".

    Returns:
      out_BTHU in v's dtype; softmax is float32.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
    """
    B, T, H, Q = q_BTHQ.shape
    S, U = v_BSHU.shape[1], v_BSHU.shape[3]
    if k_BSHQ.shape != (B, S, H, Q) or v_BSHU.shape != (B, S, H, U):
        raise ValueError(
            f"q {q_BTHQ.shape} (B T H Q), k {k_BSHQ.shape} (B S H Q), v {v_BSHU.shape} (B S H U) disagree"
        )
    if causal and T != S:
        raise ValueError(f"causal attention is by index and needs as many queries as keys, got {T} and {S}")
    if segments_BT is None and segments_BS is not None:
        raise ValueError("segments_BS given without segments_BT")
    if segments_BT is not None and segments_BS is None:
        if T != S:
            raise ValueError(f"segments_BS is needed with {T} queries and {S} keys")
        segments_BS = segments_BT
    for name, array, shape in (
        ("segments_BT", segments_BT, (B, T)),
        ("segments_BS", segments_BS, (B, S)),
        ("mask_BTS", mask_BTS, (B, T, S)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    return call(
        "attention",
        implementation,
        ATTENTION,
        q_BTHQ,
        k_BSHQ,
        v_BSHU,
        segments_BT,
        segments_BS,
        mask_BTS,
        scale=scale,
        causal=causal,
    )
