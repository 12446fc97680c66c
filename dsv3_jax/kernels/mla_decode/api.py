"""Absorbed multi-head latent attention over the latent cache, and writing to that cache.

DeepSeek-V2 paper (arXiv 2405.04434) section 2.1.2: with the key up-projection folded into the query
and the value up-projection into the output, every head attends to the same cached vector: the
normalised latent (C) followed by the rotated position key (R). The key is the whole vector, the
value its first C columns.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.mla_decode import reference
from dsv3_jax.kernels.registry import Implementation, call

LATENT_ATTENTION = {"reference": Implementation(reference.latent_attention)}
WRITE_CACHE = {"reference": Implementation(reference.write_cache)}


def latent_attention(
    q_BTHJ: jax.Array,
    cache_LBSJ: jax.Array,
    layer: jax.Array | int,
    positions_BT: jax.Array,
    *,
    value_dim: int,
    scale: float,
    mask_BTS: jax.Array | None = None,
    block: int = 256,
    implementation: str = "auto",
) -> jax.Array:
    """Attention of absorbed queries over one layer of the latent cache.

    A query at position p sees the slots s <= p for which `mask_BTS`, if given, is True. The result
    of a row is bitwise the same whatever the cache length S (a multiple of `block`), and whatever
    the other rows hold and where they are: attention runs in blocks of fixed size and a block that
    is wholly masked for a row changes nothing. Cost follows the live length, not S.

    Args:
      q_BTHJ: queries: absorbed latent part (C), then rotated part (R).
      cache_LBSJ: the cache of all layers; only finite values (unwritten slots included). Keep it
        float32 on CPU whatever the queries' dtype: XLA:CPU converts a whole bfloat16 cache whenever a
        loop that carries it writes to it.
      layer: the layer to read; may be traced.
      positions_BT: int32 position of each query; negative: padding, whose output is zero.
      value_dim: C, the number of leading cache columns that are the value.
      scale: softmax scale.
      mask_BTS: bool, True = may be attended to (sparse selection); positions still apply.
      block: slots read at a time.
      implementation: "auto" or "reference".

    Returns:
      out_BTHC in q's dtype. Products take operands in the wider of the queries' and the cache's
      dtype; softmax and accumulation are float32.

    Raises:
      ValueError: shapes disagree, S is not a multiple of `block`, or the implementation is unknown.
    """
    B, T, _, J = q_BTHJ.shape
    _, cache_B, S, cache_J = cache_LBSJ.shape
    if (cache_B, cache_J) != (B, J):
        raise ValueError(f"queries {q_BTHJ.shape} (B T H J) and cache {cache_LBSJ.shape} (L B S J) disagree")
    if positions_BT.shape != (B, T):
        raise ValueError(f"positions have shape {positions_BT.shape}, expected {(B, T)}")
    if block <= 0 or S % block:
        raise ValueError(f"cache length {S} is not a multiple of the block of {block}")
    if not 0 < value_dim <= J:
        raise ValueError(f"value_dim {value_dim} is not within the cache's {J} columns")
    if mask_BTS is not None and mask_BTS.shape != (B, T, S):
        raise ValueError(f"mask has shape {mask_BTS.shape}, expected {(B, T, S)}")
    return call(
        "latent_attention",
        implementation,
        LATENT_ATTENTION,
        q_BTHJ,
        cache_LBSJ,
        jnp.asarray(layer, jnp.int32),
        positions_BT.astype(jnp.int32),
        value_dim=value_dim,
        scale=scale,
        mask_BTS=mask_BTS,
        block=block,
    )


def write_cache(
    cache_LBSJ: jax.Array,
    layer: jax.Array | int,
    new_BTJ: jax.Array,
    positions_BT: jax.Array,
    *,
    implementation: str = "auto",
) -> jax.Array:
    """The cache with row b's tokens written to slots `positions_BT[b]` of one layer.

    Stays in place when the cache is donated, or carried by a scan over layers. Tokens at negative
    positions, and beyond the end of the cache, are not written. The positions of one row that are
    not negative must be consecutive and ascending.

    Args:
      cache_LBSJ: the cache of all layers.
      layer: the layer to write; may be traced.
      new_BTJ: the new vectors, cast to the cache's dtype.
      positions_BT: int32 slot of each token.
      implementation: "auto" or "reference".

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
    """
    _, B, _, J = cache_LBSJ.shape
    T = new_BTJ.shape[1]
    if new_BTJ.shape != (B, T, J) or positions_BT.shape != (B, T):
        raise ValueError(
            f"tokens {new_BTJ.shape} (B T J) and positions {positions_BT.shape} (B T) "
            f"do not fit the cache {cache_LBSJ.shape} (L B S J)"
        )
    return call(
        "write_cache",
        implementation,
        WRITE_CACHE,
        cache_LBSJ,
        jnp.asarray(layer, jnp.int32),
        new_BTJ.astype(cache_LBSJ.dtype),
        positions_BT.astype(jnp.int32),
    )
