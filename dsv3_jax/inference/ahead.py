"""The multi-token module beside the engine: its layer over the pages, and its logits.

Its entry at position t is made of the main model's hidden state there and of token t + 1, and predicts token t + 2. Its
pages are one more layer's under the same tables. At the end of a prefix that prompts share, token t + 1 is that of the
prompt that came first; such an entry can make a draft worse, but what the engine says never depends on drafts.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.weights import Weights
from dsv3_jax.model import PagedCache, Transformer
from dsv3_jax.model.attention import Context
from dsv3_jax.model.module import einsum
from dsv3_jax.model.mtp import MTPLayer
from dsv3_jax.model.rope import rope_tables

if TYPE_CHECKING:
    from dsv3_jax.inference.steps import Memory, Sizes

Array = jax.Array


def look_ahead(
    cfg: ModelConfig,
    sizes: Sizes,
    memory: Memory,
    weights: Weights,
    hidden_BTD: Array,
    next_BT: Array,
    positions_BT: Array,
    tables_BM: Array,
) -> tuple[Array, Memory]:
    """The module's hidden states [B, T, D], its entries written. Where only those are used, little else is computed.

    Args:
      hidden_BTD: the main model's, after its final norm; or the module's own, to look one token further.
      next_BT: the tokens that follow.
      positions_BT: of the hidden states; negative for padding.
    """
    assert weights.mtp is not None, "the weights have no multi-token module"
    cache = PagedCache(memory.latent_NPJ, memory.index_NPZ, tables_BM, sizes.pages)
    ctx = Context(rope_tables(cfg, positions_BT), positions_BT, None, positions_BT >= 0)
    layer: Any = MTPLayer(cfg, "absorbed", "none", sizes.dispatch, sizes.kernels)
    at = (jnp.int32(cfg.num_hidden_layers), jnp.maximum(next_BT, 0))
    embed_VD = weights.top["params"]["embed_VD"]
    (_, cache), (hidden_BTD, _) = layer.apply(weights.mtp, (hidden_BTD, cache), at, ctx, embed_VD)
    return hidden_BTD, dataclasses.replace(memory, latent_NPJ=cache.latent_NPJ, index_NPZ=cache.index_NPZ)


def ahead_logits(cfg: ModelConfig, weights: Weights, hidden_BTD: Array) -> Array:
    """float32 [B, T, V] of the module's hidden states, through its own head if it has one."""
    assert weights.mtp is not None
    if cfg.mtp_own_head:
        return einsum("BTD,VD->BTV", hidden_BTD, weights.mtp["params"]["head_VD"]).astype(jnp.float32)
    logits: Any = Transformer(cfg).apply(weights.top, hidden_BTD, method="logits")
    return logits
