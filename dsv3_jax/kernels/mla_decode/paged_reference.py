"""XLA implementation of absorbed latent attention over a cache in pages, and of what reads and writes them."""

from __future__ import annotations

import functools

import einops
import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels.mla_decode import reference
from dsv3_jax.kernels.mla_decode.coded_pages import CodedPages, read_page, write_slots
from dsv3_jax.kernels.mla_decode.reference import attend_block, attended, nothing_attended


def latent_attention(
    q_BTHJ: jax.Array,
    pages_NPJ: jax.Array | CodedPages,
    tables_BM: jax.Array,
    positions_BT: jax.Array,
    *,
    value_dim: int,
    scale: float,
    mask_BTS: jax.Array | None,
    block: int,
    rows_together: bool = False,
) -> jax.Array:
    """See `paged.paged_latent_attention`; the same products in the same order as over a contiguous cache.

    Args:
      rows_together: False: one tile of query tokens after the other, each up to its own last position
        (CPU). True: all of them side by side up to the longest one's (GPU: few launches; a block that is
        wholly masked for a row changes nothing in it, so the result is the same).
    """
    B, T, H, J = q_BTHJ.shape
    P = pages_NPJ.shape[1]
    dtype = jnp.promote_types(q_BTHJ.dtype, pages_NPJ.dtype)
    tile = min(T, max(1, reference.QUERY_ROWS // H))
    tiles = -(-T // tile)
    extra = tiles * tile - T
    # m: rows of a tile, its tokens times the heads: all of them attend to the same vectors.
    q_imJ = einops.rearrange(
        jnp.pad(q_BTHJ, ((0, 0), (0, extra), (0, 0), (0, 0))).astype(dtype),
        "b (i t) h j -> (b i) (t h) j",
        t=tile,
    )
    positions_it = jnp.pad(positions_BT, ((0, 0), (0, extra)), constant_values=-1).reshape(-1, tile)
    visit_pages = max(1, block // P)
    S = visit_pages * P
    if mask_BTS is not None:  # the last block may reach past the table's end
        mask_BTS = jnp.pad(mask_BTS, ((0, 0), (0, extra), (0, -mask_BTS.shape[2] % S)))

    def attend(n, blocks):
        """Tile n over its first `blocks` blocks: [m, C]."""
        q_mJ = lax.dynamic_index_in_dim(q_imJ, n, 0, keepdims=False)
        position_t = lax.dynamic_index_in_dim(positions_it, n, 0, keepdims=False)
        row, last = n // tiles, jnp.max(position_t)

        def visit(i, carry):
            slots_S = i * S + jnp.arange(S, dtype=jnp.int32)
            keys_SJ = live_slots(pages_NPJ, tables_BM, row, i * visit_pages, visit_pages, last).astype(dtype)
            visible_tS = slots_S[None, :] <= position_t[:, None]
            if mask_BTS is not None:
                at = (row, (n % tiles) * tile, i * S)
                visible_tS &= lax.dynamic_slice(mask_BTS, at, (1, tile, S))[0]
            return attend_block(carry, q_mJ, keys_SJ, visible_tS, value_dim=value_dim, scale=scale)

        return attended(lax.fori_loop(0, blocks, visit, nothing_attended(tile * H, value_dim)))

    blocks_i = (positions_it.max(1) + S) // S  # none if every position is negative (-1)
    if rows_together:
        out_imC = jax.vmap(attend, in_axes=(0, None))(jnp.arange(B * tiles), jnp.max(blocks_i))
    else:

        def one_tile(n, out_imC):
            return lax.dynamic_update_index_in_dim(out_imC, attend(n, blocks_i[n]), n, 0)

        empty_imC = jnp.zeros((B * tiles, tile * H, value_dim), jnp.float32)
        out_imC = lax.fori_loop(0, B * tiles, one_tile, empty_imC)
    out_BTHC = einops.rearrange(out_imC, "(b i) (t h) c -> b (i t) h c", b=B, h=H)[:, :T]
    return out_BTHC.astype(q_BTHJ.dtype)


def live_slots(
    pages_NPJ: jax.Array | CodedPages,
    tables_BM: jax.Array,
    row: jax.Array,
    first: jax.Array,
    count: int,
    last: jax.Array,
) -> jax.Array:
    """[count * P, J]: a row's pages `first`, `first + 1`, ... up to slot `last`; zeros from there on.

    Only pages that the row owns are read, and what an earlier owner left behind `last` in its last page is
    wiped: a weight of zero does not silence a NaN.
    """
    P = pages_NPJ.shape[1]
    indices = [jnp.minimum(first + i, last // P) for i in range(count)]
    parts = [read_page(pages_NPJ, tables_BM[row, index]) for index in indices]
    keys_SJ = parts[0] if count == 1 else jnp.concatenate(parts)
    slots_S1 = first * P + jnp.arange(count * P, dtype=jnp.int32)[:, None]
    return jnp.where(slots_S1 <= last, keys_SJ, 0)


def index_scores(
    q_BTYZ: jax.Array,
    weights_BTY: jax.Array,
    pages_NPZ: jax.Array | CodedPages,
    tables_BM: jax.Array,
    positions_BT: jax.Array,
    *,
    block: int,
) -> jax.Array:
    """See `paged.paged_index_scores`. Row after row, each up to its own last position."""
    B, T, _, Z = q_BTYZ.shape
    P, M = pages_NPZ.shape[1], tables_BM.shape[1]
    product = functools.partial(
        jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    visit_pages = max(1, block // P)
    S = visit_pages * P
    blocks_B = (positions_BT.max(1) + S) // S

    def one_row(row, scores_BTS):
        q_TYZ = q_BTYZ[row].astype(jnp.float32)
        last = jnp.max(positions_BT[row])

        def visit(i, scores_BTS):
            keys_SZ = live_slots(pages_NPZ, tables_BM, row, i * visit_pages, visit_pages, last)
            scores_TYS = jax.nn.relu(product("tyz,sz->tys", q_TYZ, keys_SZ.astype(jnp.float32)) * Z**-0.5)
            scores_TS = product("tys,ty->ts", scores_TYS, weights_BTY[row].astype(jnp.float32))
            slots_S = i * S + jnp.arange(S, dtype=jnp.int32)
            scores_TS = jnp.where(slots_S[None, :] <= positions_BT[row][:, None], scores_TS, -jnp.inf)
            return lax.dynamic_update_slice(scores_BTS, scores_TS[None], (row, 0, i * S))

        return lax.fori_loop(0, blocks_B[row], visit, scores_BTS)

    slots = -(-M * P // S) * S
    scores_BTS = lax.fori_loop(0, B, one_row, jnp.full((B, T, slots), -jnp.inf, jnp.float32))
    return scores_BTS[:, :, : M * P]


def write_pages(
    pages_NPJ: jax.Array | CodedPages, new_BTJ: jax.Array, tables_BM: jax.Array, positions_BT: jax.Array
) -> jax.Array | CodedPages:
    """See `paged.write_pages`. A scatter of whole vectors, which XLA does in place on a donated carry."""
    N, P, _ = pages_NPJ.shape
    M = tables_BM.shape[1]
    pages_BT = jnp.take_along_axis(tables_BM, jnp.clip(positions_BT // P, 0, M - 1), axis=1)
    written_BT = (positions_BT >= 0) & (positions_BT < M * P)
    pages_BT = jnp.where(written_BT, pages_BT, N)  # N is out of bounds: dropped
    at = (pages_BT, positions_BT % P)
    if isinstance(pages_NPJ, CodedPages):
        return write_slots(pages_NPJ, new_BTJ, at)
    return pages_NPJ.at[at].set(new_BTJ.astype(pages_NPJ.dtype), mode="drop")
