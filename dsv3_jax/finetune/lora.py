"""Pairs on a tree: `init_pairs`, `attach`, `split`, `merge`.

The tree of pairs is an ordinary tree of arrays whose paths go on where the leaf's end, with letters of their own:
"params/moe/attention/q_b_HQA/a_OA" and ".../b_HQO". So optimiser, sharding rules and checkpoints take it as they take
weights. `attach` makes an `Adapted` leaf of each weight that has a pair; nothing else of the tree changes.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.errors import ConfigError
from dsv3_jax.finetune.targets import letters_of
from dsv3_jax.hf.rules import flatten_paths, unflatten_paths
from dsv3_jax.model.adapted import Adapted

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Lora:
    """What a set of pairs is.

    Attributes:
      rank: of every pair.
      alpha: numerator of the scale.
      rslora: scale alpha / sqrt(rank) (arXiv 2312.03732) instead of alpha / rank.
      paths: the leaves that have one, e.g. "params/moe/attention/q_b_HQA".
    """

    rank: int
    alpha: float
    rslora: bool
    paths: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Factor of b a."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def abstract_pairs(lora: Lora, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of pairs as shapes, {"params": ...}, float32.

    Args:
      abstract: {"params", ...} of anything with `.shape`, whose leaves may be quantised.
    """
    leaves, flat = flatten_paths(abstract), {}
    for path in lora.paths:
        letters, own = letters_of(path), path.rpartition("_")[2]
        shape = tuple(leaves[path].shape)
        layers, sizes = shape[: len(shape) - len(own)], dict(zip(own, shape[-len(own) :], strict=True))
        sizes["O"] = lora.rank
        for name, axes in (("a", letters.a), ("b", letters.b)):
            part = (*layers, *(sizes[letter] for letter in axes))
            flat[f"{path}/{name}_{axes}"] = jax.ShapeDtypeStruct(part, jnp.float32)
    return unflatten_paths(flat)


def init_pairs(lora: Lora, abstract: Mapping[str, Any], key: Array) -> dict[str, Any]:
    """First pairs, float32: a as PEFT's (Kaiming-uniform with a = sqrt 5: within 1 / sqrt(columns)), b zero.

    So b a is 0 and the first step's model is the base. A leaf's values depend on the key and its own path.
    """
    flat = {}
    for path, leaf in flatten_paths(abstract_pairs(lora, abstract)).items():
        parent, _, name = path.rpartition("/")
        if name.startswith("b_"):
            flat[path] = jnp.zeros(leaf.shape, leaf.dtype)
            continue
        bound = 1.0 / math.sqrt(math.prod(leaf.shape[-letters_of(parent).inputs :]))
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        flat[path] = jax.random.uniform(own, leaf.shape, leaf.dtype, -bound, bound)
    return unflatten_paths(flat)


def attach(params: Mapping[str, Any], pairs: Mapping[str, Any], lora: Lora) -> dict[str, Any]:
    """The tree below "params" with an `Adapted` leaf for every weight that has a pair.

    Args:
      params: weights (arrays, `Quantized` or `Sharded` leaves), paths without "params".
      pairs: the pairs, likewise.
    Raises:
      ConfigError: a pair for a weight that is not there.
    """
    leaves, parts = flatten_paths(params, "params"), flatten_paths(pairs, "params")
    for path in lora.paths:
        letters = letters_of(path)
        if path not in leaves:
            raise ConfigError(f"the adapter has a pair for {path}, which the model has not")
        leaves[path] = Adapted(
            leaves[path],
            parts[f"{path}/a_{letters.a}"],
            parts[f"{path}/b_{letters.b}"],
            letters.lead,
            letters.inputs,
            lora.scale,
        )
    tree: dict[str, Any] = unflatten_paths(leaves)["params"]
    return tree


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(weights, pairs) of a tree that `attach` made."""
    weights: dict[str, Any] = {}
    pairs: dict[str, Any] = {}
    for path, leaf in flatten_paths(params, "params").items():
        weights[path] = leaf
        if isinstance(leaf, Adapted):
            letters = letters_of(path)
            weights[path] = leaf.base
            pairs |= {f"{path}/a_{letters.a}": leaf.a, f"{path}/b_{letters.b}": leaf.b}
    return unflatten_paths(weights)["params"], unflatten_paths(pairs).get("params", {})


def merge(params: Mapping[str, Any], dtype: Any = None) -> dict[str, Any]:
    """The tree with W + scale * b a for every `Adapted` leaf, added up in float32.

    Args:
      dtype: of the merged leaves; by default the weight's own, float32 for one that was quantised.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Adapted):
            return leaf
        return leaf.astype(dtype or getattr(leaf.base, "dtype", jnp.float32))

    return jax.tree.map(one, dict(params), is_leaf=lambda leaf: isinstance(leaf, Adapted))
