"""Gradient of the queries for Hopper: a block holds 2 x 64 queries of one head, tiles of keys pass by."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import shim
from dsv3_jax.kernels.attention import mosaic_tiles as mt
from dsv3_jax.kernels.attention.mosaic_tiles import BLOCK, ROWS, WARPGROUPS, Plan
from dsv3_jax.kernels.shim import pl, plgpu

# Keys of the tiles that pass by.
TILE = 64


def queries_gradient(
    q_BTHQ: jax.Array,
    k_BSGQ: jax.Array,
    v_BSGU: jax.Array,
    ids: tuple[jax.Array, jax.Array] | None,
    rows_B2HT: jax.Array,
    dout_BTHU: jax.Array,
    plan: Plan,
    S: int,
) -> jax.Array:
    """dq, of arrays padded to whole tiles.

    Args:
      ids: as in `mosaic_forward.forward`, padded to whole blocks.
      rows_B2HT: -lse / scale and -delta, padded to whole blocks.
      S: how many of the keys are no padding.
    """
    (B, T, H, Q), (_, _, G, U) = q_BTHQ.shape, v_BSGU.shape
    dtype, stages = q_BTHQ.dtype, plan.dq.stages
    blocks, key_tiles = mt.cdiv(T, BLOCK), mt.cdiv(S, TILE)
    packed = ids is not None
    ids_BT, ids_BS = ids or (None, None)
    bounds_B2I = mt.visible_tiles(ids_BT, BLOCK, ids_BS, TILE) if packed else None
    unit = plan.scale * mt.LOG2_E

    def attention_dq(
        q_ref, k_ref, v_ref, dout_ref, ids_t_ref, ids_s_ref, bounds_ref, rows_ref, dq_ref,
        q_smem, dout_smem, k_smem, v_smem, ids_smem, own_ready, k_ready, v_ready, k_free, v_free,
    ):  # fmt: skip
        b, h, wg = (lax.axis_index(name) for name in ("batch", "heads", "wg"))
        i = blocks - 1 - lax.axis_index("blocks")
        first, stop = mt.key_range(plan, bounds_ref, b, i, key_tiles, TILE)

        @pl.when(wg < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(mt.COMPUTE_REGISTERS, action="increase")
            start = i * BLOCK + wg * ROWS
            rows = pl.ds(start, ROWS)
            q_tile, dout_tile, ready = q_smem.at[wg], dout_smem.at[wg], own_ready.at[wg]
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h], q_tile, ready)
            plgpu.copy_gmem_to_smem(dout_ref.at[b, rows, h], dout_tile, ready)

            def own(ref):
                return shim.load(ref, layout=mt.rows_layout(), optimized=False)

            shift, minus_delta = own(rows_ref.at[b, 0, h, rows]), own(rows_ref.at[b, 1, h, rows])
            ids_t = own(ids_t_ref.at[b, rows]) if packed else None
            plgpu.barrier_wait(ready)
            shape = (ROWS, TILE)

            def step(j, dq, masked):
                slot = lax.rem(j - first, stages)
                k_tile = k_smem.at[slot]
                plgpu.barrier_wait(k_ready.at[slot])
                plgpu.barrier_wait(v_ready.at[slot])
                scores, dp = mt.accumulate(
                    (mt.over_rows(shift, shape), q_tile, shim.transpose(k_tile, (1, 0))),
                    (mt.over_rows(minus_delta, shape), dout_tile, shim.transpose(v_smem.at[slot], (1, 0))),
                )
                plgpu.barrier_arrive(v_free.at[slot])
                p = jnp.exp2(scores * unit)
                if masked:
                    # A key of padding has score 0, which may be far above lse: infinite weight times zeros.
                    p = jnp.where(mt.visible(plan, start, j, TILE, S, ids_t, ids_smem.at[slot]), p, 0.0)
                dq = mt.accumulate((dq, (p * dp).astype(dtype), k_tile))
                if packed:
                    plgpu.commit_smem()  # The ids were read by plain loads: before a copy overwrites them.
                plgpu.barrier_arrive(k_free.at[slot])
                return dq

            def skip(j, dq):
                slot = lax.rem(j - first, stages)
                plgpu.barrier_wait(k_ready.at[slot])
                plgpu.barrier_wait(v_ready.at[slot])
                plgpu.barrier_arrive(k_free.at[slot])
                plgpu.barrier_arrive(v_free.at[slot])
                return dq

            # Tiles before `whole` are visible to every row; those from `own_stop` on to none of this warpgroup's.
            whole, own_stop = first if packed else jnp.int32(S // TILE), stop
            if plan.causal:
                own_stop = jnp.minimum(stop, jnp.maximum(first, lax.div(start + ROWS, TILE)))
                whole = first if packed else jnp.minimum(stop, lax.div(start, TILE))
            dq = mt.full((ROWS, Q), 0.0)
            dq = lax.fori_loop(first, whole, lambda j, dq: step(j, dq, masked=False), dq)
            if plan.causal or packed or S % TILE:
                dq = lax.fori_loop(whole, own_stop, lambda j, dq: step(j, dq, masked=True), dq)
            if plan.causal:
                lax.fori_loop(own_stop, stop, lambda j, _: skip(j, None), None)
            q_tile[...] = (dq * plan.scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile, dq_ref.at[b, rows, h])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == WARPGROUPS)
        def _move():
            g = lax.div(h, H // G)
            sources = (k_ref.at[b, :, g], v_ref.at[b, :, g], ids_s_ref.at[b] if packed else None)
            mt.move_keys(
                first, stop, sources, (k_smem, v_smem, ids_smem), (k_ready, v_ready), (k_free, v_free)
            )

    return mt.launch(
        attention_dq,
        (q_BTHQ, k_BSGQ, v_BSGU, dout_BTHU, ids_BT, ids_BS, bounds_B2I, rows_B2HT),
        jax.ShapeDtypeStruct(q_BTHQ.shape, dtype),
        [
            mt.tiled((WARPGROUPS, ROWS, Q), dtype),
            mt.tiled((WARPGROUPS, ROWS, U), dtype),
            mt.tiled((stages, TILE, Q), dtype),
            mt.tiled((stages, TILE, U), dtype),
            plgpu.SMEM((stages, TILE), jnp.int32),
            mt.barriers(WARPGROUPS, 2),
            mt.barriers(stages, 1 + packed),
            mt.barriers(stages),
            mt.barriers(stages, WARPGROUPS),
            mt.barriers(stages, WARPGROUPS),
        ],
        (B, H, blocks),
    )
