"""Multi-token prediction (V3 report section 2.2): depth k predicts token t + 1 + k from h_t and the tokens between."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax.config import AUTO_KERNELS, Kernels
from dsv3_jax.model.attention import Context, Form
from dsv3_jax.model.block import Block, Remat, rematerialised
from dsv3_jax.model.cache import Cache
from dsv3_jax.model.module import Array, Module, einsum, rows
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.model.router import Routing
from dsv3_jax.parallel.dispatch import Dispatch


class MTPLayer(Module):
    """One depth: norm and project [embedding of the next token ; hidden], a MoE block, a norm."""

    form: Form = "expanded"
    remat: Remat = "none"
    dispatch: Dispatch | None = None
    kernels: Kernels = AUTO_KERNELS

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Cache | None],
        xs: tuple[Array, Array],
        ctx: Context,
        embed_VD: Array,
    ) -> tuple[tuple[Array, Cache | None], tuple[Array, Routing]]:
        """Scan body over depths.

        Args:
          carry: hidden [B, T, D] of the depth before (depth 0: the main model's, after its final norm), cache.
          xs: depth index, and next tokens [B, T]: the token at t + 1 + depth.
          embed_VD: the main model's embedding, used unless this module has its own.
        """
        cfg = self.cfg
        hidden, cache = carry
        depth, next_tokens_BT = xs
        if cfg.mtp_own_embedding:
            embed_VD = self.weight("embed", "VD")
        if cfg.mtp_own_head and self.is_initializing():
            self.weight("head", "VD")  # read by Transformer.mtp_logits
        embedded = rows(embed_VD, next_tokens_BT, hidden.dtype)
        embedded = rms_norm(embedded, self.weight("embed_norm", "D"), cfg.rms_norm_eps)
        hidden = rms_norm(hidden, self.weight("hidden_norm", "D"), cfg.rms_norm_eps)
        x = einsum("BTX,DX->BTD", jnp.concatenate([embedded, hidden], axis=-1), self.weight("proj", "DX"))
        block = rematerialised(Block, self.remat)(
            cfg, "moe", self.form, self.dispatch, kernels=self.kernels, name="block"
        )
        (x, cache), routing = block((x, cache), depth, ctx)
        hidden = rms_norm(x, self.weight("norm", "D"), cfg.rms_norm_eps)
        return (hidden, cache), (hidden, routing)
