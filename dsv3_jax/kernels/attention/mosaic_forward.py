"""Forward attention for Hopper: online softmax over tiles of keys, two warpgroups taking turns.

While one warpgroup runs its softmax, the other has the tensor cores (FlashAttention-3, arXiv 2407.08608,
section 3.1); a third moves keys and values ahead of them. A block holds 2 x 64 queries of one head.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import shim
from dsv3_jax.kernels.attention import mosaic_tiles as mt
from dsv3_jax.kernels.attention.mosaic_tiles import BLOCK, ROWS, WARPGROUPS, Plan
from dsv3_jax.kernels.shim import pl, plgpu


def forward(
    q_BTHQ: jax.Array,
    k_BSGQ: jax.Array,
    v_BSGU: jax.Array,
    ids: tuple[jax.Array, jax.Array] | None,
    plan: Plan,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTHU, lse_BHT); lse is +inf where a query attends to nothing.

    ids: of queries (B T) and keys (B S), int32, positive where they count; -1 pads queries and 0 keys.
    """
    (B, T, H, Q), (_, S, G, U) = q_BTHQ.shape, v_BSGU.shape
    dtype, (s, stages) = q_BTHQ.dtype, plan.forward
    blocks, key_tiles = mt.cdiv(T, BLOCK), mt.cdiv(S, s)
    packed = ids is not None
    ids_BT = ids_BS = bounds_B2I = None
    if ids is not None:
        ids_BT, ids_BS = mt.pad_to(ids[0], BLOCK, -1), mt.pad_to(ids[1], s, 0)
        bounds_B2I = mt.visible_tiles(ids_BT, BLOCK, ids_BS, s)

    def kernel(scratch, q_ref, k_ref, v_ref, ids_t_ref, ids_s_ref, bounds_ref, out_ref, lse_ref):
        (q_smem, out_smem), k_smem, v_smem, ids_smem, lse_smem, q_ready, k_ready, v_ready, *more = scratch
        k_free, v_free, turn = more
        b, h, wg = (lax.axis_index(name) for name in ("batch", "heads", "wg"))
        # Longest blocks first: with causality the last queries have the most keys.
        i = blocks - 1 - lax.axis_index("blocks")
        first, stop = mt.key_range(plan, bounds_ref, b, i, key_tiles, s)

        @pl.when(wg < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(mt.COMPUTE_REGISTERS, action="increase")
            start = i * BLOCK + wg * ROWS
            rows = pl.ds(start, ROWS)
            q_tile = q_smem.at[wg]
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h], q_tile, q_ready.at[wg])
            ids_t = None
            if packed:
                ids_t = shim.load(ids_t_ref.at[b, rows], layout=mt.rows_layout(), optimized=False)
            plgpu.barrier_wait(q_ready.at[wg])

            def take_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def step(j, carry, masked):
                out, top, total = carry
                slot = lax.rem(j - first, stages)
                plgpu.barrier_wait(k_ready.at[slot])
                scores = mt.product(q_tile, shim.transpose(k_smem.at[slot], (1, 0)), take_turns)
                if masked:
                    seen = mt.visible(plan, start, j, s, S, ids_t, ids_smem.at[slot])
                    scores = jnp.where(seen, scores, -jnp.inf)
                if packed:
                    plgpu.commit_smem()  # The ids were read by plain loads: before a copy overwrites them.
                plgpu.barrier_arrive(k_free.at[slot])
                # In units of log2 e, so that the scale and the maximum are one multiply-add before exp2.
                unit = plan.scale * mt.LOG2_E
                new_top = jnp.maximum(top, scores.max(axis=1) * unit)
                # A row without any visible key so far has maximum -inf, and -inf - -inf would be NaN.
                shift = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
                decay = jnp.exp2(top - shift)
                p = jnp.exp2(scores * unit - mt.over_rows(shift, scores.shape))
                out *= mt.over_rows(decay, out.shape)
                total = total * decay + p.sum(axis=1)
                weights = p.astype(dtype)
                out, total, new_top, weights = lax.optimization_barrier((out, total, new_top, weights))
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_ready.at[slot])
                plgpu.barrier_wait(turn)
                out = mt.accumulate((out, weights, v_smem.at[slot]))
                plgpu.barrier_arrive(v_free.at[slot])
                return out, new_top, total

            carry = (
                mt.full((ROWS, U), 0.0),
                mt.full((ROWS,), -jnp.inf, mt.rows_layout()),
                mt.full((ROWS,), 0.0, mt.rows_layout()),
            )
            # Tiles before `whole` are visible to every row, so their scores need no mask.
            whole = first if packed else jnp.int32(S // s)
            if plan.causal and not packed:
                whole = jnp.minimum(whole, lax.div(start, s))
            pl.when(wg == 1)(take_turns)
            carry = lax.fori_loop(first, whole, lambda j, c: step(j, c, masked=False), carry)
            if plan.causal or packed or S % s:
                carry = lax.fori_loop(whole, stop, lambda j, c: step(j, c, masked=True), carry)
            pl.when(wg == 0)(take_turns)

            out, top, total = carry
            empty = total == 0.0
            inverse = jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, total))
            lse = top * math.log(2) + jnp.log(jnp.where(empty, 1.0, total))
            out_tile, lse_tile = out_smem.at[wg, pl.ds(0, ROWS)], lse_smem.at[wg]
            out_tile[...] = (out * mt.over_rows(inverse, out.shape)).astype(dtype)
            lse_tile[...] = jnp.where(empty, jnp.inf, lse)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tile, out_ref.at[b, rows, h])
            plgpu.copy_smem_to_gmem(lse_tile, lse_ref.at[b, h, rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == WARPGROUPS)
        def _move():
            g = lax.div(h, H // G)
            sources = (k_ref.at[b, :, g], v_ref.at[b, :, g], ids_s_ref.at[b] if packed else None)
            mt.move_keys(
                first, stop, sources, (k_smem, v_smem, ids_smem), (k_ready, v_ready), (k_free, v_free)
            )

    def attention_forward(*refs):
        # The output of a warpgroup takes the place of its queries; both have the same bytes a warpgroup.
        queries_or_output = plgpu.RefUnion(
            mt.tiled((WARPGROUPS, ROWS, Q), dtype), mt.tiled((WARPGROUPS, ROWS * Q // U, U), dtype)
        )
        pl.run_scoped(
            lambda *scratch: kernel(scratch, *refs),
            queries_or_output,
            mt.tiled((stages, s, Q), dtype),
            mt.tiled((stages, s, U), dtype),
            plgpu.SMEM((stages, s), jnp.int32),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            mt.barriers(WARPGROUPS),
            mt.barriers(stages, 1 + packed),
            mt.barriers(stages),
            mt.barriers(stages, WARPGROUPS),
            mt.barriers(stages, WARPGROUPS),
            mt.barriers(1, WARPGROUPS),
            collective_axes="wg",
        )

    q_BTHQ, k_BSGQ, v_BSGU = (mt.whole_tiles(x) for x in (q_BTHQ, k_BSGQ, v_BSGU))
    out_BTHU, lse_BHT = mt.launch(
        attention_forward,
        (q_BTHQ, k_BSGQ, v_BSGU, ids_BT, ids_BS, bounds_B2I),
        [
            jax.ShapeDtypeStruct((*q_BTHQ.shape[:3], U), dtype),
            # Whole blocks: a copy of one row needs its array's rows aligned to 16 bytes.
            jax.ShapeDtypeStruct((B, H, blocks * BLOCK), jnp.float32),
        ],
        (),
        (B, H, blocks),
    )
    return out_BTHU[:, :T], lse_BHT[:, :, :T]
