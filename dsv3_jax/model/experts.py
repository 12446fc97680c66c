"""DeepSeekMoE: routed experts beside shared ones (arXiv 2401.06066; V3 report 2.1.2)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax.config import AUTO_KERNELS, Kernels
from dsv3_jax.model.mlp import MLP
from dsv3_jax.model.module import Array, Module, grouped_matmul, grouped_swiglu
from dsv3_jax.model.router import Choice, Router, Routing
from dsv3_jax.parallel.dispatch import Dispatch, dispatch_experts
from dsv3_jax.parallel.leaves import entering, leaving


class RoutedExperts(Module):
    """The experts' weights (of this device) and their evaluation; where tokens go is the dispatch's."""

    dispatch: Dispatch | None = None
    kernels: Kernels = AUTO_KERNELS

    @nn.compact
    def __call__(self, x_ND: Array, choice: Choice) -> tuple[Array, Array]:
        """[N, D] and the router's choice -> [N, D], a float32 weighted sum inside, and the number of dropped pairs."""
        gate_up, down = self.weight("gate_up", "EPFD"), self.weight("down", "EDF")
        # Where widths are cut over an axis, each device adds up its part of every expert's output.
        x_ND, weights_NK = entering(x_ND, gate_up), entering(choice.weights_NK, gate_up)

        def compute(rows_RD: Array, group_sizes_E: Array) -> Array:
            name = self.kernels.grouped_matmul
            hidden_RF = grouped_swiglu(rows_RD, gate_up, group_sizes_E, implementation=name)
            return grouped_matmul(hidden_RF, down, group_sizes_E, implementation=name)

        y_ND, dropped = dispatch_experts(
            x_ND,
            choice.experts_NK,
            weights_NK,
            compute,
            dispatch=self.dispatch,
            num_experts=self.cfg.n_routed_experts,
        )
        return leaving(y_ND, down), dropped


class MoE(Module):
    """Router, routed experts, shared experts."""

    dispatch: Dispatch | None = None
    kernels: Kernels = AUTO_KERNELS

    @nn.compact
    def __call__(self, x_BTD: Array, token_mask_BT: Array) -> tuple[Array, Routing]:
        """[B, T, D] -> [B, T, D] and the measured routing."""
        choice, routing = Router(self.cfg, name="router")(x_BTD, token_mask_BT)
        B, T, D = x_BTD.shape
        if self.dispatch is not None and self.dispatch.size > 1:
            choice = _without_padding(choice, token_mask_BT.reshape(B * T))
        experts = RoutedExperts(self.cfg, self.dispatch, kernels=self.kernels, name="experts")
        y_ND, dropped = experts(x_BTD.reshape(B * T, D), choice)
        y_BTD = y_ND.reshape(B, T, D)
        if self.cfg.n_shared_experts:
            y_BTD = y_BTD + MLP(self.cfg, "M", name="shared")(x_BTD)
        return y_BTD, dataclasses.replace(routing, dropped=dropped)


def _without_padding(choice: Choice, mask_N: Array) -> Choice:
    """Padding has no experts: it is neither sent nor does it take a real token's place in a fixed capacity."""
    return dataclasses.replace(
        choice,
        experts_NK=jnp.where(mask_N[:, None], choice.experts_NK, -1),
        weights_NK=jnp.where(mask_N[:, None], choice.weights_NK, 0.0),
    )
