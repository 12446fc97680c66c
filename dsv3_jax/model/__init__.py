"""The model family as Flax Linen modules, used functionally: parameters, inputs and caches in, arrays out.

variables = {"params": {...}, "router": {...}}: weights, and the selection biases of the routers (state of the
balance rule, never differentiated).
"""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.cache import Cache, PagedCache, make_cache, make_pages
from dsv3_jax.model.router import Routing, max_violation
from dsv3_jax.model.transformer import MTPOutput, Output, Transformer

__all__ = [
    "Cache",
    "MTPOutput",
    "Output",
    "PagedCache",
    "Routing",
    "Transformer",
    "abstract_variables",
    "init_variables",
    "make_cache",
    "make_pages",
    "max_violation",
]


def abstract_variables(cfg: ModelConfig) -> dict[str, Any]:
    """The tree of shapes (jax.ShapeDtypeStruct): what sharding, conversion, checkpoints and counts read."""

    def declare() -> Any:
        return Transformer(cfg).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), method="everything")

    variables = jax.eval_shape(declare)
    return {"params": variables["params"], "router": variables.get("router", {})}


def init_variables(cfg: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """First values, float32: matrices normal with std `initializer_range`, norm scales 1, biases 0.

    A leaf's values depend on the key and its own path, so they are the same in every model that has the leaf.
    May be traced, e.g. under `jax.jit` with output shardings.
    """

    def first(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if len(name.rsplit("_", 1)[1]) == 1:
            return jnp.full(leaf.shape, 0.0 if "bias" in name else 1.0, jnp.float32)
        leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return jax.random.normal(leaf_key, leaf.shape, jnp.float32) * cfg.initializer_range

    return jax.tree_util.tree_map_with_path(first, abstract_variables(cfg))
