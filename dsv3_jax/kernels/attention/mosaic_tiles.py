"""What the Mosaic attention kernels share: sizes, visible tiles, masks and the tensor-core products.

One block of a grid has two compute warpgroups of `ROWS` rows each and one that only moves memory. t and s
are the lengths of a tile of queries and of keys; i and j number them. Rows past the end of an array are
zeros when read and dropped when written (the hardware's tensor copies do both).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import shim
from dsv3_jax.kernels.shim import pl, plgpu

WARPGROUPS = 2
ROWS = 64
BLOCK = WARPGROUPS * ROWS
LOG2_E = 1.4426950408889634

# Registers a thread: 2 x 240 + 24 times 128 threads fill the 65,536 of a Hopper multiprocessor.
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24


class ForwardTiles(NamedTuple):
    """Tile parameters of the forward kernel: keys a tile (64 or 128) and tiles in flight."""

    keys: int = 128
    stages: int = 2


class BackwardTiles(NamedTuple):
    """Tile parameters of a backward kernel: tiles in flight."""

    stages: int = 3


class Plan(NamedTuple):
    """What is known before any array: hashable, so that it can be static.

    Attributes:
      scale: softmax scale, positive.
      causal: query t sees keys s <= t.
    """

    scale: float
    causal: bool
    forward: ForwardTiles = ForwardTiles()
    dq: BackwardTiles = BackwardTiles()
    dkv: BackwardTiles = BackwardTiles()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def pad_to(x: jax.Array, multiple: int, value: float) -> jax.Array:
    """Pads the last axis."""
    extra = -x.shape[-1] % multiple
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)], constant_values=value) if extra else x


def whole_tiles(x_BTHQ: jax.Array) -> jax.Array:
    """Pads tokens to the 8 rows of a tile of shared memory, which copies of tiles ask of an array's length."""
    extra = -x_BTHQ.shape[1] % 8
    return jnp.pad(x_BTHQ, ((0, 0), (0, extra), (0, 0), (0, 0))) if extra else x_BTHQ


def visible_tiles(ids_BT: jax.Array, t: int, ids_BS: jax.Array, s: int) -> jax.Array:
    """int32 [B, 2, T / t]: the first tile of S that any row of each tile of T may see, and one past the last.

    Ids are positive where they count. A tile is taken to hold every id between its smallest and its
    largest: exact for packed sequences in order, never too narrow for others.
    """

    def range_of(ids, tile):
        ids_Bit = ids.reshape(ids.shape[0], -1, tile)
        low = jnp.where(ids_Bit > 0, ids_Bit, jnp.iinfo(jnp.int32).max).min(-1)
        return low, ids_Bit.max(-1)

    low_Bi, high_Bi = range_of(ids_BT, t)
    low_Bj, high_Bj = range_of(ids_BS, s)
    meets_Bij = (low_Bi[:, :, None] <= high_Bj[:, None, :]) & (low_Bj[:, None, :] <= high_Bi[:, :, None])
    j, J = jnp.arange(meets_Bij.shape[2]), meets_Bij.shape[2]
    first_Bi = jnp.where(meets_Bij, j, J).min(-1)
    last_Bi = jnp.where(meets_Bij, j + 1, 0).max(-1)
    return jnp.stack([jnp.minimum(first_Bi, last_Bi), last_Bi], axis=1).astype(jnp.int32)


def key_range(plan: Plan, bounds_ref: Any, b: Any, i: Any, tiles: int, s: int) -> tuple[Any, Any]:
    """The tiles [first, stop) of s keys that block i of queries visits; `bounds_ref` of `visible_tiles`, or None."""
    first, stop = jnp.int32(0), jnp.int32(tiles)
    if plan.causal:
        stop = jnp.minimum(stop, lax.div((i + 1) * BLOCK + s - 1, s))
    if bounds_ref is not None:
        first, end = bounds_ref[b, 0, i], bounds_ref[b, 1, i]
        stop = jnp.maximum(first, jnp.minimum(stop, end))
    return first, stop


def visible(plan: Plan, start: Any, j: Any, s: int, S: int, ids_t: Any, ids_s_ref: Any) -> jax.Array:
    """[ROWS, s]: which of tile j's keys the queries from `start` on see.

    S is how many keys there are; `ids_t` the queries' ids, or None, then `ids_s_ref` is not read.
    """
    shape, parts = (ROWS, s), []
    keys = j * s + positions(shape, 1)
    if plan.causal:
        parts.append(start + positions(shape, 0) >= keys)
    elif ids_t is None:
        parts.append(keys < S)
    if ids_t is not None:
        ids_s = shim.load(ids_s_ref, layout=columns_layout())
        parts.append(over_rows(ids_t, shape) == over_columns(ids_s, shape))
    return parts[0] if len(parts) == 1 else parts[0] & parts[1]


def move_keys(first: Any, stop: Any, sources: Any, tiles: Any, ready: Any, free: Any) -> None:
    """The moving warpgroup: keys, values and ids (or None) of one head, tile by tile ahead of their use.

    Args:
      sources: references in global memory, keys first.
      tiles: of shared memory, one a stage; ready, free: barriers of keys and of values.
    """
    plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
    (k_ref, v_ref, ids_ref), (k_smem, v_smem, ids_smem) = sources, tiles
    (k_ready, v_ready), (k_free, v_free) = ready, free
    stages, s = k_smem.shape[:2]

    @pl.loop(first, stop)
    def _tile(j):
        slot, keys = lax.rem(j - first, stages), pl.ds(j * s, s)
        again = j - first >= stages
        pl.when(again)(lambda: plgpu.barrier_wait(k_free.at[slot]))
        plgpu.copy_gmem_to_smem(k_ref.at[keys], k_smem.at[slot], k_ready.at[slot])
        if ids_ref is not None:
            plgpu.copy_gmem_to_smem(ids_ref.at[keys], ids_smem.at[slot], k_ready.at[slot])
        pl.when(again)(lambda: plgpu.barrier_wait(v_free.at[slot]))
        plgpu.copy_gmem_to_smem(v_ref.at[keys], v_smem.at[slot], v_ready.at[slot])


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the tiling and 128-byte swizzle that tensor cores read."""
    columns = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def rows_layout() -> Any:
    """Layout of one value a row of a product."""
    return plgpu.Layout.WGMMA.reduce(1)


def columns_layout() -> Any:
    """Layout of one value a column of a product."""
    return plgpu.Layout.WGMMA.reduce(0)


def barriers(count: int, arrivals: int = 1) -> Any:
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)


def full(shape: tuple[int, ...], value: float, layout: Any = None) -> jax.Array:
    """A float32 constant in a product's layout."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout or plgpu.Layout.WGMMA)


def over_rows(x_t: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(x_t, shape, [0])


def over_columns(x_s: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(x_s, shape, [1])


def positions(shape: tuple[int, int], axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def product(a_ref: Any, b_ref: Any, meanwhile: Callable[[], None] = lambda: None) -> jax.Array:
    """a @ b in float32 from shared memory; `meanwhile` runs after the product is issued."""
    shape = (a_ref.shape[0], b_ref.shape[1])

    def issue(acc_ref):
        plgpu.wgmma(acc_ref, a_ref, b_ref)
        meanwhile()
        return acc_ref[...]

    return pl.run_scoped(issue, plgpu.ACC(shape, jnp.float32))


def accumulate(*terms: tuple[Any, Any, Any], meanwhile: Callable[[], None] = lambda: None) -> Any:
    """acc + a @ b in float32 for each (acc, a, b), issued together; a is an array in registers or a reference.

    The interpreter knows neither accumulators with a start value nor `a` in registers: there it is `jnp.dot`.
    """
    if shim.interpreting():
        meanwhile()
        out = [acc + _dot(a, b_ref[...]) for acc, a, b_ref in terms]
        plgpu.commit_smem()  # Tensor cores read shared memory as the copies do; these plain reads do not.
        return out[0] if len(out) == 1 else out

    def issue(acc_refs):
        for acc_ref, (_, a, b_ref) in zip(acc_refs, terms, strict=True):
            plgpu.wgmma(acc_ref, a, b_ref)
        meanwhile()

    out = pl.run_state(issue)([plgpu.ACC.init(acc) for acc, _, _ in terms])
    return out[0] if len(out) == 1 else out


def _dot(a: Any, b: jax.Array) -> jax.Array:
    a = a if isinstance(a, jax.Array) else a[...]
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def launch(
    kernel: Callable[..., None],
    inputs: tuple[Any, ...],
    out_type: Any,
    scratch: Any,
    grid: tuple[int, int, int],
) -> Any:
    """Run a kernel over a grid of (batch, heads, blocks), blocks varying fastest; inputs may be None."""
    return shim.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("batch", "heads", "blocks"),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=shim.compiler_params(approx_math=True),
    )(*inputs)
