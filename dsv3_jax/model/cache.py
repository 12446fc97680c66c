"""The explicit latent cache: one array for all layers, carried through the layer scan and donated by callers.

In one piece (`Cache`) or in pages (`PagedCache`).
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.mla_decode import CodedPages, make_coded_pages
from dsv3_jax.kernels.mla_decode.coded_pages import KINDS
from dsv3_jax.model.module import Array


@struct.dataclass
class Cache:
    """Slot s of row b holds the token at position s.

    Attributes:
      latent_LBSJ: normalised key-value latent (C) and rotated shared rope key (R) of each token.
      index_LBSZ: rotated index key (V3.2), or None.
    """

    latent_LBSJ: Array
    index_LBSZ: Array | None = None


@struct.dataclass
class PagedCache:
    """Slot s of row b is `pages[layer * pages + tables[b, s // P], s % P]`, P the page's slots.

    Attributes:
      latent_NPJ: as `Cache.latent_LBSJ`, N = layers * pages; or codes of the latents (C) beside the rope keys (R).
      index_NPZ: as `Cache.index_LBSZ`, or None.
      tables_BM: int32 pages of each row of this call, not offset to a layer; valid ids past the live length too.
      pages: of one layer.
    """

    latent_NPJ: Array | CodedPages
    index_NPZ: Array | CodedPages | None
    tables_BM: Array
    pages: int = struct.field(pytree_node=False)


def make_cache(
    cfg: ModelConfig, batch: int, slots: int, *, layers: int | None = None, dtype: str | None = None
) -> Cache:
    """Zeroed cache for `layers` layers (default: all layers of the main model).

    Args:
      slots: S, tokens a row can hold; a multiple of the attention block.
      dtype: storage type, by default the compute type.
    """
    L = cfg.num_hidden_layers if layers is None else layers
    kind = jnp.dtype(dtype or cfg.dtype)
    latent = jnp.zeros((L, batch, slots, cfg.kv_lora_rank + cfg.qk_rope_head_dim), kind)
    index = jnp.zeros((L, batch, slots, cfg.index_head_dim), kind) if cfg.has_indexer else None
    return Cache(latent, index)


def make_pages(
    cfg: ModelConfig,
    pages: int,
    page_size: int,
    *,
    layers: int | None = None,
    dtype: str | None = None,
    exact_dtype: str | None = None,
) -> tuple[Array | CodedPages, Array | CodedPages | None]:
    """Zeroed `latent_NPJ` and `index_NPZ` of a `PagedCache`.

    Args:
      pages: of one layer.
      page_size: P, slots of a page.
      layers: by default all layers of the main model.
      dtype: storage type, by default the compute type; "int8" or "fp8": `CodedPages`.
      exact_dtype: of the rotated keys beside codes, by default the compute type.
    """
    N = (cfg.num_hidden_layers if layers is None else layers) * pages
    C, R, Z = cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.index_head_dim
    for kind in KINDS:
        if dtype == kind:
            exact = jnp.dtype(exact_dtype or cfg.dtype)
            latent = make_coded_pages(N, page_size, C, kind, exact=R, dtype=exact)
            return latent, make_coded_pages(N, page_size, Z, kind) if cfg.has_indexer else None
    plain = jnp.dtype(dtype or cfg.dtype)
    index = jnp.zeros((N, page_size, Z), plain) if cfg.has_indexer else None
    return jnp.zeros((N, page_size, C + R), plain), index
