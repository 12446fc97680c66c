"""Multi-head latent attention (V2 report section 2.1), expanded and absorbed.

Expanded: keys and values are built from the latent per head (training, prefill). Absorbed: `kv_b` is folded
into the query and the output, and attention runs over the cached latents themselves (decode).
"""

from __future__ import annotations

from typing import Literal

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import AUTO_KERNELS, Kernels
from dsv3_jax.kernels.attention import attention
from dsv3_jax.kernels.mla_decode import (
    latent_attention,
    paged_index_scores,
    paged_latent_attention,
    write_cache,
    write_pages,
)
from dsv3_jax.kernels.registry import full_precision
from dsv3_jax.model.cache import Cache, PagedCache
from dsv3_jax.model.indexer import Indexer, select, select_scored
from dsv3_jax.model.module import Array, Module, einsum, part
from dsv3_jax.model.norm import LATENT_NORM_EPS, rms_norm
from dsv3_jax.model.rope import rotate, softmax_scale
from dsv3_jax.parallel.leaves import entering

Form = Literal["expanded", "absorbed"]


@struct.dataclass
class Context:
    """What every layer of one call shares.

    Attributes:
      rope: cos and sin, [B, T, R / 2] float32.
      positions_BT: int32 position of each token in its sequence; negative for padding.
      segments_BT: int32 packed-sequence ids from 1 (0 is padding), or None for one sequence a row.
      token_mask_BT: bool, True for real tokens.
    """

    rope: tuple[Array, Array]
    positions_BT: Array
    segments_BT: Array | None
    token_mask_BT: Array


class Attention(Module):
    """MLA with or without the query latent, with or without V3.2's indexer."""

    form: Form = "expanded"
    kernels: Kernels = AUTO_KERNELS

    @nn.compact
    def __call__(
        self, x_BTD: Array, ctx: Context, cache: Cache | PagedCache | None, layer: Array
    ) -> tuple[Array, Cache | PagedCache | None]:
        """[B, T, D] -> [B, T, D] and the cache with this layer's new tokens written.

        Without a cache, or in the expanded form, tokens attend to earlier tokens of this call (a cache must
        then be empty before it). In the absorbed form they attend to the cache up to their own position. A cache in
        pages has the absorbed form only.
        """
        cfg = self.cfg
        C, N = cfg.kv_lora_rank, cfg.qk_nope_head_dim
        q_BTHQ, q_latent_BTA = self._queries(x_BTD)
        q_nope, q_rope = q_BTHQ[..., :N], rotate(q_BTHQ[..., N:], *ctx.rope, interleaved=True)

        kv_BTJ = einsum("BTD,JD->BTJ", x_BTD, self.weight("kv_a", "JD"))
        latent_BTC = rms_norm(kv_BTJ[..., :C], self.weight("kv_norm", "C"), LATENT_NORM_EPS)
        k_rope_BTR = rotate(kv_BTJ[..., C:], *ctx.rope, interleaved=True)
        new_BTJ = checkpoint_name(jnp.concatenate([latent_BTC, k_rope_BTR], axis=-1), "kv_latent")

        index = None
        if cfg.has_indexer:
            index = Indexer(cfg, name="indexer")(x_BTD, q_latent_BTA, ctx.rope)
        if cache is not None:
            cache = _write(cache, layer, new_BTJ, None if index is None else index[2], ctx.positions_BT)

        kv_b_HWC = self.weight("kv_b", "HWC")
        if isinstance(cache, PagedCache):
            y_BTHU = self._paged(q_nope, q_rope, cache, layer, kv_b_HWC, index, ctx)
        elif cache is None or self.form == "expanded":
            y_BTHU = self._expanded(q_nope, q_rope, new_BTJ, kv_b_HWC, index, ctx)
        else:
            y_BTHU = self._absorbed(q_nope, q_rope, cache, layer, kv_b_HWC, index, ctx)
        return einsum("BTHU,DHU->BTD", y_BTHU, self.weight("o", "DHU")), cache

    def _queries(self, x_BTD: Array) -> tuple[Array, Array]:
        if self.cfg.q_lora_rank is None:
            return einsum("BTD,HQD->BTHQ", x_BTD, self.weight("q", "HQD")), x_BTD
        q_BTA = checkpoint_name(einsum("BTD,AD->BTA", x_BTD, self.weight("q_a", "AD")), "q_latent")
        q_BTA = rms_norm(q_BTA, self.weight("q_norm", "A"), LATENT_NORM_EPS)
        return einsum("BTA,HQA->BTHQ", q_BTA, self.weight("q_b", "HQA")), q_BTA

    def _expanded(
        self,
        q_nope: Array,
        q_rope: Array,
        new_BTJ: Array,
        kv_b_HWC: Array,
        index: tuple[Array, Array, Array] | None,
        ctx: Context,
    ) -> Array:
        C, N = self.cfg.kv_lora_rank, self.cfg.qk_nope_head_dim
        B, T, H, R = q_rope.shape
        kv_BTHW = einsum("BTC,HWC->BTHW", new_BTJ[..., :C], kv_b_HWC)
        k_rope = jnp.broadcast_to(entering(new_BTJ[:, :, None, C:], kv_b_HWC), (B, T, H, R))
        mask_BTS = None
        if index is not None and self.cfg.index_topk < T:
            q_index, weights, k_index = index
            mask_BTS = select(q_index, weights, k_index, _causal(T, ctx.segments_BT, B), self.cfg.index_topk)
        return attention(
            jnp.concatenate([q_nope, q_rope], axis=-1),
            jnp.concatenate([kv_BTHW[..., :N], k_rope], axis=-1),
            kv_BTHW[..., N:],
            scale=softmax_scale(self.cfg),
            causal=True,
            segments_BT=ctx.segments_BT,
            segments_BS=ctx.segments_BT,
            mask_BTS=mask_BTS,
            implementation=self.kernels.attention,
        )

    def _absorbed(
        self,
        q_nope: Array,
        q_rope: Array,
        cache: Cache,
        layer: Array,
        kv_b_HWC: Array,
        index: tuple[Array, Array, Array] | None,
        ctx: Context,
    ) -> Array:
        cfg = self.cfg
        mask_BTS = None
        if index is not None and cache.index_LBSZ is not None:
            k_BSZ = jax.lax.dynamic_index_in_dim(cache.index_LBSZ, layer, keepdims=False)
            slots_S = jnp.arange(k_BSZ.shape[1])
            visible_BTS = slots_S[None, None, :] <= ctx.positions_BT[:, :, None]
            mask_BTS = select(index[0], index[1], k_BSZ, visible_BTS, cfg.index_topk)
        y_BTHC = latent_attention(
            self._absorb(q_nope, q_rope, kv_b_HWC),
            cache.latent_LBSJ,
            layer,
            ctx.positions_BT,
            value_dim=cfg.kv_lora_rank,
            scale=softmax_scale(cfg),
            mask_BTS=mask_BTS,
            implementation=self.kernels.latent_attention,
        )
        return self._values(y_BTHC, kv_b_HWC)

    def _paged(
        self,
        q_nope: Array,
        q_rope: Array,
        cache: PagedCache,
        layer: Array,
        kv_b_HWC: Array,
        index: tuple[Array, Array, Array] | None,
        ctx: Context,
    ) -> Array:
        cfg = self.cfg
        tables_BM = cache.tables_BM + layer * cache.pages
        mask_BTS = None
        slots = tables_BM.shape[1] * cache.latent_NPJ.shape[1]
        if index is not None and cache.index_NPZ is not None and slots > cfg.index_topk:
            scores_BTS = paged_index_scores(index[0], index[1], cache.index_NPZ, tables_BM, ctx.positions_BT)
            visible_BTS = jnp.arange(slots)[None, None, :] <= ctx.positions_BT[:, :, None]
            mask_BTS = select_scored(scores_BTS, visible_BTS, cfg.index_topk)
        y_BTHC = paged_latent_attention(
            self._absorb(q_nope, q_rope, kv_b_HWC),
            cache.latent_NPJ,
            tables_BM,
            ctx.positions_BT,
            value_dim=cfg.kv_lora_rank,
            scale=softmax_scale(cfg),
            mask_BTS=mask_BTS,
            implementation=self.kernels.latent_attention,
        )
        return self._values(y_BTHC, kv_b_HWC)

    def _absorb(self, q_nope: Array, q_rope: Array, kv_b_HWC: Array) -> Array:
        """Queries against the latent itself: the key up-projection folded in, then the rotated part."""
        key_HNC = part(kv_b_HWC, 1, 0, self.cfg.qk_nope_head_dim)
        return jnp.concatenate([_by_head(q_nope, key_HNC, summed=1), q_rope], axis=-1)

    def _values(self, y_BTHC: Array, kv_b_HWC: Array) -> Array:
        N = self.cfg.qk_nope_head_dim
        return _by_head(y_BTHC, part(kv_b_HWC, 1, N, N + self.cfg.v_head_dim), summed=2)


def _by_head(x_BTHK: Array, weight: Array, *, summed: int) -> Array:
    """Each head's vectors [B, T, H, in] times its own matrix, whose axis `summed` is summed over: [B, T, H, out].

    Heads first, and x on the left: given the einsum, XLA:CPU puts the weight there, and copies x transposed to it one
    number at a time.
    """
    y_HnK = jax.lax.dot_general(
        einops.rearrange(x_BTHK, "b t h k -> h (b t) k"),
        weight.astype(x_BTHK.dtype),
        (((2,), (summed,)), ((0,), (0,))),
        precision=full_precision(x_BTHK.dtype),
    )
    return einops.rearrange(y_HnK, "h (b t) k -> b t h k", t=x_BTHK.shape[1])


def _write(
    cache: Cache | PagedCache, layer: Array, new_BTJ: Array, k_index_BTZ: Array | None, positions_BT: Array
) -> Cache | PagedCache:
    if isinstance(cache, PagedCache):
        tables_BM, keys = cache.tables_BM + layer * cache.pages, cache.index_NPZ
        if keys is not None and k_index_BTZ is not None:
            keys = write_pages(keys, k_index_BTZ, tables_BM, positions_BT)
        latent = write_pages(cache.latent_NPJ, new_BTJ, tables_BM, positions_BT)
        return cache.replace(latent_NPJ=latent, index_NPZ=keys)  # type: ignore[attr-defined]
    latent = write_cache(cache.latent_LBSJ, layer, new_BTJ.astype(cache.latent_LBSJ.dtype), positions_BT)
    index = cache.index_LBSZ
    if index is not None and k_index_BTZ is not None:
        index = write_cache(index, layer, k_index_BTZ.astype(index.dtype), positions_BT)
    return Cache(latent, index)


def _causal(T: int, segments_BT: Array | None, B: int) -> Array:
    order = jnp.arange(T)
    causal_BTS = jnp.broadcast_to((order[None, :] <= order[:, None])[None], (B, T, T))
    if segments_BT is None:
        return causal_BTS
    return causal_BTS & (segments_BT[:, :, None] == segments_BT[:, None, :])
