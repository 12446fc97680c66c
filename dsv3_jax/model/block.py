"""One pre-norm transformer layer, and stacks of them as a scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import linen as nn

from dsv3_jax.config import AUTO_KERNELS, Kernels
from dsv3_jax.model.attention import Attention, Context, Form
from dsv3_jax.model.cache import Cache, PagedCache
from dsv3_jax.model.experts import MoE
from dsv3_jax.model.mlp import MLP
from dsv3_jax.model.module import Array, Module
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.model.router import Routing
from dsv3_jax.parallel.dispatch import Dispatch

Remat = Literal["none", "latents", "full"]

# Latents are far cheaper to keep than q, k and v; up-projections and SwiGLU are recomputed.
KEPT_NAMES = ("q_latent", "kv_latent", "attention_out", "attention_lse")


class Block(Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the mlp is dense or a mixture of experts."""

    kind: Literal["dense", "moe"] = "moe"
    form: Form = "expanded"
    dispatch: Dispatch | None = None
    kernels: Kernels = AUTO_KERNELS

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Cache | PagedCache | None], layer: Array, ctx: Context
    ) -> tuple[tuple[Array, Cache | PagedCache | None], Routing | None]:
        """Scan body: carry is (x [B, T, D], cache); `layer` indexes the cache. Returns the routing of MoE layers."""
        x, cache = carry
        eps = self.cfg.rms_norm_eps
        normed = rms_norm(x, self.weight("attention_norm", "D"), eps)
        y, cache = Attention(self.cfg, self.form, kernels=self.kernels, name="attention")(
            normed, ctx, cache, layer
        )
        x = x + y
        normed = rms_norm(x, self.weight("mlp_norm", "D"), eps)
        routing = None
        if self.kind == "dense":
            y = MLP(self.cfg, "I", name="mlp")(normed)
        else:
            y, routing = MoE(self.cfg, self.dispatch, kernels=self.kernels, name="mlp")(
                normed, ctx.token_mask_BT
            )
        return (x + y, cache), routing


def rematerialised(block: Any, remat: Remat) -> Any:
    """`block` with the recomputation policy of `remat`."""
    if remat == "none":
        return block
    policy: Callable[..., Any] | None = None
    if remat == "latents":
        policy = jax.checkpoint_policies.save_only_these_names(*KEPT_NAMES)
    return nn.remat(block, policy=policy, prevent_cse=False)


def stack(block: Any, length: int) -> Any:
    """`block` scanned over a leading layer axis of its weights; compile time does not grow with depth."""
    return nn.scan(
        block,
        variable_axes={"params": 0, "router": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=length,
    )
