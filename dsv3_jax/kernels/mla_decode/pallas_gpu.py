"""Pallas Mosaic GPU kernel of absorbed latent attention over pages (Hopper).

Heads (times query tokens) are the rows of a tile of 64. A block of 64 slots comes to shared memory once and serves
as key (all J columns) and value (its first C). Four warpgroups work on it in turn: one fetches blocks, one makes
the weights (q k^T, softmax), two hold one half of the value columns each in registers and add weights times values.
Workers, one a multiprocessor, go through the pieces of context that `schedule` hands them; each piece leaves
its normalised result and its log-sum-exp, which a second small kernel combines, in the order of the context.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import shim, tables
from dsv3_jax.kernels.mla_decode.coded_pages import CodedPages
from dsv3_jax.kernels.mla_decode.schedule import BLOCK, Schedule, schedule
from dsv3_jax.kernels.shim import pl, plgpu

ROWS = 64  # rows of a tile: what one WGMMA takes
STAGES = 2  # blocks in shared memory
COMBINED_ROWS = 8  # rows that one program of the combining kernel takes
SHARED_MEMORY = 232_448  # bytes that one block of threads can have on Hopper
LOG2E = math.log2(math.e)

WEIGHTS, FETCH = 2, 3  # warpgroups; 0 and 1 hold the two halves of the value


class Tiles(NamedTuple):
    """How rows are cut (`schedule.schedule`): blocks of a piece, pieces a worker should have, pieces of a row."""

    least: int = 4
    most: int = 32
    pieces_per_worker: int = 1
    limit: int = 8


PARTS_BYTES = 2**28  # what pieces may take for the sake of even shares


def refuses(
    q_BTHJ: Any,
    pages_NPJ: Any,
    tables_BM: Any,
    positions_BT: Any,
    *,
    value_dim: int,
    scale: float,
    mask_BTS: Any,
    block: int,
) -> str | None:
    """The reason why the kernel does not take these arguments, or None."""
    J, P = pages_NPJ.shape[2], pages_NPJ.shape[1]
    if mask_BTS is not None:
        return "a sparse selection (mask) is not taken"
    if isinstance(pages_NPJ, CodedPages):
        return f"pages hold {pages_NPJ.kind} codes, it takes bfloat16"
    if q_BTHJ.dtype != jnp.bfloat16 or pages_NPJ.dtype != jnp.bfloat16:
        return f"queries and pages are {q_BTHJ.dtype.name} and {pages_NPJ.dtype.name}, it takes bfloat16"
    if value_dim % 128 or value_dim > 512 or J % 64 or J > 576:
        return f"value_dim {value_dim} of {J} columns: it takes multiples of 128 to 512, of multiples of 64 to 576"
    if P % BLOCK and (BLOCK % P or P < 8):
        return f"pages of {P} slots: it takes 8, 16, 32 and multiples of 64"
    if q_BTHJ.shape[0] == 0 or q_BTHJ.shape[1] == 0:
        return "there are no queries"
    return None


def shape_class(
    q_BTHJ: Any, pages_NPJ: Any, tables_BM: Any, positions_BT: Any, *, value_dim: int, **_: Any
) -> str:
    """Such as "v512-k576-rows64-page64-bfloat16": what correctness and tile parameters depend on."""
    rows = q_BTHJ.shape[1] * q_BTHJ.shape[2]
    kind = "rows64" if rows > ROWS // 2 else "rows16" if rows <= 16 else "rows32"
    J, P = pages_NPJ.shape[2], pages_NPJ.shape[1]
    return f"v{value_dim}-k{J}-{kind}-page{P}-{q_BTHJ.dtype.name}"


def latent_attention(
    q_BTHJ: jax.Array,
    pages_NPJ: jax.Array,
    tables_BM: jax.Array,
    positions_BT: jax.Array,
    *,
    value_dim: int,
    scale: float,
    mask_BTS: None,
    block: int,
) -> jax.Array:
    """See `paged.paged_latent_attention`; `block` is the kernel's own (64)."""
    B, T, H, J = q_BTHJ.shape
    P, M = pages_NPJ.shape[1], tables_BM.shape[1]
    kind = shape_class(q_BTHJ, pages_NPJ, tables_BM, positions_BT, value_dim=value_dim)
    tile = tables.tuned("paged_latent_attention", kind, Tiles())
    # m: query tokens times heads, padded to whole tiles (or to 8 rows of the only tile).
    rows = T * H
    row_tiles = -(-rows // ROWS)
    padded = row_tiles * ROWS if row_tiles > 1 else -(-rows // 8) * 8
    q_BmJ = jnp.pad(q_BTHJ.reshape(B, rows, J), ((0, 0), (0, padded - rows), (0, 0)))
    limit_Bm = einops.repeat(positions_BT, "b t -> b (t h)", h=H)
    limit_Bm = jnp.pad(limit_Bm, ((0, 0), (0, row_tiles * ROWS - rows)), constant_values=-1)
    last_B = positions_BT.max(1)

    workers = max(1, shim.sm_count() // row_tiles)
    pieces = max(1, -(-workers * tile.pieces_per_worker // B))
    a_row = row_tiles * ROWS * value_dim * 4
    limit = max(1, min(tile.limit, PARTS_BYTES // (B * a_row)))
    plan = schedule(
        last_B, M * P, workers=workers, pieces=pieces, least=tile.least, most=tile.most, limit=limit
    )
    part_imC, lse_im = pieces_kernel(
        q_BmJ, pages_NPJ, tables_BM, limit_Bm, last_B, plan, value_dim=value_dim, scale=scale, workers=workers
    )
    out_BmC = combine_kernel(part_imC, lse_im, plan, rows=padded, dtype=q_BTHJ.dtype)
    return out_BmC[:, :rows].reshape(B, T, H, value_dim)


def pieces_kernel(
    q_BmJ: jax.Array,
    pages_NPJ: jax.Array,
    tables_BM: jax.Array,
    limit_Bm: jax.Array,
    last_B: jax.Array,
    plan: Schedule,
    *,
    value_dim: int,
    scale: float,
    workers: int,
) -> tuple[jax.Array, jax.Array]:
    """Attention of every piece: [i, m, C] float32, and the base-2 log-sum-exp [i, m] of its scores."""
    J, P, C = q_BmJ.shape[2], pages_NPJ.shape[1], value_dim
    row_tiles = limit_Bm.shape[1] // ROWS
    loaded = min(ROWS, q_BmJ.shape[1])
    half = C // 2
    # 512 threads: the compiler has 128 registers for an instruction, one of 256 columns would need 154.
    width = min(half, 128) if half % 128 == 0 else 64
    dtype = q_BmJ.dtype

    def body(*refs):
        inputs, (part_ref, lse_ref), scratch = refs[:10], refs[10:12], refs[12:]
        q_ref, pages_ref, table_ref, limit_ref, last_ref, row_ref, first_ref, blocks_ref, begin_ref, _ = (
            inputs
        )
        q_smem, keys_smem, weights_smem, factor_smem, *barriers = scratch
        q_full, q_free, keys_full, keys_free, weights_full, weights_free = barriers
        worker, row_tile, wg = lax.axis_index("worker"), lax.axis_index("row_tile"), lax.axis_index("wg")
        tile_rows = pl.ds(row_tile * ROWS, ROWS)

        def each_piece(visit, carry):
            return lax.fori_loop(begin_ref[worker], begin_ref[worker + 1], visit, carry)

        @pl.when(wg == FETCH)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            def piece(i, step):
                row, first, blocks = row_ref[i], first_ref[i], blocks_ref[i]
                last_page = last_ref[row] // P
                plgpu.barrier_wait(q_free)
                plgpu.copy_gmem_to_smem(
                    q_ref.at[row, pl.ds(row_tile * ROWS, loaded)], q_smem.at[pl.ds(0, loaded)], q_full
                )

                def block(j, step):
                    slot = lax.rem(step, STAGES)
                    start = (first + j) * BLOCK
                    if P >= BLOCK:
                        page = table_ref[row, start // P]  # on its way while the place becomes free
                        plgpu.barrier_wait(keys_free.at[slot])
                        source = pages_ref.at[page, pl.ds(lax.rem(start, P), BLOCK)]
                        plgpu.copy_gmem_to_smem(source, keys_smem.at[slot], keys_full.at[slot])
                    else:
                        pages = [
                            table_ref[row, jnp.minimum(start // P + k, last_page)] for k in range(BLOCK // P)
                        ]
                        plgpu.barrier_wait(keys_free.at[slot])
                        for k, page in enumerate(pages):
                            target = keys_smem.at[slot, pl.ds(k * P, P)]
                            plgpu.copy_gmem_to_smem(pages_ref.at[page], target, keys_full.at[slot])
                    return step + 1

                return lax.fori_loop(0, blocks, block, step)

            each_piece(piece, jnp.int32(0))

        @pl.when(wg == WEIGHTS)
        def _weights():
            plgpu.set_max_registers(152, action="increase")
            plgpu.barrier_arrive(q_free)
            column = plgpu.Layout.WGMMA.reduce(1)

            def piece(i, step):
                row, first, blocks = row_ref[i], first_ref[i], blocks_ref[i]
                last = last_ref[row]
                limit_m = shim.load(limit_ref.at[row, tile_rows], layout=column, optimized=False)
                plgpu.barrier_wait(q_full)

                def block(j, carry):
                    step, max_m, sum_m = carry
                    slot = lax.rem(step, STAGES)
                    start = (first + j) * BLOCK
                    plgpu.barrier_wait(keys_full.at[slot])

                    def product(acc):
                        plgpu.wgmma(acc, q_smem, shim.transpose(keys_smem.at[slot], (1, 0)))
                        return acc[...]

                    scores_mS = pl.run_scoped(product, plgpu.ACC((ROWS, BLOCK), jnp.float32))
                    slots_mS = plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1, layout=plgpu.Layout.WGMMA)
                    visible_mS = slots_mS + start <= lax.broadcast_in_dim(limit_m, (ROWS, BLOCK), [0])
                    scores_mS = jnp.where(visible_mS, scores_mS * (scale * LOG2E), -jnp.inf)
                    new_max_m = jnp.maximum(max_m, scores_mS.max(axis=1))
                    # Until a row has seen a visible slot its maximum is -inf, and -inf - -inf would be NaN.
                    shift_m = jnp.where(new_max_m == -jnp.inf, 0.0, new_max_m)
                    factor_m = jnp.exp2(max_m - shift_m)
                    weights_mS = jnp.exp2(scores_mS - lax.broadcast_in_dim(shift_m, (ROWS, BLOCK), [0]))
                    sum_m = sum_m * factor_m + weights_mS.sum(axis=1)

                    plgpu.barrier_wait(weights_free)
                    weights_smem[...] = weights_mS.astype(dtype)
                    factor_smem[...] = factor_m

                    # What an earlier owner left behind a row's last slot: a weight of zero does not silence a NaN.
                    @pl.when(start + BLOCK > last + 1)
                    def _wipe():
                        for c in range(0, C, 64):
                            part = keys_smem.at[slot, :, pl.ds(c, 64)]
                            held = shim.load(part, layout=plgpu.Layout.WGMMA, optimized=False)
                            places = plgpu.broadcasted_iota(
                                jnp.int32, (BLOCK, 64), 0, layout=plgpu.Layout.WGMMA
                            )
                            part[...] = jnp.where(places + start <= last, held, jnp.zeros_like(held))

                    plgpu.commit_smem()
                    plgpu.barrier_arrive(weights_full)
                    return step + 1, new_max_m, sum_m

                empty = (
                    plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), column),
                    plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), column),
                )
                step, max_m, sum_m = lax.fori_loop(0, blocks, block, (step, *empty))
                plgpu.barrier_arrive(q_free)
                seen_m = sum_m > 0.0
                plgpu.barrier_wait(weights_free)
                factor_smem[...] = 1.0 / jnp.where(seen_m, sum_m, 1.0)
                plgpu.commit_smem()
                plgpu.barrier_arrive(weights_full)
                lse_ref.at[i, tile_rows][...] = jnp.where(
                    seen_m, max_m + jnp.log2(jnp.where(seen_m, sum_m, 1.0)), -jnp.inf
                )
                return step

            each_piece(piece, jnp.int32(0))

        def values(side):
            """One half of the value columns."""
            plgpu.set_max_registers(160, action="increase")
            columns = [pl.ds(start, width) for start in range(side * half, (side + 1) * half, width)]
            plgpu.barrier_arrive(weights_free)
            for slot in range(STAGES):
                plgpu.barrier_arrive(keys_free.at[slot])

            def scaled(accs):
                factor_m = shim.load(factor_smem, layout=plgpu.Layout.WGMMA.reduce(1))
                return [acc_mC * lax.broadcast_in_dim(factor_m, acc_mC.shape, [0]) for acc_mC in accs]

            def piece(i, step):
                def block(_, carry):
                    step, accs = carry
                    slot = lax.rem(step, STAGES)
                    plgpu.barrier_wait(keys_full.at[slot])
                    plgpu.barrier_wait(weights_full)
                    rights = [keys_smem.at[slot, :, c] for c in columns]
                    accs = add_products(scaled(accs), weights_smem, rights)
                    plgpu.barrier_arrive(weights_free)
                    plgpu.barrier_arrive(keys_free.at[slot])
                    return step + 1, accs

                zeros = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
                step, accs = lax.fori_loop(0, blocks_ref[i], block, (step, [zeros] * len(columns)))
                plgpu.barrier_wait(weights_full)
                accs = scaled(accs)
                plgpu.barrier_arrive(weights_free)
                for c, acc_mC in zip(columns, accs, strict=True):
                    part_ref.at[i, tile_rows, c][...] = acc_mC
                return step

            each_piece(piece, jnp.int32(0))

        for side in range(2):
            pl.when(wg == side)(functools.partial(values, side))

    length = len(plan.row_i)
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    run = shim.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((length, row_tiles * ROWS, C), jnp.float32),
            jax.ShapeDtypeStruct((length, row_tiles * ROWS), jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM((ROWS, J), dtype, transforms=tiled),
            plgpu.SMEM((STAGES, BLOCK, J), dtype, transforms=tiled),
            plgpu.SMEM((ROWS, BLOCK), dtype, transforms=tiled),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(),  # q_full
            plgpu.Barrier(),  # q_free
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=max(1, BLOCK // P)),  # keys_full
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),  # keys_free
            plgpu.Barrier(),  # weights_full
            plgpu.Barrier(num_arrivals=2),  # weights_free
        ],
        grid=(workers, row_tiles),
        grid_names=("worker", "row_tile"),
        num_threads=4,
        thread_name="wg",
        compiler_params=shim.compiler_params(approx_math=True, reduction_scratch_bytes=0),
    )
    return run(
        q_BmJ, pages_NPJ, tables_BM, limit_Bm, last_B, plan.row_i, plan.first_i, plan.blocks_i, plan.begin_w,
        plan.pieces_B,
    )  # fmt: skip


def add_products(accs: list[jax.Array], left: Any, rights: list[Any]) -> list[jax.Array]:
    """acc + left @ right for each, accumulated in registers."""
    if shim.interpreting():  # the interpreter knows no `run_state` of an accumulator

        def product(acc, right):
            def fresh(ref):
                plgpu.wgmma(ref, left, right)
                return ref[...]

            return acc + pl.run_scoped(fresh, plgpu.ACC(acc.shape, acc.dtype))

        return [product(acc, right) for acc, right in zip(accs, rights, strict=True)]

    def accumulate(refs):
        for ref, right in zip(refs, rights, strict=True):
            plgpu.wgmma(ref, left, right)

    return pl.run_state(accumulate)([plgpu.ACC.init(acc) for acc in accs])


def combine_kernel(
    part_imC: jax.Array, lse_im: jax.Array, plan: Schedule, *, rows: int, dtype: Any
) -> jax.Array:
    """The rows' results of their pieces': [B, m, C], zero where a row saw nothing."""
    B, C = len(plan.piece_B), part_imC.shape[2]

    def body(part_ref, lse_ref, piece_ref, pieces_ref, out_ref):
        b, group = lax.axis_index("row"), lax.axis_index("group")
        begin, count = piece_ref[b], pieces_ref[b]
        own = [group * COMBINED_ROWS + k for k in range(COMBINED_ROWS)]
        layout = plgpu.Layout.WG_STRIDED((C,), vec_size=C // 128)

        def piece(n, carry):
            updated = []
            for m, (top, total, acc_C) in zip(own, carry, strict=True):
                lse = lse_ref[begin + n, m]
                part_C = shim.load(part_ref.at[begin + n, m], layout=layout)
                new_top = jnp.maximum(top, lse)
                shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
                old, new = jnp.exp2(top - shift), jnp.exp2(lse - shift)
                updated.append((new_top, total * old + new, acc_C * old + part_C * new))
            return updated

        zeros = plgpu.layout_cast(jnp.zeros((C,), jnp.float32), layout)
        start = [(jnp.float32(-jnp.inf), jnp.float32(0), zeros) for _ in own]
        for m, (_, total, acc_C) in zip(own, lax.fori_loop(0, count, piece, start), strict=True):
            out_ref.at[b, m][...] = (acc_C * (1.0 / jnp.where(total > 0.0, total, 1.0))).astype(dtype)

    run = shim.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((B, rows, C), dtype),
        grid=(B, rows // COMBINED_ROWS),
        grid_names=("row", "group"),
        compiler_params=shim.compiler_params(approx_math=True),
    )
    return run(part_imC, lse_im, plan.piece_B, plan.pieces_B)
