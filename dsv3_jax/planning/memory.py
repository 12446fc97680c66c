"""Peak memory of a training step on one device: an own model, in the types a GPU computes in.

State is exact: the shapes and shardings of `abstract_state`. Activations and workspace follow from the config's
dimension letters and from how the step is written: they are estimates, held against the compiled program in float32
(`tests/planning/test_memory.py`). XLA:CPU computes bfloat16 in float32 buffers, so its own figure is never used.

A step has phases, which do not share their workspace; the largest decides.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from dsv3_jax.config import LoraConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from dsv3_jax.parallel import MESH_AXES
from dsv3_jax.parallel.exchange import EXPERT_HEADROOM
from dsv3_jax.parallel.leaves import Placement, placement_of
from dsv3_jax.planning.activations import F32, Tokens
from dsv3_jax.planning.frozen import base_of, middle_values, named_leaves, pair_rows, part_of
from dsv3_jax.quantization.leaf import Quantized
from dsv3_jax.training.step import State, abstract_state


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device.

    Attributes:
      parameters, optimizer, other: the state (float32 weights, moments, routing biases and counts), exact.
      batch: the step's input, exact.
      gradients: gradients of a micro-batch and, with accumulation, their float32 sums.
      copies: weights in the compute type: experts, gathered once a step, and the head while losses are computed.
      activations: what the layers keep for backward, by the remat policy.
      frozen: weights under LoRA pairs as they are stored, exact; `parameters` are then the pairs.
      workspace: the rest of the phase named by `phase`.
      phases: bytes in use during each phase, the state included.
    """

    parameters: int
    optimizer: int
    other: int
    batch: int
    gradients: int
    copies: int
    activations: int
    workspace: int
    phase: str
    phases: Mapping[str, int]
    frozen: int = 0

    @property
    def arguments(self) -> int:
        """Bytes that are there before the step begins."""
        return self.parameters + self.frozen + self.optimizer + self.other + self.batch

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return self.phases[self.phase]

    @property
    def temporary(self) -> int:
        """Peak without the arguments."""
        return self.peak - self.arguments


def abstract_mesh(shape: Mapping[str, int]) -> AbstractMesh:
    """A mesh of these sizes without devices: enough for shapes and shardings."""
    return AbstractMesh(
        tuple(shape[axis] for axis in MESH_AXES), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of sharded ShapeDtypeStructs on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def memory(cfg: RunConfig, mesh: Any) -> Memory:
    """The memory of a run's step. The base of a LoRA run is opened; none of its weights is read.

    Args:
      mesh: a Mesh or `abstract_mesh`.
    Raises:
      ConfigError: the mesh does not fit the model, or as `open_base` does.
    """
    weights = _weights(cfg.model, cfg.optimizer, cfg.lora, mesh)
    tokens = Tokens(cfg, mesh)
    parameters, optimizer, other = weights.parameters, weights.optimizer, weights.other
    batch = 4 * 4 * tokens.a_step
    arguments = parameters + weights.frozen + optimizer + other + batch

    accumulates = cfg.training.accumulate > 1
    sums = weights.dense + weights.experts * F32 if accumulates else 0
    fresh = weights.dense + weights.experts * weights.expert_gradient
    kept = tokens.kept() + (
        weights.kept_experts + tokens.n * weights.pairs if cfg.training.remat == "none" else 0
    )
    # Every phase: (gradients, copies, activations, workspace).
    copies = weights.copies
    phases = {
        "loss": (sums, copies + weights.head_copy, kept, tokens.loss() + weights.head * F32),
        "backward of a layer": (
            sums + fresh,
            copies,
            kept,
            tokens.layer() + tokens.n * weights.pairs_layer + weights.layer,
        ),
        "backward of the embedding": (sums + fresh, copies, 0, weights.embedding * F32),
        "reduction of the gradients": (
            sums or fresh,
            0,
            0,
            weights.reduced + (0 if accumulates else weights.largest_cast),
        ),
        # Gradients, and a copy of the moments: XLA does not see that old and new ones may share their place.
        "update": (parameters, 0, 0, optimizer),
    }
    totals = {name: arguments + sum(parts) for name, parts in phases.items()}
    phase = max(totals, key=totals.__getitem__)
    gradients, copied, activations, workspace = phases[phase]
    return Memory(
        parameters,
        optimizer,
        other,
        batch,
        int(gradients),
        int(copied),
        int(activations),
        int(workspace),
        phase,
        {name: int(size) for name, size in totals.items()},
        weights.frozen,
    )


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Bytes that follow from the leaves and where they lie; `experts`, `head`, `embedding` count elements."""

    parameters: int
    optimizer: int
    other: int
    dense: int  # float32 gradients of dense leaves, cut as stored
    experts: int  # elements of this device's experts, whole
    expert_gradient: int  # bytes an element of their gradients, before the reduction
    copies: int
    kept_experts: int  # the reshaped gate and up matrices that backward reads when nothing is recomputed
    head: int
    head_copy: int
    embedding: int
    layer: int  # dense weights of the largest layer, gathered, with one gradient
    reduced: int  # gradients of experts, cut as stored
    largest_cast: int  # float32 form of the largest expert leaf's gradient
    frozen: int  # the base of a LoRA run
    pairs: int  # between the factors of all pairs, a token
    pairs_layer: int  # and of the layer that has most, with what goes into and comes out of experts' pairs


@functools.cache
def _weights(model: ModelConfig, optimizer: OptimizerConfig, lora: LoraConfig, mesh: Any) -> _Weights:
    training = TrainingConfig(seq_len=min(TrainingConfig().seq_len, model.max_position_embeddings))
    cfg = RunConfig(model=model, optimizer=optimizer, training=training, lora=lora)
    state = abstract_state(cfg, mesh, base_of(lora, model))
    c = 2 if model.dtype == "bfloat16" else F32
    total = dict.fromkeys((field.name for field in dataclasses.fields(_Weights)), 0)
    total["expert_gradient"] = F32
    layers: dict[str, int] = {}
    middles: dict[str, int] = {}
    largest = 0
    for trained, path, leaf in _leaves(state):
        quantized = isinstance(leaf, Quantized)
        place = Placement("") if quantized else placement_of(path, leaf, mesh)
        stored = math.prod(part_of(leaf))
        whole = stored * math.prod(mesh.shape[axis] for _, axes in place.gathers for axis in axes)
        cast = quantized or bool(place.gathers) or leaf.dtype.itemsize != c
        stack, name = path.split("/")[1], path.rpartition("/")[2]
        count = leaf.shape[0] if stack in ("dense", "moe", "mtp") else 1
        one_layer = whole // count
        if lora.rank and trained:
            middle = middle_values(path, part_of(leaf), model.num_experts_per_tok) * c
            rows = pair_rows(path, part_of(leaf), model.num_experts_per_tok) * c
            rows = int(rows * EXPERT_HEADROOM) if mesh.shape["expert"] > 1 else rows
            middles[stack] = middles.get(stack, 0) + middle + rows
            total["pairs"] += count * middle
        if place.once:
            if trained:
                total["experts"] += whole
                total["reduced"] += stored * F32
            if place.gathers:
                total["copies"] += whole * c
                if trained:
                    total["expert_gradient"] = c
                    total["largest_cast"] = max(total["largest_cast"], whole * F32 if c < F32 else 0)
            elif cast:
                layers[stack] = layers.get(stack, 0) + one_layer * c
            if "gate_up" in name:
                total["kept_experts"] += whole * (c if cast else F32)
            continue
        if trained:
            total["dense"] += stored * F32
        if name.startswith("head") or (name == "embed_VD" and model.tie_word_embeddings):
            total["head"] = whole if trained else 0
            total["head_copy"] = whole * c if cast else 0
        if name.startswith("embed_V"):
            total["embedding"] = whole if place.gathers and trained else 0
        elif not name.startswith("head"):
            layers[stack] = layers.get(stack, 0) + (one_layer * c if cast else 0)
            if trained:
                largest = max(largest, one_layer * (c + F32))
    total["layer"] = max(layers.values(), default=0) + largest
    total["pairs_layer"] = max(middles.values(), default=0)
    total["parameters"] = bytes_per_device(state.params)
    total["frozen"] = bytes_per_device(state.frozen)
    total["optimizer"] = bytes_per_device(state.opt_state)
    named = ("parameters", "frozen", "optimizer")
    total["other"] = bytes_per_device(state) - sum(total[name] for name in named)
    return _Weights(**total)


def _leaves(state: State) -> Iterator[tuple[bool, str, Any]]:
    """(trained, path, leaf)."""
    for trained, tree in ((True, state.params), (False, state.frozen)):
        for path, leaf in named_leaves(tree):
            yield trained, path, leaf
