"""Weights as decoding uses them: cast once to their compute types, one array a layer instead of stacks.

Stacks are right for training, where a scan over layers keeps compile time flat. In a decode step that scan
copies every layer's slice first, all experts included: measured on the CPU (8 layers, 32 experts, 113M
parameters) 71 ms a step at batch 1 against 15 ms with one array a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.adapted import Adapted
from dsv3_jax.quantization.leaf import Quantized

KEPT_FLOAT32 = ("router_ED", "weights_YD")
"""Leaves that the model multiplies in float32 whatever the compute type: they are not rounded to it."""


class Weights(NamedTuple):
    """The main model's weights on the device.

    Attributes:
      top: {"params": embedding, final norm, head}.
      layers: {"params", "router"} of each layer.
      mtp: {"params", "router"} of the multi-token module's first depth, or None.
    """

    top: dict[str, Any]
    layers: list[dict[str, Any]]
    mtp: dict[str, Any] | None = None


def unstack_layers(cfg: ModelConfig, variables: Mapping[str, Any], *, host: bool = False) -> Weights:
    """`Weights` from stacked variables {"params", "router"} (numpy or jax arrays); they are left as they are.

    Args:
      host: leave them on the host, as numpy arrays, for a mesh: one of its devices need not hold them all.
    """
    params, router = variables["params"], variables.get("router") or {}
    top = {name: leaf for name, leaf in params.items() if name not in ("dense", "moe", "mtp")}
    layers = []
    for kind, number in (("dense", cfg.num_dense_layers), ("moe", cfg.num_moe_layers)):
        for at in range(number):
            layers.append(
                {
                    "params": _cast(params[kind], cfg.dtype, at, host=host),
                    "router": _cast(router.get(kind, {}), "float32", at, host=host),
                }
            )
    mtp = None
    if cfg.num_nextn_predict_layers and "mtp" in params:
        own = {"params": params["mtp"], "router": router.get("mtp", {})}
        mtp = {
            "params": _cast(own["params"], cfg.dtype, 0, host=host),
            "router": _cast(own["router"], "float32", 0, host=host),
        }
    return Weights({"params": _cast(top, cfg.dtype, host=host)}, layers, mtp)


def with_whole_kv_b(weights: Weights, dtype: str) -> Weights:
    """The same weights, each quantised `kv_b` dequantised to the compute type.

    The absorbed form multiplies by slices of kv_b on either side of attention and takes no codes: every
    call would dequantise all of it. Results keep their bits. Everything else stays in codes.
    """
    convert = jax.jit(lambda leaf: leaf.astype(dtype))

    def whole(leaf: Any) -> Any:
        if isinstance(leaf, Adapted):
            return dataclasses.replace(leaf, base=whole(leaf.base))
        if not isinstance(leaf, Quantized):
            return leaf
        on_host = isinstance(leaf.codes, np.ndarray)
        return np.asarray(convert(leaf)) if on_host else convert(leaf)

    def layer(tree: dict[str, Any]) -> dict[str, Any]:
        return {
            name: layer(leaf) if isinstance(leaf, Mapping) else whole(leaf) if name == "kv_b_HWC" else leaf
            for name, leaf in tree.items()
        }

    return weights._replace(
        layers=[layer(one) for one in weights.layers], mtp=None if weights.mtp is None else layer(weights.mtp)
    )


def kinds(cfg: ModelConfig) -> Iterator[str]:
    """ "dense" or "moe", layer by layer."""
    yield from ["dense"] * cfg.num_dense_layers + ["moe"] * cfg.num_moe_layers


def _cast(tree: Mapping[str, Any], dtype: str, at: int | None = None, *, host: bool) -> dict[str, Any]:
    def placed(leaf: Any, kept: str | None = None) -> Any:
        leaf = leaf if at is None else leaf[at]
        if host:
            return np.asarray(leaf, None if kept is None else jnp.dtype(kept))
        # jnp.array, not asarray: a slice that shared memory would keep the whole stack alive.
        return jax.device_put(jnp.array(leaf, dtype=kept))

    result: dict[str, Any] = {}
    for name, leaf in tree.items():
        if isinstance(leaf, Mapping):
            result[name] = _cast(leaf, dtype, at, host=host)
        elif isinstance(leaf, Adapted):
            pair = {"base": leaf.base, "a": leaf.a, "b": leaf.b}
            result[name] = dataclasses.replace(leaf, **_cast(pair, dtype, at, host=host))
        elif isinstance(leaf, Quantized):
            result[name] = jax.tree.map(placed, leaf)
        else:
            result[name] = placed(leaf, "float32" if name in KEPT_FLOAT32 else dtype)
    return result
