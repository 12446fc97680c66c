"""Pallas Mosaic GPU kernel of products with quantised weights for sm_90a: y = x w^T, dense and grouped by expert.

The weight's rows are the 64 rows of WGMMA and the tokens its columns, so that a few tokens waste nothing. Codes come
to shared memory as they are stored, by TMA, once for each tile of tokens; a warpgroup makes floats of its 64 rows in
registers, exactly, multiplies a group of columns, and adds the float32 sums times the group's scale. No value is
rounded on the way: the only rounding is that of the result.

Grid, ring, warpgroups, clusters and the schedule of experts are those of `grouped_matmul`. Where the rows alone do not
occupy the device the summed axis is split, and the float32 sums of the parts are added up by XLA.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import shim
from dsv3_jax.kernels.grouped_matmul.pipeline import (
    LINE,
    consumed,
    drain,
    fill,
    grid,
    persistent,
    ring,
    shared,
    store_rows,
    transforms,
    whole_lines,
)
from dsv3_jax.kernels.grouped_matmul.schedule import EXPERT, ROW, ROWS, schedule
from dsv3_jax.kernels.quantized_matmul.coding import Coding
from dsv3_jax.kernels.quantized_matmul.mosaic_codes import (
    Slices,
    as_lanes,
    joined,
    offset,
    ordered,
    row_layout,
    slices,
    unpack,
)
from dsv3_jax.kernels.shim import pl, plgpu

Parts = tuple[jax.Array, jax.Array, jax.Array | None]

# Registers of a thread: of the warpgroup that loads, and of those that multiply, by how many there are.
REGISTERS = {1: (40, 240), 2: (40, 232), 3: (32, 160), 4: (24, 120)}


class Tile(NamedTuple):
    """Tuning of the kernel.

    Attributes:
      tokens: of a tile, a multiple of 8 up to 128.
      warpgroups: that multiply, 64 rows of the weight each.
      stages: slices of 128 bytes of every row's codes in flight.
      splits: parts of the summed axis (dense only).
      cluster: blocks next to each other in rows that load their common tokens once, by multicast.
    """

    tokens: int = 16
    warpgroups: int = 2
    stages: int = 6
    splits: int = 1
    cluster: int = 1

    @property
    def rows(self) -> int:
        """Of the weight."""
        return self.warpgroups * LINE

    def shared_bytes(self, cut: Slices) -> int:
        """Shared memory of a block; the barriers come to less than 1024."""
        slices = self.stages * (self.tokens * cut.columns + self.rows * cut.line)
        return 2 * (slices + self.rows * (self.tokens if self.splits == 1 else 8)) + 1024

    def fits_registers(self) -> bool:
        """Whether two sets of sums, and a group's codes and floats, leave a thread some registers."""
        return self.tokens + 72 <= REGISTERS[self.warpgroups][1]


def product(
    x_NK: jax.Array, parts: Parts, coding: Coding, tile: Tile, group_sizes_E: jax.Array | None = None
) -> jax.Array:
    """Runs the kernel: codes [R, ..], or with `group_sizes_E` [E, R, ..] and rows of x sorted by expert; y [N, R]."""
    codes, scales, zeros = parts
    grouped = group_sizes_E is not None
    (N, K), dtype = x_NK.shape, x_NK.dtype
    E, R = codes.shape[0] if grouped else 1, codes.shape[-2]
    cut = slices(coding, K)
    steps = K // cut.columns
    share = -(-steps // tile.splits)
    if R % LINE or share * (tile.splits - 1) >= steps or (grouped and tile.splits > 1):
        raise ValueError(f"codes {codes.shape} in {coding} are not made of tiles {tile}")
    across = -(-R // (tile.rows * tile.cluster))
    down = -(-N // tile.tokens)
    x = jnp.pad(ordered(x_NK, cut, coding.kind), ((0, whole_lines(N, tile.tokens) - N), (0, 0)))
    plan = tuple(schedule(group_sizes_E, N, tile.tokens)) if grouped else ()
    cores, blocks = grid(tile.cluster)
    whole = tile.splits == 1
    out = jax.ShapeDtypeStruct((N, R), dtype)
    if not whole:
        out = jax.ShapeDtypeStruct((tile.splits, R, down * tile.tokens), jnp.float32)
    given = [*plan, x, as_lanes(codes), scales.astype(jnp.float32), *([] if zeros is None else [zeros])]
    layout, column = plgpu.Layout.WGMMA, row_layout()

    def body(*refs):
        arrays, (out, x_smem, codes_smem, out_smem, full, empty) = refs[: len(given)], refs[len(given) :]
        (tiles, live), (x, codes, scales, *rest) = arrays[: len(plan)] or (None, None), arrays[len(plan) :]
        zeros = rest[0] if rest else None
        wg = lax.axis_index("wg")
        block, multicast = shared(tile.cluster)
        total = live[0] * across if grouped else jnp.int32(down * across * tile.splits)

        def of(ref, expert):
            return ref.at[expert] if grouped else ref

        def place(index):
            """Expert, first token, tokens, first row of the weight, first slice, slices, part."""

            def top(tile_of_rows):
                return (tile_of_rows * tile.cluster + block) * tile.rows

            if grouped:
                t = lax.div(index, jnp.int32(across))
                expert = tiles[EXPERT, t]
                row = top(lax.rem(index, jnp.int32(across)))
                count = jnp.where(expert < E, steps, 0)
                return expert, tiles[ROW, t], tiles[ROWS, t], row, jnp.int32(0), count, jnp.int32(0)
            rest, token = lax.div(index, jnp.int32(down)), lax.rem(index, jnp.int32(down)) * tile.tokens
            part = lax.rem(rest, jnp.int32(tile.splits))
            begin = part * share
            row = top(lax.div(rest, jnp.int32(tile.splits)))
            tokens, count = jnp.minimum(N - token, tile.tokens), jnp.minimum(steps - begin, share)
            return jnp.int32(0), token, tokens, row, begin, count, part

        @pl.when(wg == tile.warpgroups)
        def _load():
            plgpu.set_max_registers(REGISTERS[tile.warpgroups][0], action="decrease")

            def copy(here, k, slot):
                expert, token, _, row, begin, _, _ = here
                plgpu.copy_gmem_to_smem(
                    of(codes, expert).at[pl.ds(row, tile.rows), pl.ds((begin + k) * cut.line, cut.line)],
                    codes_smem.at[slot],
                    full.at[slot],
                )
                plgpu.copy_gmem_to_smem(
                    x.at[pl.ds(token, tile.tokens), pl.ds((begin + k) * cut.columns, cut.columns)],
                    x_smem.at[slot],
                    full.at[slot],
                    **multicast,
                )

            fill(total, cores, place, 5, (tile.stages, empty, tile.cluster), copy)

        @pl.when(wg < tile.warpgroups)
        def _multiply():
            plgpu.set_max_registers(REGISTERS[tile.warpgroups][1], action="increase")

            def visit(here, first):
                expert, token, tokens, row, begin, count, part = here
                row = row + wg * LINE
                # A warpgroup beyond the last row works on the last ones and stores nothing.
                safe, e = jnp.minimum(row, R - LINE), jnp.minimum(expert, E - 1)

                def per_row(ref, at):
                    return shim.load(of(ref, e).at[pl.ds(safe, LINE), at], layout=column, optimized=False)

                def scale_of(step, g):
                    """Scale and zero point of a group of a slice, as far as there are any."""
                    if not cut.scaled:
                        return []
                    at = cut.scale_of(step * cut.groups + g)
                    if coding.block_rows > 1:
                        return [of(scales, e)[lax.div(safe, jnp.int32(coding.block_rows)), at]]
                    return [per_row(scales, at), *([] if zeros is None else [per_row(zeros, at)])]

                def scales_of(step):
                    """Of all groups, where registers hold them while the slice before is multiplied."""
                    return [scale_of(step, g) for g in range(cut.groups)] if cut.groups <= 2 else []

                def multiply(k, carry):
                    sums, now = carry
                    # The next slice's are on their way meanwhile.
                    after = scales_of(begin + jnp.minimum(k + 1, count - 1))
                    slot = ring(first + k, tile.stages)
                    plgpu.barrier_wait(full.at[slot])
                    lanes = shim.load(codes_smem.at[slot, pl.ds(wg * LINE, LINE)], layout=layout)
                    for g in range(cut.groups):
                        scale, zero = [*(now[g] if now else scale_of(begin + k, g)), None, None][:2]
                        own = lanes[:, g * cut.lanes : (g + 1) * cut.lanes]
                        less: Any = offset(zero, dtype)
                        if zero is not None:
                            less = lax.broadcast_in_dim(less, own.shape, [0])
                        pieces = joined(unpack(own, coding.kind, dtype, less), cut)
                        made = multiplied(pieces, x_smem, slot, g * cut.group, cut, tile.tokens)
                        sums = sums + (made if scale is None else made * spread(scale, made.shape))
                    # Threads have read the codes: that comes before the copy that refills the slot.
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(empty.at[slot])
                    return sums, after

                zero = plgpu.layout_cast(jnp.zeros((LINE, tile.tokens), jnp.float32), layout)
                start = (zero, scales_of(begin))
                sums = lax.fori_loop(0, count, multiply, start)[0]
                if not cut.scaled:
                    sums = sums * spread(per_row(scales, 0), sums.shape)
                if whole:
                    drain(1)
                    turned = plgpu.layout_cast(sums.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                    shim.transpose(out_smem.at[wg], (1, 0))[...] = turned
                    plgpu.commit_smem()
                    own = jnp.where(row < R, tokens, 0)
                    store_rows(out_smem, (wg,), out, token, own, pl.ds(row, LINE))
                else:

                    @pl.when(row < R)
                    def store_part():
                        out.at[part, pl.ds(row, LINE), pl.ds(token, tile.tokens)][...] = sums

                return first + count

            persistent(total, cores, place, visit)
            plgpu.wait_smem_to_gmem(0)

    run = shim.kernel(
        body,
        out_type=out,
        **blocks,
        num_threads=tile.warpgroups + 1,
        thread_name="wg",
        compiler_params=shim.compiler_params(),
        scratch_types=(
            plgpu.SMEM(
                (tile.stages, tile.tokens, cut.columns), dtype, transforms=transforms(8, min(LINE, cut.width))
            ),
            plgpu.SMEM((tile.stages, tile.rows, cut.line), jnp.uint16, transforms=transforms(8, cut.line)),
            plgpu.SMEM((tile.warpgroups, tile.tokens if whole else 8, LINE), dtype, transforms=transforms(1)),
            plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
            consumed(tile.cluster, tile.stages, tile.warpgroups),
        ),
    )
    y = run(*given)
    return y if whole else y.sum(0)[:, :N].T.astype(dtype)


def spread(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A scale of all rows, or one for each, over the sums."""
    return lax.broadcast_in_dim(scale, shape, [0] if scale.ndim else [])


def multiplied(
    pieces: list[jax.Array], x_smem: Any, slot: jax.Array, first: int, cut: Slices, tokens: int
) -> jax.Array:
    """Float32 sums [64, tokens] of a group: its pieces in registers times its columns of x, from `first` on."""
    columns = [x_smem.at[slot, :, pl.ds(first + i * cut.width, cut.width)] for i in range(len(pieces))]
    if shim.interpreting():  # the interpreter knows no WGMMA with its left side in registers
        sums = jnp.zeros((LINE, tokens), jnp.float32)
        for piece, x in zip(pieces, columns, strict=True):
            both = piece.astype(jnp.float32), x[...].astype(jnp.float32)
            over = (((1,), (1,)), ((), ()))
            sums = sums + lax.dot_general(*both, over, precision=lax.Precision.HIGHEST)
        return sums

    def scope(acc):
        for piece, x in zip(pieces, columns, strict=True):
            plgpu.wgmma(acc, piece, shim.transpose(x, (1, 0)))
        return acc[...]

    return pl.run_scoped(scope, plgpu.ACC((LINE, tokens)))
