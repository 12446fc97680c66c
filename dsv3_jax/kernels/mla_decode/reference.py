"""XLA implementation of absorbed latent attention over the cache."""

from __future__ import annotations

import functools

import einops
import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels.registry import full_precision

# Rows (query tokens times heads) that visit a block of the cache together: in smaller products (128) XLA:CPU's threads
# do not help each other, and the sums are read and written for each block.
QUERY_ROWS = 1024


Attended = tuple[jax.Array, jax.Array, jax.Array]
"""Of m query rows so far: largest score, sum of weights, weighted sum of values [m, C]; float32."""


def nothing_attended(m: int, value_dim: int) -> Attended:
    """Before the first block."""
    return (
        jnp.full((m,), -jnp.inf, jnp.float32),
        jnp.zeros((m,), jnp.float32),
        jnp.zeros((m, value_dim), jnp.float32),
    )


def attend_block(
    so_far: Attended,
    q_mJ: jax.Array,
    keys_SJ: jax.Array,
    visible_tS: jax.Array,
    *,
    value_dim: int,
    scale: float,
) -> Attended:
    """One block of cached vectors by online softmax; `q_mJ` and `keys_SJ` have one dtype, m is tokens times heads."""
    max_m, sum_m, out_mC = so_far
    dtype = keys_SJ.dtype
    product = functools.partial(
        jnp.einsum, preferred_element_type=jnp.float32, precision=full_precision(dtype)
    )
    heads = q_mJ.shape[0] // visible_tS.shape[0]
    scores_mS = product("mj,sj->ms", q_mJ, keys_SJ) * scale
    scores_mS = jnp.where(einops.repeat(visible_tS, "t s -> (t h) s", h=heads), scores_mS, -jnp.inf)
    new_max_m = jnp.maximum(max_m, scores_mS.max(-1))
    # Until a row has seen a visible slot its maximum is -inf, and -inf - -inf would be NaN.
    shift_m = jnp.where(new_max_m == -jnp.inf, 0.0, new_max_m)
    decay_m = jnp.exp(max_m - shift_m)
    weights_mS = jnp.exp(scores_mS - shift_m[:, None])
    part_mC = product("ms,sc->mc", weights_mS.astype(dtype), keys_SJ[:, :value_dim])
    return new_max_m, sum_m * decay_m + weights_mS.sum(-1), out_mC * decay_m[:, None] + part_mC


def attended(so_far: Attended) -> jax.Array:
    """The output [m, C]; zeros where nothing was visible."""
    _, sum_m, out_mC = so_far
    return out_mC / jnp.where(sum_m == 0, 1.0, sum_m)[:, None]


def latent_attention(
    q_BTHJ: jax.Array,
    cache_LBSJ: jax.Array,
    layer: jax.Array,
    positions_BT: jax.Array,
    *,
    value_dim: int,
    scale: float,
    mask_BTS: jax.Array | None,
    block: int,
) -> jax.Array:
    """See `api.latent_attention`.

    Batch rows, then tiles of query tokens, in turn; each tile's loop over blocks of the cache stops
    at its own last position, so a short row does not pay for a long one.
    """
    B, T, H, J = q_BTHJ.shape
    # On CPU a float32 cache serves bfloat16 queries too (api.py); products are float32 then.
    dtype = jnp.promote_types(q_BTHJ.dtype, cache_LBSJ.dtype)
    tile = min(T, max(1, QUERY_ROWS // H))
    tiles = -(-T // tile)
    extra = tiles * tile - T
    # m: rows of a tile, its tokens times the heads: all of them attend to the same vectors.
    q_BimJ = einops.rearrange(
        jnp.pad(q_BTHJ, ((0, 0), (0, extra), (0, 0), (0, 0))).astype(dtype),
        "b (i t) h j -> (b i) (t h) j",
        t=tile,
    )
    positions_Bit = jnp.pad(positions_BT, ((0, 0), (0, extra)), constant_values=-1).reshape(-1, tile)
    if mask_BTS is not None:
        mask_BTS = jnp.pad(mask_BTS, ((0, 0), (0, extra), (0, 0)))

    def query_tile(n, out_BimC):
        q_mJ = lax.dynamic_index_in_dim(q_BimJ, n, 0, keepdims=False)
        position_t = lax.dynamic_index_in_dim(positions_Bit, n, 0, keepdims=False)
        row = n // tiles

        def visit(i, carry):
            start = i * block
            keys_SJ = lax.dynamic_slice(cache_LBSJ, (layer, row, start, 0), (1, 1, block, J))
            keys_SJ = keys_SJ.reshape(block, J).astype(dtype)
            visible_tS = start + jnp.arange(block, dtype=jnp.int32)[None, :] <= position_t[:, None]
            if mask_BTS is not None:
                at = (row, (n % tiles) * tile, start)
                visible_tS &= lax.dynamic_slice(mask_BTS, at, (1, tile, block))[0]
            return attend_block(carry, q_mJ, keys_SJ, visible_tS, value_dim=value_dim, scale=scale)

        blocks = jnp.max(position_t) // block + 1  # none if every position is negative
        carry = lax.fori_loop(0, blocks, visit, nothing_attended(tile * H, value_dim))
        return lax.dynamic_update_index_in_dim(out_BimC, attended(carry), n, 0)

    out_BimC = lax.fori_loop(
        0, B * tiles, query_tile, jnp.zeros((B * tiles, tile * H, value_dim), jnp.float32)
    )
    out_BTHC = einops.rearrange(out_BimC, "(b i) (t h) c -> b (i t) h c", b=B, h=H)[:, :T]
    return out_BTHC.astype(q_BTHJ.dtype)


def write_cache(
    cache_LBSJ: jax.Array, layer: jax.Array, new_BTJ: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """See `api.write_cache`. A scatter of whole vectors, which XLA does in place on a donated carry."""
    B, S = cache_LBSJ.shape[1:3]
    slots_BT = jnp.where(positions_BT < 0, S, positions_BT)  # S is out of bounds: dropped
    rows_B1 = jnp.arange(B)[:, None]
    return cache_LBSJ.at[layer, rows_B1, slots_BT].set(new_BTJ, mode="drop")
