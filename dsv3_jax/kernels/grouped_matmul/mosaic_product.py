"""Pallas Mosaic GPU kernel of the grouped product for sm_90a: rows times their expert's weight.

A persistent grid walks the tiles of `schedule`. In each block one warpgroup loads (TMA, a ring of
`stages` slices of the summed axis that runs on across tiles) and two multiply (WGMMA, float32). A tile
begins where its group begins, so it may read rows of the next group, or beyond the array (zeros), and
writes only its own: rows are stored by TMA boxes of 64, 32, ... 1. A warpgroup none of whose rows are the
group's does not multiply. Tiles of rows after the last group have no steps and store zeros.

Weights are read as they are stored: [E, out, in] is K-major for y = x w^T and MN-major for dx = dy w,
and WGMMA takes 16-bit operands either way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import shim
from dsv3_jax.kernels.grouped_matmul.pipeline import (
    CONSUMERS,
    LINE,
    consumed,
    drain,
    fill,
    grid,
    persistent,
    ring,
    share,
    shared,
    skip,
    store_rows,
    transforms,
    whole_lines,
)
from dsv3_jax.kernels.grouped_matmul.schedule import EXPERT, ROW, ROWS, schedule
from dsv3_jax.kernels.shim import pl, plgpu


class Tile(NamedTuple):
    """Tuning of the forward and dX kernel.

    Attributes:
      rows: rows of a tile.
      columns: output columns of a tile; of each of gate and up in the fused kernel.
      stages: slices of the summed axis in flight.
      slots: blocks of (up to) 64 columns that a warpgroup may have on their way out.
      split: what the two warpgroups share out, "rows" or "columns".
      cluster: blocks next to each other in columns that load their common rows once, by multicast.
    """

    rows: int = 128
    columns: int = 256
    stages: int = 4
    slots: int = 2
    split: str = "rows"
    cluster: int = 1

    @property
    def warpgroup(self) -> tuple[int, int]:
        """Rows and columns of one warpgroup."""
        return share(self.split, self.rows, self.columns)

    def shared_bytes(self, parts: int) -> int:
        """Shared memory of a block, with `parts` weights a tile; the barriers come to less than 1024."""
        slices = self.stages * (self.rows + parts * self.columns) * LINE
        return 2 * (slices + CONSUMERS * self.slots * self.warpgroup[0] * LINE) + 1024


def product(x_ND: jax.Array, w: jax.Array, group_sizes_E: jax.Array, tile: Tile, kind: str) -> Any:
    """Runs the kernel.

    Args:
      kind: "forward": w [E, F, D], y = x w^T; "dx": w [E, D, F] (summed axis first), y = x w;
        "swiglu": w [E, 2, F, D], silu(gate) * up; "swiglu+": the same, and [N, 2F] gate and up.
    """
    fused = kind.startswith("swiglu")
    parts = 2 if fused else 1
    N, K = x_ND.shape
    E, F = w.shape[0], w.shape[-1] if kind == "dx" else w.shape[-2]
    dtype = x_ND.dtype
    R, C = tile.warpgroup
    W = min(C, LINE)
    steps = K // LINE
    across = F // (tile.columns * tile.cluster)
    if K % LINE or across * tile.columns * tile.cluster != F:
        raise ValueError(f"{kind} of {x_ND.shape} and {w.shape} is not made of tiles {tile}")
    x_ND = jnp.pad(x_ND, ((0, whole_lines(N, tile.rows) - N), (0, 0)))
    plan = schedule(group_sizes_E, N, tile.rows)
    cores, blocks = grid(tile.cluster)
    widths = {"swiglu+": (F, 2 * F)}.get(kind, (F,))
    outs = tuple(jax.ShapeDtypeStruct((N, width), dtype) for width in widths)
    weight_block = {"dx": (LINE, tile.columns)}.get(kind, (parts * tile.columns, LINE))

    def body(tiles, live, x, w, *refs):
        outs, (x_smem, w_smem, out_smem, full, empty) = refs[: len(widths)], refs[len(widths) :]
        wg = lax.axis_index("wg")
        block, multicast = shared(tile.cluster)
        total = live[0] * across

        def place(index):
            """Expert, first row, rows, first column, steps of a tile."""
            t = lax.div(index, jnp.int32(across))
            expert = tiles[EXPERT, t]
            column = (lax.rem(index, jnp.int32(across)) * tile.cluster + block) * tile.columns
            return expert, tiles[ROW, t], tiles[ROWS, t], column, jnp.where(expert < E, steps, 0)

        @pl.when(wg == CONSUMERS)
        def _load():
            plgpu.set_max_registers(40, action="decrease")

            def copy(here, k, slot):
                expert, row, _, column, _ = here
                inner = pl.ds(k * LINE, LINE)
                plgpu.copy_gmem_to_smem(
                    x.at[pl.ds(row, tile.rows), inner], x_smem.at[slot], full.at[slot], **multicast
                )
                outer = pl.ds(column, tile.columns)
                if kind == "dx":
                    plgpu.copy_gmem_to_smem(w.at[expert, inner, outer], w_smem.at[slot], full.at[slot])
                elif fused:
                    for p in range(parts):
                        plgpu.copy_gmem_to_smem(
                            w.at[expert, p, outer, inner],
                            w_smem.at[slot, pl.ds(p * tile.columns, tile.columns)],
                            full.at[slot],
                        )
                else:
                    plgpu.copy_gmem_to_smem(w.at[expert, outer, inner], w_smem.at[slot], full.at[slot])

            fill(total, cores, place, 4, (tile.stages, empty, tile.cluster), copy)

        @pl.when(wg < CONSUMERS)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")
            by_rows = tile.split == "rows"
            top, left = (wg * R, 0) if by_rows else (0, wg * C)

            def visit(here, first):
                _, row, rows, column, count = here
                own = jnp.clip(rows - top, 0, R)
                busy = jnp.where(own > 0, count, 0)

                def scope(*accs):
                    def multiply(k, _):
                        slot = ring(first + k, tile.stages)
                        plgpu.barrier_wait(full.at[slot])
                        a = x_smem.at[slot, pl.ds(top, R)]
                        for p, acc in enumerate(accs):
                            if kind == "dx":
                                b = w_smem.at[slot, :, pl.ds(left, C)]
                            else:
                                b = w_smem.at[slot, pl.ds(p * tile.columns + left, C)]
                                b = shim.transpose(b, (1, 0))
                            plgpu.wgmma(acc, a, b)
                        # Those of the step before are done: its slices may be overwritten.
                        plgpu.wgmma_wait(parts)

                        @pl.when(k > 0)
                        def release():
                            plgpu.barrier_arrive(empty.at[ring(first + k - 1, tile.stages)])

                    lax.fori_loop(0, busy, multiply, None)
                    return tuple(acc[...] for acc in accs)

                sums = pl.run_scoped(scope, *[plgpu.ACC((R, C))] * parts)

                @pl.when(busy > 0)
                def release_last():
                    plgpu.barrier_arrive(empty.at[ring(first + busy - 1, tile.stages)])

                skip(first + busy, first + count, tile.stages, full, empty)
                store(sums, row + top, own, column + left)
                return first + count

            def store(sums, row, own, column):
                slot = 0

                def put(value, out, at):
                    nonlocal slot
                    drain(tile.slots)
                    out_smem[wg, slot] = value.astype(dtype)
                    plgpu.commit_smem()
                    store_rows(out_smem, (wg, slot), out, row, own, pl.ds(at, W))
                    slot = (slot + 1) % tile.slots

                for c in range(0, C, W):
                    chunk = [s[:, c : c + W] for s in sums]
                    if not fused:
                        put(chunk[0], outs[0], column + c)
                        continue
                    gate, up = chunk
                    put(gate / (1.0 + jnp.exp(-gate)) * up, outs[0], column + c)
                    if kind == "swiglu+":
                        put(gate, outs[1], column + c)
                        put(up, outs[1], F + column + c)

            persistent(total, cores, place, visit)
            plgpu.wait_smem_to_gmem(0)

    run = shim.kernel(
        body,
        out_type=outs,
        **blocks,
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=shim.compiler_params(),
        scratch_types=(
            plgpu.SMEM((tile.stages, tile.rows, LINE), dtype, transforms=transforms(8)),
            plgpu.SMEM((tile.stages, *weight_block), dtype, transforms=transforms(8)),
            plgpu.SMEM((CONSUMERS, tile.slots, R, W), dtype, transforms=transforms(1, W)),
            plgpu.Barrier(num_arrivals=1 + parts, num_barriers=tile.stages),
            consumed(tile.cluster, tile.stages),
        ),
    )
    return run(plan.tiles, plan.live, x_ND, w)
