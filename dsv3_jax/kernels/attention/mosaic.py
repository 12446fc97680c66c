"""Flash attention for Hopper in Pallas Mosaic GPU: what it takes, and the differentiable function.

The kernels are in `mosaic_forward` and `mosaic_backward`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.kernels import tables
from dsv3_jax.kernels.attention.mosaic_backward import backward
from dsv3_jax.kernels.attention.mosaic_forward import forward
from dsv3_jax.kernels.attention.mosaic_tiles import BackwardTiles, ForwardTiles, Plan

Ids = tuple[jax.Array, jax.Array] | None

# Causal kernels miscompile with the ptxas of these CUDA versions (said by JAX's own Hopper attention).
BAD_CUDA = (12080, 12091)
MAX_GRID = 65_535


def refuses(
    q_BTHQ: jax.Array,
    k_BSGQ: jax.Array,
    v_BSGU: jax.Array,
    segments_BT: jax.Array | None,
    segments_BS: jax.Array | None,
    mask_BTS: jax.Array | None,
    *,
    scale: float,
    causal: bool,
) -> str | None:
    """Why these arguments are not taken, or None."""
    (B, T, H, Q), (_, S, _, U) = q_BTHQ.shape, v_BSGU.shape
    dtypes = {x.dtype.name for x in (q_BTHQ, k_BSGQ, v_BSGU)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"it takes bfloat16 or float16, alike in q, k and v, not {', '.join(sorted(dtypes))}"
    if mask_BTS is not None:
        return "it takes causal and segment masks, not mask_BTS"
    if Q % 64 or U % 64 or not 0 < U <= min(Q, 128) or Q > 192:
        return f"it takes head sizes of q/k 64, 128 and 192 and of v 64 and 128, none above q's, not {Q}/{U}"
    if min(B, T, S, H) == 0 or max(B, H) > MAX_GRID:
        return (
            f"it takes 1 to {MAX_GRID} rows and heads and at least one query and key, not {B}, {H}, {T}, {S}"
        )
    if not scale > 0:
        return f"it takes positive scales, not {scale}"
    cuda = _cuda_version()
    if causal and cuda is not None and BAD_CUDA[0] <= cuda < BAD_CUDA[1]:
        return f"CUDA {cuda // 1000}.{cuda % 1000 // 10} miscompiles causal kernels; use 12.9.1 or later"
    return None


def _cuda_version() -> int | None:
    from jax._src.lib import cuda_versions

    return None if cuda_versions is None else cuda_versions.cuda_runtime_get_version()


def shape_class(
    q_BTHQ: jax.Array,
    k_BSGQ: jax.Array,
    v_BSGU: jax.Array,
    segments_BT: jax.Array | None,
    segments_BS: jax.Array | None,
    mask_BTS: jax.Array | None,
    *,
    scale: float,
    causal: bool,
) -> str:
    """What tiling and correctness depend on, such as "q192-v128-bfloat16-causal-packed-grouped"."""
    parts = [f"q{q_BTHQ.shape[3]}", f"v{v_BSGU.shape[3]}", q_BTHQ.dtype.name]
    parts += ["causal"] * causal + ["packed"] * (segments_BT is not None)
    return "-".join(parts + ["grouped"] * (q_BTHQ.shape[2] != k_BSGQ.shape[2]))


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
) -> tuple[jax.Array, jax.Array]:
    """(out_BTHU, lse_BHT), see `api.attention`; whoever calls has asked `refuses`."""
    arrays = (q_BTHQ, k_BSGQ, v_BSGU, segments_BT, segments_BS, mask_BTS)
    shape = shape_class(*arrays, scale=scale, causal=causal)
    # Small heads leave room for more tiles in flight.
    plan = Plan(
        scale=float(scale),
        causal=causal,
        forward=tables.tuned("attention", shape, ForwardTiles(stages=2 if q_BTHQ.shape[3] > 64 else 4)),
        dq=tables.tuned("attention_dq", shape, BackwardTiles()),
        dkv=tables.tuned("attention_dkv", shape, BackwardTiles()),
    )
    ids: Ids = None
    if segments_BT is not None and segments_BS is not None:
        # Padding of queries never equals that of keys.
        ids = jnp.where(segments_BT > 0, segments_BT, -1), jnp.maximum(segments_BS, 0)
    return _attention(q_BTHQ, k_BSGQ, v_BSGU, ids, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_BTHQ, k_BSGQ, v_BSGU, ids: Ids, plan: Plan):
    return forward(q_BTHQ, k_BSGQ, v_BSGU, ids, plan)


def _vjp_forward(q_BTHQ, k_BSGQ, v_BSGU, ids: Ids, plan: Plan):
    out_BTHU, lse_BHT = forward(q_BTHQ, k_BSGQ, v_BSGU, ids, plan)
    out_BTHU = checkpoint_name(out_BTHU, "attention_out")
    lse_BHT = checkpoint_name(lse_BHT, "attention_lse")
    return (out_BTHU, lse_BHT), (q_BTHQ, k_BSGQ, v_BSGU, ids, out_BTHU, lse_BHT)


def _vjp_backward(plan: Plan, saved: Any, cotangents: tuple[jax.Array, jax.Array]):
    q_BTHQ, k_BSGQ, v_BSGU, ids, out_BTHU, lse_BHT = saved
    dout_BTHU, dlse_BHT = cotangents
    gradients = backward(q_BTHQ, k_BSGQ, v_BSGU, ids, out_BTHU, lse_BHT, dout_BTHU, dlse_BHT, plan)
    return *gradients, jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), ids)


_attention.defvjp(_vjp_forward, _vjp_backward)
