"""What a LoRA run says about itself: how much of the model it trains, and what that takes in memory."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from dsv3_jax.finetune.base import FrozenBase
from dsv3_jax.quantization.leaf import Quantized
from dsv3_jax.training.step import State


class Counts(NamedTuple):
    """Weights that are trained, and all."""

    trained: int
    total: int


def parameter_counts(state: State) -> Counts:
    """Of a state: of a quantised leaf the weights that it stands for, whatever their codes take."""

    def count(tree: Any) -> int:
        leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Quantized))
        return sum(math.prod(leaf.shape) for leaf in leaves)

    trained = count(state.params)
    return Counts(trained, trained + count(state.frozen))


def lora_line(counts: Counts, base: FrozenBase, state: State) -> str:
    """Counts, and bytes over all devices of the frozen weights, the pairs and their moments."""
    mib = [
        sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 2**20
        for tree in (state.frozen, state.params, state.opt_state)
    ]
    kinds = sorted(set(base.formats.values())) or ["not quantised"]
    return (
        f"LoRA rank {base.lora.rank} on {len(base.lora.paths)} leaves: {counts.trained:,} of {counts.total:,} "
        f"parameters are trained ({100 * counts.trained / counts.total:.2f} %); base {mib[0]:,.1f} MiB "
        f"({', '.join(kinds)}), pairs {mib[1]:,.1f} MiB, optimiser {mib[2]:,.1f} MiB"
    )
