"""Pallas Mosaic GPU kernel of the weight gradient for sm_90a: dw[e] = dy_e^T x_e over the rows of each expert.

Grid, ring and warpgroups as in `mosaic_product`. The summed axis is the group's rows, from its first row on: the last
slice of 64 may reach into the next group, so the warpgroups zero those rows of dy in shared memory. (Rows of x
there meet zeros: they must be finite.) Both operands are read as they lie, rows first, by WGMMA's transposed
operands. An expert without rows has no steps and its tiles store zeros.

The order of tiles is expert by expert, so that the rows of dy and x of one expert are read from L2, and a hot
expert's long tiles are spread over all blocks. With few rows per expert (V3: 256) a tile has only four steps:
the result leaves through `slots` blocks of shared memory while the next tile's slices are already loading.
"""

from __future__ import annotations

from typing import NamedTuple

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
    shared,
    transforms,
    whole_lines,
)
from dsv3_jax.kernels.shim import pl, plgpu


class GradientTile(NamedTuple):
    """Tuning of the weight gradient.

    Attributes:
      rows, columns: of dw in a tile; each of the two warpgroups has half of the rows.
      stages: slices of 64 summed rows in flight.
      slots: blocks of 64 columns that a warpgroup may have on their way out.
      cluster: blocks next to each other in rows that load their common columns of x once, by multicast.
    """

    rows: int = 128
    columns: int = 256
    stages: int = 4
    slots: int = 2
    cluster: int = 1

    def shared_bytes(self) -> int:
        """Shared memory of a block; the barriers come to less than 1024."""
        return 2 * (self.stages * (self.rows + self.columns) + self.rows * self.slots) * LINE + 1024


def weight_gradient(
    x_ND: jax.Array, dy_NF: jax.Array, group_sizes_E: jax.Array, tile: GradientTile
) -> jax.Array:
    """dw [E, F, D] in x's type; F and D are multiples of the tile."""
    (N, D), F, E = x_ND.shape, dy_NF.shape[1], group_sizes_E.shape[0]
    dtype = x_ND.dtype
    R, C = tile.rows // CONSUMERS, tile.columns
    down, across = F // (tile.rows * tile.cluster), D // tile.columns
    if down * tile.rows * tile.cluster != F or across * tile.columns != D:
        raise ValueError(f"dw of {x_ND.shape} and {dy_NF.shape} is not made of tiles {tile}")
    x_ND, dy_NF = (jnp.pad(a, ((0, whole_lines(N, LINE) - N), (0, 0))) for a in (x_ND, dy_NF))
    ends_E = jnp.cumsum(group_sizes_E)
    groups = jnp.stack([ends_E - group_sizes_E, ends_E]).astype(jnp.int32)
    cores, blocks = grid(tile.cluster)

    def body(groups, x, dy, dw, x_smem, dy_smem, out_smem, full, empty):
        wg = lax.axis_index("wg")
        block, multicast = shared(tile.cluster)
        total = jnp.int32(E * down * across)

        def place(index):
            """Expert, its first row, number of rows, first row and column of a tile of dw, steps."""
            expert, within = (
                lax.div(index, jnp.int32(down * across)),
                lax.rem(index, jnp.int32(down * across)),
            )
            f, d = lax.div(within, jnp.int32(across)), lax.rem(within, jnp.int32(across))
            first = groups[0, expert]
            size = groups[1, expert] - first
            return (
                expert,
                first,
                size,
                (f * tile.cluster + block) * tile.rows,
                d * tile.columns,
                lax.div(size + (LINE - 1), jnp.int32(LINE)),
            )

        @pl.when(wg == CONSUMERS)
        def _load():
            plgpu.set_max_registers(40, action="decrease")

            def copy(here, k, slot):
                _, first, _, f, d, _ = here
                rows = pl.ds(first + k * LINE, LINE)
                plgpu.copy_gmem_to_smem(dy.at[rows, pl.ds(f, tile.rows)], dy_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(
                    x.at[rows, pl.ds(d, tile.columns)], x_smem.at[slot], full.at[slot], **multicast
                )

            fill(total, cores, place, 5, (tile.stages, empty, tile.cluster), copy)

        @pl.when(wg < CONSUMERS)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")
            own = pl.ds(wg * R, R)

            def visit(here, start):
                expert, _, size, f, d, count = here

                def scope(acc):
                    def multiply(k, _):
                        slot = ring(start + k, tile.stages)
                        plgpu.barrier_wait(full.at[slot])
                        left = size - k * LINE

                        @pl.when(left < LINE)
                        def clear_other_rows():
                            dy_KF = dy_smem[slot, :, own]
                            rows = plgpu.broadcasted_iota(jnp.int32, (LINE, R), 0, layout=plgpu.Layout.WGMMA)
                            dy_smem[slot, :, own] = jnp.where(rows < left, dy_KF, jnp.zeros_like(dy_KF))
                            plgpu.commit_smem()

                        plgpu.wgmma(acc, shim.transpose(dy_smem.at[slot, :, own], (1, 0)), x_smem.at[slot])
                        # The step before is done: its slices may be overwritten.
                        plgpu.wgmma_wait(1)

                        @pl.when(k > 0)
                        def release():
                            plgpu.barrier_arrive(empty.at[ring(start + k - 1, tile.stages)])

                    lax.fori_loop(0, count, multiply, None)
                    return acc[...]

                dw_FD = pl.run_scoped(scope, plgpu.ACC((R, C)))

                @pl.when(count > 0)
                def release_last():
                    plgpu.barrier_arrive(empty.at[ring(start + count - 1, tile.stages)])

                for i, c in enumerate(range(0, C, LINE)):
                    slot = i % tile.slots
                    drain(tile.slots)
                    out_smem[wg, slot] = dw_FD[:, c : c + LINE].astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        out_smem.at[wg, slot], dw.at[expert, pl.ds(f + wg * R, R), pl.ds(d + c, LINE)]
                    )
                return start + count

            persistent(total, cores, place, visit)
            plgpu.wait_smem_to_gmem(0)

    run = shim.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((E, F, D), dtype),
        **blocks,
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=shim.compiler_params(),
        scratch_types=(
            plgpu.SMEM((tile.stages, LINE, tile.columns), dtype, transforms=transforms(8)),
            plgpu.SMEM((tile.stages, LINE, tile.rows), dtype, transforms=transforms(8)),
            plgpu.SMEM((CONSUMERS, tile.slots, R, LINE), dtype, transforms=transforms(8)),
            plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
            consumed(tile.cluster, tile.stages),
        ),
    )
    return run(groups, x_ND, dy_NF)
