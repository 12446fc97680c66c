"""What the grouped kernels share: a persistent grid, a ring of slices, ragged stores, clusters of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import shim
from dsv3_jax.kernels.shim import pl, plgpu

# A swizzle line, 128 bytes of 16-bit numbers.
LINE = 64
CONSUMERS = 2
SHARED_BYTES = 232_448


def transforms(rows: int, width: int = LINE) -> tuple[Any, ...]:
    """Of shared memory for WGMMA and TMA: `rows` 8, or 1 where single rows are copied; `width` columns a line."""
    return plgpu.TilingTransform((rows, width)), plgpu.SwizzleTransform(2 * width)


def whole_lines(N: int, least: int) -> int:
    """Rows, for N, that TMA takes in tiles of 8 (`transforms`): a multiple of 8, and no fewer than a box has."""
    return max(-(-N // 8) * 8, least)


def ring(step: jax.Array, stages: int) -> jax.Array:
    """The slot of a step."""
    return lax.rem(step, jnp.int32(stages))


def grid(cluster: int) -> tuple[int, dict[str, Any]]:
    """The number of persistent blocks (clusters of blocks), and the kernel's options for them."""
    cores = shim.sm_count() // cluster
    options: dict[str, Any] = {"grid": (cores,), "grid_names": ("core",)}
    if cluster > 1:
        options |= {"cluster": (cluster,), "cluster_names": ("cluster",)}
    return cores, options


def shared(cluster: int) -> tuple[jax.Array | int, dict[str, Any]]:
    """Inside the kernel: the place in the cluster, and the options of a copy that all of its blocks receive."""
    return (lax.axis_index("cluster"), {"collective_axes": "cluster"}) if cluster > 1 else (0, {})


def consumed(cluster: int, stages: int, consumers: int = CONSUMERS) -> Any:
    """Barriers of slices that the consumers of every block of the cluster have read."""
    if cluster > 1:
        return plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=consumers, num_barriers=stages)
    return plgpu.Barrier(num_arrivals=consumers, num_barriers=stages)


def await_cluster(steps: jax.Array, stages: int, empty: Any, cluster: int) -> None:
    """A block may end only when the others neither write to its shared memory nor arrive at its barriers."""
    if cluster > 1:

        def wait(step, _):
            plgpu.barrier_wait(empty.at[ring(step, stages)])

        lax.fori_loop(jnp.maximum(steps - stages, 0), steps, wait, None)


def persistent(total: jax.Array, cores: int, place: Callable, visit: Callable) -> jax.Array:
    """`visit(place(index), step)` for this block's share of `total` tiles; it returns the ring's next step."""
    core = lax.axis_index("core")
    mine = lax.div(total - core + (cores - 1), jnp.int32(cores))

    def turn(i, carry):
        step, here = carry
        # Read a tile ahead: the latency of its few numbers is not waited for.
        after = place(jnp.minimum(core + (i + 1) * cores, total - 1))
        return visit(here, step), after

    return lax.fori_loop(0, mine, turn, (jnp.int32(0), place(jnp.minimum(core, total - 1))))[0]


def fill(
    total: jax.Array, cores: int, place: Callable, steps: int, ring_of: tuple[int, Any, int], copy: Callable
) -> None:
    """The warpgroup that loads: every step of this block's tiles into the ring, as slots become free.

    Args:
      steps: where `place` tells how many steps a tile has.
      ring_of: stages, barriers of slots that were read, size of the cluster.
      copy: `copy(here, k, slot)` starts the copies of a tile's step k.
    """
    stages, empty, cluster = ring_of

    def visit(here, first):
        def load(k, _):
            step = first + k
            slot = ring(step, stages)

            @pl.when(step >= stages)
            def wait_for_space():
                plgpu.barrier_wait(empty.at[slot])

            copy(here, k, slot)

        lax.fori_loop(0, here[steps], load, None)
        return first + here[steps]

    await_cluster(persistent(total, cores, place, visit), stages, empty, cluster)


def skip(begin: jax.Array, end: jax.Array, stages: int, full: Any, empty: Any) -> None:
    """A consumer lets steps of the ring pass that it has no use for."""

    def let_pass(step, _):
        slot = ring(step, stages)
        plgpu.barrier_wait(full.at[slot])
        plgpu.barrier_arrive(empty.at[slot])

    lax.fori_loop(begin, end, let_pass, None)


def share(split: str, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of one of the CONSUMERS of a tile that is split by "rows" or by "columns"."""
    return (rows // CONSUMERS, columns) if split == "rows" else (rows, columns // CONSUMERS)


def drain(slots: int) -> None:
    """Until the oldest of `slots` blocks of shared memory on their way out may be overwritten."""
    # The interpreter counts every copy as a group of its own.
    plgpu.wait_smem_to_gmem(0 if shim.interpreting() else slots - 1, wait_read_only=True)


def store_rows(
    smem: Any, block: tuple[Any, ...], gmem: Any, row: jax.Array, count: jax.Array, columns: Any
) -> None:
    """The first `count` rows of `smem[block]`, by boxes of powers of two; commits one group."""
    done: Any = 0
    size = 1 << (min(smem.shape[len(block)], gmem.shape[0]).bit_length() - 1)
    while size:

        @pl.when((count & size) != 0)
        def copy(done=done, size=size):
            plgpu.copy_smem_to_gmem(
                smem.at[*block, pl.ds(done, size)],
                gmem.at[pl.ds(row + done, size), columns],
                commit_group=False,
            )

        done = done + (count & size)
        size //= 2
    plgpu.commit_smem_to_gmem_group()
