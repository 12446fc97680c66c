"""Gradients of keys and values for Hopper: a block holds 2 x 64 keys of one head, tiles of queries pass by.

With grouped heads the queries of all heads of the group pass by, one head after the other.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import shim
from dsv3_jax.kernels.attention import mosaic_tiles as mt
from dsv3_jax.kernels.attention.mosaic_tiles import BLOCK, ROWS, WARPGROUPS, Plan
from dsv3_jax.kernels.shim import pl, plgpu

# Queries of the tiles that pass by.
TILE = 64


def keys_gradient(
    q_BTHQ: jax.Array,
    k_BSGQ: jax.Array,
    v_BSGU: jax.Array,
    ids: tuple[jax.Array, jax.Array] | None,
    rows_B2HT: jax.Array,
    dout_BTHU: jax.Array,
    plan: Plan,
) -> tuple[jax.Array, jax.Array]:
    """dk and dv, of arrays padded as for `mosaic_dq.queries_gradient`. Rows of padding may hold anything."""
    (B, T, H, Q), (_, S, G, U) = q_BTHQ.shape, v_BSGU.shape
    dtype, stages, group = q_BTHQ.dtype, plan.dkv.stages, H // G
    blocks, query_tiles = mt.cdiv(S, BLOCK), mt.cdiv(T, TILE)
    packed = ids is not None
    ids_BT, ids_BS = ids or (None, None)
    bounds_B2J = mt.visible_tiles(ids_BS, BLOCK, ids_BT, TILE) if packed else None
    unit = plan.scale * mt.LOG2_E

    def attention_dk_dv(
        q_ref, k_ref, v_ref, dout_ref, ids_t_ref, ids_s_ref, bounds_ref, rows_ref, dk_ref, dv_ref,
        k_smem, v_smem, q_smem, dout_smem, shift_smem, delta_smem, ids_smem,
        own_ready, q_ready, dout_ready, q_free, dout_free,
    ):  # fmt: skip
        b, g, wg = (lax.axis_index(name) for name in ("batch", "heads", "wg"))
        j = lax.axis_index("blocks")
        first, stop = jnp.int32(0), jnp.int32(query_tiles)
        if plan.causal:
            first = jnp.minimum(stop, j * (BLOCK // TILE))
        if packed:
            begin, end = bounds_ref[b, 0, j], bounds_ref[b, 1, j]
            stop = jnp.minimum(stop, end)
            first = jnp.minimum(jnp.maximum(first, begin), stop)
        per_head = stop - first

        @pl.when(wg < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(mt.COMPUTE_REGISTERS, action="increase")
            start = j * BLOCK + wg * ROWS
            rows = pl.ds(start, ROWS)
            k_tile, v_tile, ready = k_smem.at[wg], v_smem.at[wg], own_ready.at[wg]
            plgpu.copy_gmem_to_smem(k_ref.at[b, rows, g], k_tile, ready)
            plgpu.copy_gmem_to_smem(v_ref.at[b, rows, g], v_tile, ready)
            ids_s = None
            if packed:
                ids_s = shim.load(ids_s_ref.at[b, rows], layout=mt.rows_layout(), optimized=False)
            plgpu.barrier_wait(ready)
            shape = (ROWS, TILE)

            def number(first_row, axis):
                # Opaque, so that it is computed where it is used and not kept through the loop.
                layout = plgpu.Layout.WGMMA.reduce(axis)
                row = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=layout)
                return lax.optimization_barrier(first_row + row)

            def visible(i, slot):
                parts = []
                if plan.causal:
                    parts.append(
                        mt.over_columns(number(i * TILE, 0), shape) >= mt.over_rows(number(start, 1), shape)
                    )
                if packed:
                    ids_t = shim.load(ids_smem.at[slot], layout=mt.columns_layout())
                    parts.append(mt.over_rows(ids_s, shape) == mt.over_columns(ids_t, shape))
                return parts[0] if len(parts) == 1 else parts[0] & parts[1]

            def column_values(smem):
                return mt.over_columns(shim.load(smem, layout=mt.columns_layout()), shape)

            def step(head, i, carry, masked):
                dk, dv = carry
                slot = lax.rem(head * per_head + i - first, stages)
                q_tile, dout_tile = q_smem.at[slot], dout_smem.at[slot]
                # Not `k_tile` of outside: the compiler would keep the 40 registers of their descriptors through
                # the loop, where dk and dv leave no room for them.
                same = lax.optimization_barrier(wg)
                k_tile, v_tile = k_smem.at[same], v_smem.at[same]
                plgpu.barrier_wait(q_ready.at[slot])
                scores = mt.accumulate(
                    (column_values(shift_smem.at[slot]), k_tile, shim.transpose(q_tile, (1, 0)))
                )
                p = jnp.exp2(scores * unit)
                if masked:
                    p = jnp.where(visible(i, slot), p, 0.0)
                plgpu.barrier_wait(dout_ready.at[slot])
                dp = mt.accumulate(
                    (column_values(delta_smem.at[slot]), v_tile, shim.transpose(dout_tile, (1, 0)))
                )
                ds = p * dp
                dv, dk = mt.accumulate((dv, p.astype(dtype), dout_tile), (dk, ds.astype(dtype), q_tile))
                plgpu.commit_smem()  # Shift, delta and ids were read by plain loads: before copies overwrite them.
                plgpu.barrier_arrive(dout_free.at[slot])
                plgpu.barrier_arrive(q_free.at[slot])
                return dk, dv

            def skip(head, i):
                slot = lax.rem(head * per_head + i - first, stages)
                plgpu.barrier_wait(q_ready.at[slot])
                plgpu.barrier_wait(dout_ready.at[slot])
                plgpu.barrier_arrive(q_free.at[slot])
                plgpu.barrier_arrive(dout_free.at[slot])

            def one_head(head, carry):
                def steps(first, stop, masked, carry):
                    return lax.fori_loop(first, stop, lambda i, c: step(head, i, c, masked), carry)

                if not plan.causal:
                    return steps(first, stop, packed, carry)
                # Of a block's first two tiles the second warpgroup sees none of the first.
                own_first = jnp.minimum(stop, jnp.maximum(first, lax.div(start, TILE)))
                lax.fori_loop(first, own_first, lambda i, _: skip(head, i), None)
                if packed:
                    return steps(own_first, stop, True, carry)
                # The diagonal is one tile: no loop, so that nothing of its mask is kept in registers.
                carry = lax.cond(
                    own_first < stop,
                    lambda carry: step(head, own_first, carry, masked=True),
                    lambda carry: carry,
                    carry,
                )
                return steps(jnp.minimum(own_first + 1, stop), stop, False, carry)

            carry = mt.full((ROWS, Q), 0.0), mt.full((ROWS, U), 0.0)
            dk, dv = one_head(0, carry) if group == 1 else lax.fori_loop(0, group, one_head, carry)
            k_tile[...], v_tile[...] = (dk * plan.scale).astype(dtype), dv.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_tile, dk_ref.at[b, rows, g])
            plgpu.copy_smem_to_gmem(v_tile, dv_ref.at[b, rows, g])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == WARPGROUPS)
        def _move():
            plgpu.set_max_registers(mt.MEMORY_REGISTERS, action="decrease")

            @pl.loop(0, group * per_head)
            def _tile(n):
                slot, again = lax.rem(n, stages), n >= stages
                h = g * group + (lax.div(n, per_head) if group > 1 else 0)
                queries = pl.ds((first + (lax.rem(n, per_head) if group > 1 else n)) * TILE, TILE)

                def copy(source, target, ready):
                    plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])

                pl.when(again)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                copy(q_ref.at[b, queries, h], q_smem, q_ready)
                copy(rows_ref.at[b, 0, h, queries], shift_smem, q_ready)
                if packed:
                    copy(ids_t_ref.at[b, queries], ids_smem, q_ready)
                pl.when(again)(lambda: plgpu.barrier_wait(dout_free.at[slot]))
                copy(dout_ref.at[b, queries, h], dout_smem, dout_ready)
                copy(rows_ref.at[b, 1, h, queries], delta_smem, dout_ready)

    return mt.launch(
        attention_dk_dv,
        (q_BTHQ, k_BSGQ, v_BSGU, dout_BTHU, ids_BT, ids_BS, bounds_B2J, rows_B2HT),
        [jax.ShapeDtypeStruct(k_BSGQ.shape, dtype), jax.ShapeDtypeStruct(v_BSGU.shape, dtype)],
        [
            mt.tiled((WARPGROUPS, ROWS, Q), dtype),
            mt.tiled((WARPGROUPS, ROWS, U), dtype),
            mt.tiled((stages, TILE, Q), dtype),
            mt.tiled((stages, TILE, U), dtype),
            plgpu.SMEM((stages, TILE), jnp.float32),
            plgpu.SMEM((stages, TILE), jnp.float32),
            plgpu.SMEM((stages, TILE), jnp.int32),
            mt.barriers(WARPGROUPS, 2),
            mt.barriers(stages, 2 + packed),
            mt.barriers(stages, 2),
            mt.barriers(stages, WARPGROUPS),
            mt.barriers(stages, WARPGROUPS),
        ],
        (B, G, blocks),
    )
