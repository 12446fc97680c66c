"""DeepSeekMoE: routed experts beside shared ones (arXiv 2401.06066; V3 report 2.1.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax.model.mlp import MLP
from dsv3_jax.model.module import Array, Module, grouped_matmul
from dsv3_jax.model.router import Choice, Router, Routing
from dsv3_jax.parallel.leaves import entering, leaving


class RoutedExperts(Module):
    """The experts' weights and their dropless evaluation: sort by expert, grouped matmul, weighted sum."""

    @nn.compact
    def __call__(self, x_ND: Array, choice: Choice) -> Array:
        """[N, D] and the router's choice -> [N, D]; the weighted sum is float32."""
        cfg = self.cfg
        N, K = choice.experts_NK.shape
        gate_up, down = self.weight("gate_up", "EPFD"), self.weight("down", "EDF")
        # Where widths are cut over an axis, each device adds up its part of every expert's output.
        x_ND, weights_NK = entering(x_ND, gate_up), entering(choice.weights_NK, gate_up)

        expert_of_pair = choice.experts_NK.reshape(-1)
        order = jnp.argsort(expert_of_pair, stable=True)
        place = jnp.zeros_like(order).at[order].set(jnp.arange(N * K, dtype=order.dtype), unique_indices=True)
        group_sizes_E = jnp.bincount(expert_of_pair, length=cfg.n_routed_experts).astype(jnp.int32)

        hidden = grouped_matmul(x_ND[order // K], gate_up, group_sizes_E)
        gate, up = jnp.split(hidden, 2, axis=-1)
        y = grouped_matmul(jax.nn.silu(gate) * up, down, group_sizes_E)
        # Gather back and add over K in the order of choice, so that a token's sum does not depend on the others.
        y_NKD = y[place].reshape(N, K, -1).astype(jnp.float32)
        return leaving(jnp.sum(y_NKD * weights_NK[:, :, None], axis=1).astype(x_ND.dtype), down)


class MoE(Module):
    """Router, routed experts, shared experts."""

    @nn.compact
    def __call__(self, x_BTD: Array, token_mask_BT: Array) -> tuple[Array, Routing]:
        """[B, T, D] -> [B, T, D] and the measured routing."""
        choice, routing = Router(self.cfg, name="router")(x_BTD, token_mask_BT)
        B, T, D = x_BTD.shape
        y_BTD = RoutedExperts(self.cfg, name="experts")(x_BTD.reshape(B * T, D), choice).reshape(B, T, D)
        if self.cfg.n_shared_experts:
            y_BTD = y_BTD + MLP(self.cfg, "M", name="shared")(x_BTD)
        return y_BTD, routing
