"""The base under a LoRA plan: opened without reading a weight, its leaves beside their pairs, its operations."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax

from dsv3_jax.config import LoraConfig, ModelConfig, RunConfig
from dsv3_jax.finetune import abstract_pairs
from dsv3_jax.finetune.base import FrozenBase, open_base
from dsv3_jax.finetune.targets import letters_of
from dsv3_jax.model.counts import train_flops_per_token
from dsv3_jax.quantization.leaf import Quantized
from dsv3_jax.training.lora import Counts, parameter_counts
from dsv3_jax.training.step import State, abstract_state


@dataclasses.dataclass(frozen=True)
class LeafRow:
    """A leaf of the state on the mesh.

    Attributes:
      path: of the leaf; a pair's two factors have one each.
      trained: whether it is a pair's.
      shape: of what it stands for.
      stored: its type, or the format of its codes.
      cut: mesh axes of each dimension that is cut, e.g. "1: expert"; of a quantised leaf those of its codes.
      nbytes: on one device, scales and zero points included.
    """

    path: str
    trained: bool
    shape: tuple[int, ...]
    stored: str
    cut: str
    nbytes: int


@dataclasses.dataclass(frozen=True)
class LoraPlan:
    """What a LoRA run trains and what it leaves."""

    counts: Counts
    rows: tuple[LeafRow, ...]


def base_of(lora: LoraConfig, model: ModelConfig) -> FrozenBase | None:
    """The base of a run, None without LoRA. Raises ConfigError as `open_base` does."""
    return _opened(lora, model) if lora.rank else None


@functools.cache
def _opened(lora: LoraConfig, model: ModelConfig) -> FrozenBase:
    return open_base(lora, model)


def named_leaves(params: Any) -> Iterator[tuple[str, Any]]:
    """Paths that begin with "params" and their leaves; a quantised leaf is one."""
    flat = jax.tree_util.tree_flatten_with_path(
        {"params": params}, is_leaf=lambda leaf: isinstance(leaf, Quantized)
    )[0]
    for path, leaf in flat:
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def part_of(leaf: Any) -> tuple[int, ...]:
    """The shape of what a device holds of a sharded abstract leaf; of a quantised one, in the leaf's own letters."""
    if not isinstance(leaf, Quantized):
        return tuple(leaf.sharding.shard_shape(leaf.shape))
    return (*leaf.codes.sharding.shard_shape(leaf.codes.shape)[:-2], *leaf.block_shape)


def plan_lora(cfg: RunConfig, mesh: Any) -> LoraPlan | None:
    """The leaves of a LoRA run, the base's first; None for full training.

    Args:
      mesh: a Mesh or `abstract_mesh`.
    """
    base = base_of(cfg.lora, cfg.model)
    if base is None:
        return None
    state: State = abstract_state(cfg, mesh, base)
    rows = [
        _row(path, leaf, trained, base.formats)
        for trained, tree in ((False, state.frozen), (True, state.params))
        for path, leaf in named_leaves(tree)
    ]
    return LoraPlan(parameter_counts(state), tuple(rows))


def _row(path: str, leaf: Any, trained: bool, formats: dict[str, str]) -> LeafRow:
    first: Any = leaf.codes if isinstance(leaf, Quantized) else leaf
    cut = [
        f"{dim}: {axes if isinstance(axes, str) else ' x '.join(axes)}"
        for dim, axes in enumerate(first.sharding.spec)
        if axes
    ]
    nbytes = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(leaf))
    stored = formats[path] if isinstance(leaf, Quantized) else str(leaf.dtype)
    return LeafRow(path, trained, tuple(leaf.shape), stored, ", ".join(cut) or "-", nbytes)


def middle_values(path: str, part: tuple[int, ...], chosen: int) -> int:
    """Values a token has between the two factors of its pair, in one layer; 0 for the factor that is not the first.

    Args:
      part: this device's part of the factor.
      chosen: experts of a token.
    """
    parent, _, name = path.rpartition("/")
    if not name.startswith("a_"):
        return 0
    letters = letters_of(parent).a
    sizes = dict(zip(letters, part[-len(letters) :], strict=True))
    return sizes["O"] * sizes.get("P", 1) * (chosen if "/experts/" in parent else 1)


def pair_rows(path: str, part: tuple[int, ...], chosen: int) -> int:
    """Values that an expert's factor reads or writes for a token, in one layer: products of their own beside the
    weight's, which backward holds; 0 for other pairs, whose products are small beside the layer's."""
    parent, _, name = path.rpartition("/")
    if "/experts/" not in parent:
        return 0
    letters = letters_of(parent)
    own = letters.a if name.startswith("a_") else letters.b
    sizes = dict(zip(own, part[-len(own) :], strict=True))
    counted = own[-letters.inputs :] if name.startswith("a_") else own.replace("E", "").replace("O", "")
    return math.prod(sizes[letter] for letter in counted) * chosen


def lora_flops_per_token(cfg: RunConfig, base: FrozenBase, attention: float) -> tuple[float, float]:
    """(model, further) operations of one token of a LoRA step.

    Model: as a run's MFU has them, two thirds of full training: no gradient of a frozen weight. Further: what that
    leaves out, a third of backward's attention, which has no weight, and three times the pairs' products.

    Args:
      attention: forward operations of attention without its projections, all layers.
    """
    model = train_flops_per_token(cfg.model, cfg.training.seq_len) * 2 / 3
    share = (cfg.model.num_experts_per_tok / cfg.model.n_routed_experts) if cfg.model.num_moe_layers else 1.0
    pairs = abstract_pairs(base.lora, base.abstract)["params"]
    forward = sum(
        2 * math.prod(leaf.shape) * (share if "/experts/" in path else 1)
        for path, leaf in named_leaves(pairs)
    )
    return model, attention + 3 * forward
