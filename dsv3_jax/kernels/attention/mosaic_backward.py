"""Backward attention for Hopper in two kernels: one for dq, one for dk and dv (FlashAttention-2, arXiv 2307.08691).

Weights are recomputed from the log-sum-exp. Each kernel keeps its sums in registers from its first tile to
its last and nothing is added up in memory, so a result does not depend on the order of blocks. The products
of scores start from -lse / scale and those of dp from -delta instead of from 0: then weights are
exp2(unit * product) and ds is weights * dp, without values a column held beside the accumulators, which
leaves all of them in registers.
"""

from __future__ import annotations

import einops
import jax
import jax.numpy as jnp

from dsv3_jax.kernels.attention import mosaic_tiles as mt
from dsv3_jax.kernels.attention.mosaic_dkv import keys_gradient
from dsv3_jax.kernels.attention.mosaic_dq import queries_gradient
from dsv3_jax.kernels.attention.mosaic_tiles import BLOCK, Plan


def backward(
    q_BTHQ: jax.Array,
    k_BSGQ: jax.Array,
    v_BSGU: jax.Array,
    ids: tuple[jax.Array, jax.Array] | None,
    out_BTHU: jax.Array,
    lse_BHT: jax.Array,
    dout_BTHU: jax.Array,
    dlse_BHT: jax.Array,
    plan: Plan,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k, v; ids as in `mosaic_forward.forward`."""
    delta_BTH = (out_BTHU.astype(jnp.float32) * dout_BTHU.astype(jnp.float32)).sum(-1)
    delta_BHT = einops.rearrange(delta_BTH, "b t h -> b h t") - dlse_BHT
    # Large and finite where a query sees nothing: its weights become exp2(-huge) = 0.
    shift_BHT = -jnp.minimum(lse_BHT, 1e30) / plan.scale
    # Past the last query the shift keeps weights 0; a padded row's q, dout and delta are 0.
    rows_B2HT = mt.pad_to(jnp.stack([shift_BHT, -delta_BHT], axis=1), BLOCK, -1e30 / plan.scale)
    if ids is not None:
        ids = mt.pad_to(ids[0], BLOCK, -1), mt.pad_to(ids[1], BLOCK, 0)
    T, S = q_BTHQ.shape[1], k_BSGQ.shape[1]
    q_BTHQ, k_BSGQ, v_BSGU, dout_BTHU = (mt.whole_tiles(x) for x in (q_BTHQ, k_BSGQ, v_BSGU, dout_BTHU))
    dq_BTHQ = queries_gradient(q_BTHQ, k_BSGQ, v_BSGU, ids, rows_B2HT, dout_BTHU, plan, S)
    dk_BSGQ, dv_BSGU = keys_gradient(q_BTHQ, k_BSGQ, v_BSGU, ids, rows_B2HT, dout_BTHU, plan)
    return dq_BTHQ[:, :T], dk_BSGQ[:, :S], dv_BSGU[:, :S]
