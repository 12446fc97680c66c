"""Softmax attention: as many key heads as query heads (expanded MLA) or groups of query heads to one."""

from __future__ import annotations

from typing import Literal, overload

import jax

from dsv3_jax.kernels import registry
from dsv3_jax.kernels.attention import mosaic, others, reference
from dsv3_jax.kernels.registry import Implementation, call

ATTENTION = {
    "mosaic": registry.mosaic(mosaic.attention, refuses=mosaic.refuses, shape_class=mosaic.shape_class),
    "reference": Implementation(reference.attention),
    # For comparison: after "reference", which takes everything, "auto" never comes to them.
    "cudnn": Implementation(others.cudnn, platforms=frozenset({"gpu"}), refuses=others.cudnn_refuses),
    "tokamax": Implementation(
        others.tokamax,
        platforms=frozenset({"gpu"}),
        refuses=others.tokamax_refuses,
        missing=others.tokamax_missing,
    ),
}


@overload
def attention(
    q_BTHQ: jax.Array,
    k_BSGQ: jax.Array,
    v_BSGU: jax.Array,
    *,
    scale: float,
    causal: bool = True,
    segments_BT: jax.Array | None = None,
    segments_BS: jax.Array | None = None,
    mask_BTS: jax.Array | None = None,
    return_lse: Literal[False] = False,
    implementation: str = "auto",
) -> jax.Array: ...


@overload
def attention(
    q_BTHQ: jax.Array,
    k_BSGQ: jax.Array,
    v_BSGU: jax.Array,
    *,
    scale: float,
    causal: bool = True,
    segments_BT: jax.Array | None = None,
    segments_BS: jax.Array | None = None,
    mask_BTS: jax.Array | None = None,
    return_lse: Literal[True],
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]: ...


def attention(
    q_BTHQ: jax.Array,
    k_BSGQ: jax.Array,
    v_BSGU: jax.Array,
    *,
    scale: float,
    causal: bool = True,
    segments_BT: jax.Array | None = None,
    segments_BS: jax.Array | None = None,
    mask_BTS: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(scale q k^T) v with causal, segment and explicit masks; memory linear in length.

    A query that may attend to nothing gives zeros. Differentiable in q, k and v; the backward pass
    keeps only the output and the log-sum-exp, tagged "attention_out" and "attention_lse" for
    `jax.checkpoint` policies, and recomputes the rest.

    Args:
      q_BTHQ, k_BSGQ, v_BSGU: queries, keys, values; Q and U may differ (192 and 128 in V3). H is a multiple
        of G: query head h attends to key and value head h // (H / G).
      scale: softmax scale.
      causal: query t sees keys s <= t; needs T == S.
      segments_BT: int32; equal positive ids attend to each other, 0 is padding and attends to nothing.
      segments_BS: the keys' ids; by default the queries' (T == S).
      mask_BTS: bool, True = may attend, on top of the other masks.
      return_lse: also return the natural logarithm of each softmax's denominator.
      implementation: "auto", "reference", "mosaic" (Hopper GPUs), or for comparison "cudnn" or "tokamax".

    Returns:
      out_BTHU in v's dtype; softmax is float32. With return_lse also lse_BHT, float32, +inf where a query
      attends to nothing.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown, cannot run here or refuses the arguments.
    """
    B, T, H, Q = q_BTHQ.shape
    S, G, U = v_BSGU.shape[1:]
    if k_BSGQ.shape != (B, S, G, Q) or v_BSGU.shape != (B, S, G, U):
        raise ValueError(
            f"q {q_BTHQ.shape} (B T H Q), k {k_BSGQ.shape} (B S G Q), v {v_BSGU.shape} (B S G U) disagree"
        )
    if G == 0 or H % G:
        raise ValueError(f"{H} query heads are no multiple of {G} key and value heads")
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
    arrays = (q_BTHQ, k_BSGQ, v_BSGU, segments_BT, segments_BS, mask_BTS)
    out_BTHU, lse_BHT = call("attention", implementation, ATTENTION, *arrays, scale=scale, causal=causal)
    if return_lse and lse_BHT is None:
        raise ValueError(f"kernel attention: implementation {implementation!r} gives no log-sum-exp")
    return (out_BTHU, lse_BHT) if return_lse else out_BTHU
