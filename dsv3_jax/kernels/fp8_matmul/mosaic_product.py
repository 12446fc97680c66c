"""Pallas Mosaic GPU kernel of e4m3 times e4m3 for sm_90a, dense and grouped by expert.

Grid, ring, schedule and ragged stores are those of `grouped_matmul.mosaic_product`; a dense product has one group. A
step is 128 columns of the summed axis, one scale block: its sums are made by WGMMA in an accumulator that begins at
zero, multiplied by the token's and the weight block's scale, and added up in float32 registers (V3 report, section
3.3.2: the tensor core's own additions keep about 14 bits). While one warpgroup scales, the other multiplies. The two
sets of sums are why a warpgroup has no more than 64 x 128 of the result.

Per step a block loads its rows' codes and scales (kept [column blocks, rows], so that a step's scales are one line) and
its columns' codes and scales. TMA copies whole lines of 128 bytes, so a weight's scale comes with the 31 after it.
Both operands have the summed axis innermost, as 8-bit WGMMA needs: the stored [out, in]. What a box has beyond the
array is zero: a last block of columns may be partial (576 = 4.5 x 128 rows of kv_a). Rows and summed axis are filled up
to whole tiles of TMA.

Tiles go in bands of `band` row tiles, column by column, so that the rows of a band and the weights of the columns at
work stay in the second-level cache. In the order of rows every row tile would stream a dense weight from memory.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import shim
from dsv3_jax.kernels.fp8_matmul.quantize import BLOCK, Coded
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

# Scales in a line of 128 bytes.
SCALES = 32


class Tile(NamedTuple):
    """Tuning of the kernel.

    Attributes:
      rows, columns: of the result in a tile.
      stages: steps of 128 columns of the summed axis in flight.
      slots: blocks of 64 columns that a warpgroup may have on their way out.
      split: what the two warpgroups share out, "rows" or "columns".
      band: row tiles that are gone through together, column by column.
      cluster: blocks next to each other in columns that load their common rows once, by multicast.
    """

    rows: int = 128
    columns: int = 128
    stages: int = 5
    slots: int = 2
    split: str = "rows"
    band: int = 16
    cluster: int = 1

    @property
    def warpgroup(self) -> tuple[int, int]:
        """Rows and columns of one warpgroup."""
        return share(self.split, self.rows, self.columns)

    @property
    def blocks(self) -> int:
        """Weight blocks that a tile has columns of."""
        return -(-self.columns // BLOCK)

    def fits(self) -> bool:
        """Whether two sets of sums fit the registers, and a warpgroup's columns one weight block."""
        R, C = self.warpgroup
        return R % LINE == 0 == C % LINE and R * C <= LINE * BLOCK and BLOCK % C == 0

    def shared_bytes(self) -> int:
        """Shared memory of a block; the barriers come to less than 1024."""
        step = (self.rows + self.columns) * BLOCK + 4 * (self.rows + SCALES * self.blocks)
        return self.stages * step + 2 * CONSUMERS * self.slots * self.warpgroup[0] * LINE + 1024


def product(
    x: Coded, w: Coded, group_sizes_E: jax.Array, tile: Tile, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """y [N, F] in a 16-bit type.

    Args:
      x: codes [N, K], rows sorted by expert; scales [ceil(K / 128), N or more, a multiple of 4].
      w: codes [E, F, K], scales [E, ceil(F / 128), ceil(K / 128)]; F is a multiple of 64, K of 16.
    """
    (N, K), (E, F, _) = x.codes.shape, w.codes.shape
    steps = -(-K // BLOCK)
    R, C = tile.warpgroup
    across = -(-F // (tile.columns * tile.cluster))
    if not tile.fits() or K % 16 or F % LINE:
        raise ValueError(f"the product of {x.codes.shape} and {w.codes.shape} is not made of tiles {tile}")
    x_NK, x_scales_GN = x
    w_EFK, more_rows, more_columns = w.codes, whole_lines(N, tile.rows) - N, -K % BLOCK
    if more_rows or more_columns:
        x_NK = jnp.pad(x_NK, ((0, more_rows), (0, more_columns)))
        x_scales_GN = jnp.pad(x_scales_GN, ((0, 0), (0, max(tile.rows - x_scales_GN.shape[1], 0))))
    if more_columns:  # few widths; not those of stored weights of V3 and 16B-A3B
        w_EFK = jnp.pad(w_EFK, ((0, 0), (0, 0), (0, more_columns)))
    # Lines begin at multiples of 16 bytes.
    w_scales = jnp.pad(w.scales, ((0, 0), (0, 0), (0, max(-steps % 4, SCALES - steps))))
    plan = schedule(group_sizes_E, N, tile.rows)
    cores, options = grid(tile.cluster)

    def body(
        tiles, live, x, x_scales, w, w_scales, out, x_smem, xs_smem, w_smem, ws_smem, out_smem, full, empty
    ):
        wg = lax.axis_index("wg")
        block, multicast = shared(tile.cluster)
        total = live[0] * across

        def place(index):
            """Expert, first row, rows, first column, steps of a tile."""
            band = lax.div(index, jnp.int32(tile.band * across))
            within = index - band * (tile.band * across)
            height = jnp.clip(live[0] - band * tile.band, 1, tile.band)
            t = band * tile.band + lax.rem(within, height)
            expert = tiles[EXPERT, t]
            column = (lax.div(within, height) * tile.cluster + block) * tile.columns
            return expert, tiles[ROW, t], tiles[ROWS, t], column, jnp.where(expert < E, steps, 0)

        @pl.when(wg == CONSUMERS)
        def _load():
            plgpu.set_max_registers(40, action="decrease")

            def copy(here, k, slot):
                expert, row, _, column, _ = here
                inner, rows = pl.ds(k * BLOCK, BLOCK), pl.ds(row, tile.rows)
                plgpu.copy_gmem_to_smem(x.at[rows, inner], x_smem.at[slot], full.at[slot], **multicast)
                plgpu.copy_gmem_to_smem(x_scales.at[k, rows], xs_smem.at[slot], full.at[slot], **multicast)
                outer = pl.ds(column, tile.columns)
                plgpu.copy_gmem_to_smem(w.at[expert, outer, inner], w_smem.at[slot], full.at[slot])
                blocks = pl.ds(lax.div(column, jnp.int32(BLOCK)), tile.blocks)
                plgpu.copy_gmem_to_smem(
                    w_scales.at[expert, blocks, pl.ds(k, SCALES)], ws_smem.at[slot], full.at[slot]
                )

            fill(total, cores, place, 4, (tile.stages, empty, tile.cluster), copy)

        @pl.when(wg < CONSUMERS)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")
            top, left = (wg * R, 0) if tile.split == "rows" else (0, wg * C)
            own_block = lax.div(jnp.int32(left), jnp.int32(BLOCK))

            def visit(here, first):
                _, row, rows, column, count = here
                own = jnp.clip(rows - top, 0, R)
                busy = jnp.where(own > 0, count, 0)

                def multiply(k, sums):
                    slot = ring(first + k, tile.stages)
                    plgpu.barrier_wait(full.at[slot])

                    def scope(acc):
                        a = x_smem.at[slot, pl.ds(top, R)]
                        plgpu.wgmma(acc, a, shim.transpose(w_smem.at[slot, pl.ds(left, C)], (1, 0)))
                        # Meanwhile the scales; the fence orders these reads before the copy that refills the slot.
                        lines = xs_smem.at[slot, pl.ds(top, R)]
                        scale_R = shim.load(lines, layout=plgpu.Layout.WGMMA.reduce(1))
                        scale_R = scale_R * ws_smem[slot, own_block, 0]
                        plgpu.commit_smem()
                        return acc[...], scale_R

                    part, scale_R = pl.run_scoped(scope, plgpu.ACC((R, C)))
                    plgpu.barrier_arrive(empty.at[slot])
                    return sums + part * lax.broadcast_in_dim(scale_R, (R, C), (0,))

                zeros = plgpu.layout_cast(jnp.zeros((R, C), jnp.float32), plgpu.Layout.WGMMA)
                sums = lax.fori_loop(0, busy, multiply, zeros)

                skip(first + busy, first + count, tile.stages, full, empty)
                for i, c in enumerate(range(0, C, LINE)):
                    at = column + left + c

                    @pl.when(at < F)
                    def store(i=i, c=c, at=at):
                        slot = i % tile.slots
                        drain(tile.slots)
                        out_smem[wg, slot] = sums[:, c : c + LINE].astype(dtype)
                        plgpu.commit_smem()
                        store_rows(out_smem, (wg, slot), out, row + top, own, pl.ds(at, LINE))

                return first + count

            persistent(total, cores, place, visit)
            plgpu.wait_smem_to_gmem(0)

    f8 = jnp.float8_e4m3fn
    swizzle = plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(BLOCK)
    run = shim.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((N, F), dtype),
        **options,
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=shim.compiler_params(),
        scratch_types=(
            plgpu.SMEM((tile.stages, tile.rows, BLOCK), f8, transforms=swizzle),
            plgpu.SMEM((tile.stages, tile.rows), jnp.float32),
            plgpu.SMEM((tile.stages, tile.columns, BLOCK), f8, transforms=swizzle),
            plgpu.SMEM((tile.stages, tile.blocks, SCALES), jnp.float32),
            plgpu.SMEM((CONSUMERS, tile.slots, R, LINE), dtype, transforms=transforms(1)),
            plgpu.Barrier(num_arrivals=4, num_barriers=tile.stages),
            consumed(tile.cluster, tile.stages),
        ),
    )
    return run(plan.tiles, plan.live, x_NK, x_scales_GN, w_EFK, w_scales)
