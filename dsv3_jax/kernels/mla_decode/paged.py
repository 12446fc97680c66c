"""Absorbed latent attention over a cache in pages, and reading and writing those pages.

The cache is one array [N, P, J] of N pages of P slots each, for all layers: a model with L layers and n pages
per layer has N = L * n, and layer l uses the pages l * n ... (l + 1) * n - 1. A row (sequence) owns pages in any
order; its table lists them: slot s of row b is `pages[tables[b, s // P], s % P]`.
"""

from __future__ import annotations

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.mla_decode import paged_reference, pallas_gpu
from dsv3_jax.kernels.mla_decode.coded_pages import CodedPages
from dsv3_jax.kernels.registry import Implementation, call, mosaic

Pages = TypeVar("Pages", bound=jax.Array | CodedPages)

PAGED_LATENT_ATTENTION = {
    "mosaic": mosaic(
        pallas_gpu.latent_attention, refuses=pallas_gpu.refuses, shape_class=pallas_gpu.shape_class
    ),
    # Row after row would be thousands of small launches.
    "batched": Implementation(
        functools.partial(paged_reference.latent_attention, rows_together=True), frozenset({"gpu"})
    ),
    "reference": Implementation(paged_reference.latent_attention),
}
WRITE_PAGES = {"reference": Implementation(paged_reference.write_pages)}
INDEX_SCORES = {"reference": Implementation(paged_reference.index_scores)}


def paged_latent_attention(
    q_BTHJ: jax.Array,
    pages_NPJ: jax.Array | CodedPages,
    tables_BM: jax.Array,
    positions_BT: jax.Array,
    *,
    value_dim: int,
    scale: float,
    mask_BTS: jax.Array | None = None,
    block: int = 256,
    implementation: str = "auto",
) -> jax.Array:
    """Attention of absorbed queries over the pages that each row's table lists.

    A query at position p sees the slots s <= p for which `mask_BTS`, if given, is True. Two rows may list the
    same pages (a shared prefix, several tiles of one sequence). The result of a row is bitwise the same whatever
    the other rows hold and where they are, which pages a row owns and in which order, what the pages it does not
    own contain (NaN included), and however many entries M a table has. Where `block` agrees it is bitwise what
    `latent_attention` gives for the same slots in one piece. Cost follows the live length, not M.

    "mosaic" (Hopper): bfloat16 queries and pages, no mask; `block` is its own. Rows in pieces of context, whose
    number follows from the row's length, the batch and the device alone: the same guarantees, other bits.

    Args:
      q_BTHJ: queries: absorbed latent part (C), then rotated part (R).
      pages_NPJ: the pages of all layers. Keep them float32 on CPU (see `latent_attention`), or `CodedPages`, which
        only the XLA implementations take, a block of slots dequantised at a time.
      tables_BM: int32 ids of each row's pages, offset to the layer. Entries past a row's live length must be
        valid ids (0, for example); nothing is read through them.
      positions_BT: int32 position of each query, in any order; negative: padding, whose output is zero.
      value_dim: C, the number of leading columns that are the value.
      scale: softmax scale.
      mask_BTS: bool over S = M * P slots, True = may be attended to (sparse selection); positions still apply.
      block: slots read at a time, rounded down to whole pages, at least one page.
      implementation: "auto" or one of PAGED_LATENT_ATTENTION.

    Returns:
      out_BTHC in q's dtype. Products take operands in the wider of the queries' and the cache's dtype; softmax
      and accumulation are float32.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown or cannot run.
    """
    B, T, _, J = q_BTHJ.shape
    _check_pages(pages_NPJ, tables_BM, positions_BT, (B, T), J)
    if not 0 < value_dim <= J:
        raise ValueError(f"value_dim {value_dim} is not within the pages' {J} columns")
    slots = tables_BM.shape[1] * pages_NPJ.shape[1]
    if mask_BTS is not None and mask_BTS.shape != (B, T, slots):
        raise ValueError(
            f"mask has shape {mask_BTS.shape}, expected {(B, T, slots)}: {tables_BM.shape[1]} pages"
        )
    if block <= 0:
        raise ValueError(f"block is {block}, expected a number of slots")
    return call(
        "paged_latent_attention",
        implementation,
        PAGED_LATENT_ATTENTION,
        jnp.asarray(q_BTHJ),
        _arrays(pages_NPJ),
        jnp.asarray(tables_BM, jnp.int32),
        jnp.asarray(positions_BT, jnp.int32),
        value_dim=value_dim,
        scale=scale,
        mask_BTS=mask_BTS,
        block=block,
    )


def write_pages(
    pages_NPJ: Pages,
    new_BTJ: jax.Array,
    tables_BM: jax.Array,
    positions_BT: jax.Array,
    *,
    implementation: str = "auto",
) -> Pages:
    """The pages with row b's tokens written to the slots `positions_BT[b]` of its table.

    Stays in place when the pages are donated, or carried by a scan over layers. Tokens at negative positions,
    and beyond the table's end, are not written. No two tokens of a call may go to one slot: pages that several
    rows list are written at different positions, or not at all.

    Args:
      pages_NPJ: the pages of all layers; index keys [N, P, Z] (V3.2) are written the same way.
      new_BTJ: the new vectors, cast to the pages' dtype.
      tables_BM: int32 ids of each row's pages, offset to the layer.
      positions_BT: int32 slot of each token in its row.
      implementation: "auto" or one of WRITE_PAGES.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
    """
    _check_pages(pages_NPJ, tables_BM, positions_BT, new_BTJ.shape[:2], new_BTJ.shape[2])
    return call(
        "write_pages",
        implementation,
        WRITE_PAGES,
        _arrays(pages_NPJ),
        jnp.asarray(new_BTJ),
        jnp.asarray(tables_BM, jnp.int32),
        jnp.asarray(positions_BT, jnp.int32),
    )


def paged_index_scores(
    q_BTYZ: jax.Array,
    weights_BTY: jax.Array,
    pages_NPZ: jax.Array | CodedPages,
    tables_BM: jax.Array,
    positions_BT: jax.Array,
    *,
    block: int = 256,
    implementation: str = "auto",
) -> jax.Array:
    """V3.2's lightning indexer over index keys in pages, read through the same tables as the latents.

    score = sum over index heads of weight * relu(q . k) * Z^-0.5 in float32 for the slots s <= p of a query at
    position p, -inf elsewhere. Cost follows the live length, except for the result itself.

    Args:
      q_BTYZ: index queries.
      weights_BTY: weight of each index head.
      pages_NPZ: index keys of all layers in pages.
      tables_BM, positions_BT, block, implementation: as in `paged_latent_attention`.

    Returns:
      scores_BTS, float32, S = M * P: what the mask of `paged_latent_attention` is selected from.
    """
    B, T, Y, Z = q_BTYZ.shape
    _check_pages(pages_NPZ, tables_BM, positions_BT, (B, T), Z)
    if weights_BTY.shape != (B, T, Y):
        raise ValueError(f"index weights have shape {weights_BTY.shape}, expected {(B, T, Y)}")
    if block <= 0:
        raise ValueError(f"block is {block}, expected a number of slots")
    return call(
        "paged_index_scores",
        implementation,
        INDEX_SCORES,
        jnp.asarray(q_BTYZ),
        jnp.asarray(weights_BTY),
        _arrays(pages_NPZ),
        jnp.asarray(tables_BM, jnp.int32),
        jnp.asarray(positions_BT, jnp.int32),
        block=block,
    )


def _arrays(pages_NPJ: jax.Array | CodedPages) -> jax.Array | CodedPages:
    return jax.tree.map(jnp.asarray, pages_NPJ)


def _check_pages(
    pages_NPJ: jax.Array | CodedPages,
    tables_BM: jax.Array,
    positions_BT: jax.Array,
    rows: tuple[int, ...],
    J: int,
) -> None:
    B, T = rows
    if pages_NPJ.ndim != 3 or pages_NPJ.shape[2] != J:
        raise ValueError(f"pages {pages_NPJ.shape} (N P J) do not hold vectors of {J} columns")
    if tables_BM.ndim != 2 or tables_BM.shape[0] != B or tables_BM.shape[1] == 0:
        raise ValueError(f"tables have shape {tables_BM.shape}, expected ({B}, pages of a row)")
    if positions_BT.shape != (B, T):
        raise ValueError(f"positions have shape {positions_BT.shape}, expected {(B, T)}")
