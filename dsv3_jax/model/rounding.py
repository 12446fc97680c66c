"""Weights whose products are computed in FP8 while they are trained (`training.products: fp8`)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from dsv3_jax.errors import ConfigError
from dsv3_jax.hf.rules import flatten_paths, unflatten_paths
from dsv3_jax.parallel.leaves import Sharded
from dsv3_jax.quantization.choose import DEFAULT_KINDS, kind_of_leaf


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["implementation"])
@dataclasses.dataclass(frozen=True)
class Rounding:
    """A leaf that `einsum` and `grouped_matmul` multiply by `kernels.fp8_matmul.linear`.

    Attributes:
      weight: the master weight, an array or, inside a `shard_map`, a `Sharded` part.
      implementation: of the forward and dX products.
    """

    weight: Any
    implementation: str

    @property
    def cut(self) -> tuple[str, str] | None:
        """As `Sharded.cut`."""
        return getattr(self.weight, "cut", None)


def rounding_products(params: Mapping[str, Any], implementation: str) -> dict[str, Any]:
    """The tree with the matrices of attention, dense layers, shared and routed experts as `Rounding` leaves.

    Embedding, head, router, norms and the multi-token module's projection stay as they are.

    Raises:
      ConfigError: one of them is no plain weight (quantised, or with a LoRA pair).
    """
    flat = flatten_paths({"params": params})
    for path, leaf in flat.items():
        if kind_of_leaf(path) in DEFAULT_KINDS:
            if not isinstance(leaf, (jax.Array, Sharded)):
                raise ConfigError(
                    f"training.products fp8 trains plain weights; {path} is {type(leaf).__name__}"
                )
            flat[path] = Rounding(leaf, implementation)
    return unflatten_paths(flat)["params"]
