"""The model: embedding, a stack of dense layers, a stack of expert layers, the multi-token module, the head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from dsv3_jax.config import AUTO_KERNELS, Kernels
from dsv3_jax.model.attention import Context, Form
from dsv3_jax.model.block import Block, Remat, rematerialised, stack
from dsv3_jax.model.cache import Cache, PagedCache
from dsv3_jax.model.module import Array, Module, einsum, rows
from dsv3_jax.model.mtp import MTPLayer
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.model.rope import rope_tables
from dsv3_jax.model.router import Routing
from dsv3_jax.parallel.dispatch import Dispatch


@struct.dataclass
class Output:
    """What a forward pass returns.

    Attributes:
      hidden_BTD: hidden states after the final norm.
      cache: the cache with this call's tokens written, or None.
      routing: measured expert utilisation, each field stacked over expert layers; None without experts.
    """

    hidden_BTD: Array
    cache: Cache | PagedCache | None
    routing: Routing | None


@struct.dataclass
class MTPOutput:
    """What the multi-token module returns; the leading L is the depth."""

    hidden_LBTD: Array
    cache: Cache | PagedCache | None
    routing: Routing


class Transformer(Module):
    """DeepSeek-V2/V3/V3.2. Written for one device's tokens; used functionally through `apply`.

    Attributes:
      form: "expanded" (training, prefill) or "absorbed" (decode over the cache).
      remat: what backward recomputes.
      dispatch: how experts are spread over devices, inside a `shard_map` in which the experts' leaves hold this
        device's experts; None: all are here.
      kernels: which implementation computes attention and the experts' products.
    """

    form: Form = "expanded"
    remat: Remat = "none"
    dispatch: Dispatch | None = None
    kernels: Kernels = AUTO_KERNELS

    def setup(self) -> None:
        cfg = self.cfg
        if cfg.num_dense_layers:
            self.dense = stack(rematerialised(Block, self.remat), cfg.num_dense_layers)(
                cfg, "dense", self.form, kernels=self.kernels
            )
        if cfg.num_moe_layers:
            self.moe = stack(rematerialised(Block, self.remat), cfg.num_moe_layers)(
                cfg, "moe", self.form, self.dispatch, kernels=self.kernels
            )
        if cfg.num_nextn_predict_layers:
            scanned = nn.scan(
                MTPLayer,
                variable_axes={"params": 0, "router": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=cfg.num_nextn_predict_layers,
            )
            self.mtp_layers = scanned(
                cfg, self.form, self.remat, self.dispatch, kernels=self.kernels, name="mtp"
            )

    def __call__(
        self,
        tokens_BT: Array,
        *,
        positions_BT: Array | None = None,
        segments_BT: Array | None = None,
        cache: Cache | PagedCache | None = None,
        embeddings_BTD: Array | None = None,
    ) -> Output:
        """Run the main model.

        Args:
          tokens_BT: int32 ids, range-checked by the caller.
          positions_BT: position of each token in its sequence, also its cache slot; negative for padding,
            which is not written to the cache. Default 0 .. T-1.
          segments_BT: ids of packed sequences from 1, 0 for padding; tokens attend within their segment.
          cache: in the expanded form it must be empty (prefill); in the absorbed form it is read.
          embeddings_BTD: used instead of the embedding of `tokens_BT`.

        Raises:
          ValueError: both a cache and segments, whose positions would share slots.
        """
        cfg = self.cfg
        if cache is not None and segments_BT is not None:
            raise ValueError("a cache holds one sequence a row; packed segments have no place in it")
        x = embeddings_BTD
        if x is None:
            x = rows(self.weight("embed", "VD"), tokens_BT, jnp.dtype(cfg.dtype))
        ctx = self._context(tokens_BT, positions_BT, segments_BT)
        carry, routing = (x, cache), None
        if cfg.num_dense_layers:
            carry, _ = self.dense(carry, jnp.arange(cfg.num_dense_layers), ctx)
        if cfg.num_moe_layers:
            layers = jnp.arange(cfg.num_dense_layers, cfg.num_hidden_layers)
            carry, routing = self.moe(carry, layers, ctx)
        x, cache = carry
        return Output(rms_norm(x, self.weight("final_norm", "D"), cfg.rms_norm_eps), cache, routing)

    def logits(self, hidden_BTD: Array) -> Array:
        """[B, T, D] -> float32 logits [B, T, V] through the head (or the tied embedding)."""
        leaf = self.weight("embed", "VD") if self.cfg.tie_word_embeddings else self.weight("head", "VD")
        return einsum("BTD,VD->BTV", hidden_BTD, leaf).astype(jnp.float32)

    def mtp(
        self,
        hidden_BTD: Array,
        next_tokens_LBT: Array,
        *,
        positions_BT: Array | None = None,
        segments_BT: Array | None = None,
        cache: Cache | PagedCache | None = None,
    ) -> MTPOutput:
        """Run the multi-token module.

        Args:
          hidden_BTD: the main model's hidden states after its final norm.
          next_tokens_LBT: for each depth the token at t + 1 + depth; positions without one are masked by the loss.
        """
        ctx = self._context(next_tokens_LBT[0], positions_BT, segments_BT)
        depths = jnp.arange(self.cfg.num_nextn_predict_layers)
        (_, cache), (hidden, routing) = self.mtp_layers(
            (hidden_BTD, cache), (depths, next_tokens_LBT), ctx, self.weight("embed", "VD")
        )
        return MTPOutput(hidden, cache, routing)

    def mtp_logits(self, hidden_BTD: Array, depth: int = 0) -> Array:
        """float32 logits of the multi-token module at a depth: its own head if it has one, else the main head."""
        if not self.cfg.mtp_own_head:
            return self.logits(hidden_BTD)
        head_LVD = self.get_variable("params", "mtp")["head_VD"]
        head_VD = jax.lax.index_in_dim(head_LVD, depth, keepdims=False)
        return einsum("BTD,VD->BTV", hidden_BTD, head_VD).astype(jnp.float32)

    def everything(self, tokens_BT: Array) -> Array:
        """Touch every weight once; the method that `init` runs."""
        out = self(tokens_BT)
        if self.cfg.num_nextn_predict_layers:
            depth = self.cfg.num_nextn_predict_layers
            self.mtp(out.hidden_BTD, jnp.broadcast_to(tokens_BT[None], (depth, *tokens_BT.shape)))
        return self.logits(out.hidden_BTD)

    def _context(self, tokens_BT: Array, positions_BT: Array | None, segments_BT: Array | None) -> Context:
        B, T = tokens_BT.shape
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
        mask_BT = positions_BT >= 0
        if segments_BT is not None:
            mask_BT = mask_BT & (segments_BT > 0)
        return Context(rope_tables(self.cfg, positions_BT), positions_BT, segments_BT, mask_BT)
