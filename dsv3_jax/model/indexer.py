"""V3.2's lightning indexer: which cached tokens a query may attend to.

Reference form: a boolean mask over all tokens. Sources: transformers' deepseek_v32 and the V3.2 report.
Hadamard rotation and FP8 of the released code only affect rounding and are left out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax.model.module import Array, Module, einsum
from dsv3_jax.model.norm import layer_norm
from dsv3_jax.model.rope import rotate


class Indexer(Module):
    """Index keys of new tokens and the selection of keys for queries."""

    @nn.compact
    def __call__(
        self, x_BTD: Array, q_latent_BTA: Array, rope: tuple[Array, Array]
    ) -> tuple[Array, Array, Array]:
        """Returns index queries [B, T, Y, Z], head weights [B, T, Y] float32 and index keys [B, T, Z].

        The rope dimensions come first and are halves, not interleaved pairs, unlike the main attention's.
        """
        R = self.cfg.qk_rope_head_dim
        q_BTYZ = einsum("BTA,YZA->BTYZ", q_latent_BTA, self.weight("q_b", "YZA"))
        k_BTZ = einsum("BTD,ZD->BTZ", x_BTD, self.weight("k", "ZD"))
        k_BTZ = layer_norm(k_BTZ, self.weight("k_norm", "Z"), self.weight("k_norm_bias", "Z"), 1e-6)
        q_BTYZ = jnp.concatenate(
            [rotate(q_BTYZ[..., :R], *rope, interleaved=False), q_BTYZ[..., R:]], axis=-1
        )
        k_BTZ = jnp.concatenate([rotate(k_BTZ[..., :R], *rope, interleaved=False), k_BTZ[..., R:]], axis=-1)
        # transformers keeps this projection in float32 in every checkpoint type.
        weights_BTY = einsum("BTD,YD->BTY", x_BTD, self.weight("weights", "YD"), dtype=jnp.float32)
        return q_BTYZ, weights_BTY * self.cfg.index_n_heads**-0.5, k_BTZ


def select(q_BTYZ: Array, weights_BTY: Array, k_BSZ: Array, visible_BTS: Array, topk: int) -> Array:
    """Boolean [B, T, S]: the `topk` visible keys of highest score per query; ties take the lowest index.

    score = sum over heads of weight * relu(q . k) * Z^-0.5, in float32, no gradient.
    """
    B, T, S = visible_BTS.shape
    if S <= topk:
        return visible_BTS
    scores_BTYS = jnp.einsum(
        "BTYZ,BSZ->BTYS",
        q_BTYZ.astype(jnp.float32),
        k_BSZ.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    scores_BTYS = jax.nn.relu(scores_BTYS * q_BTYZ.shape[-1] ** -0.5)
    scores_BTS = jnp.einsum("BTYS,BTY->BTS", scores_BTYS, weights_BTY, precision=jax.lax.Precision.HIGHEST)
    return select_scored(scores_BTS, visible_BTS, topk)


def select_scored(scores_BTS: Array, visible_BTS: Array, topk: int) -> Array:
    """`select` for scores that are there already (`kernels.mla_decode.paged_index_scores`)."""
    B, T, S = visible_BTS.shape
    if S <= topk:
        return visible_BTS
    scores_BTS = jax.lax.stop_gradient(jnp.where(visible_BTS, scores_BTS, -jnp.inf))
    _, chosen_BTk = jax.lax.top_k(scores_BTS, topk)
    rows = (jnp.arange(B)[:, None, None], jnp.arange(T)[None, :, None], chosen_BTk)
    return jnp.zeros((B, T, S), bool).at[rows].set(True) & visible_BTS
