"""What the compiled step moves between devices: exactly what is written in the model's code, and no expert weight."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import jax
import pytest
from dsv3_jax.planning.collectives import Collective, parse

from dsv3_jax.hf.rules import flatten_paths
from dsv3_jax.model import abstract_variables
from dsv3_jax.parallel.leaves import placement_of
from dsv3_jax.training.step import abstract_state, batch_sharding, make_train_step
from tests.training import tiny

MESH = {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}


@pytest.fixture(scope="module")
def collectives() -> list[Collective]:
    mesh = tiny.mesh(**MESH)
    batch = {
        name: jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=batch_sharding(mesh))
        for name, rows in tiny.batch().items()
    }
    step = jax.jit(make_train_step(tiny.RUN, mesh), donate_argnums=0)
    text = step.lower(abstract_state(tiny.RUN, mesh), batch).compile().as_text()
    return parse(text, 8)


def _placed() -> dict[str, tuple[int, Any]]:
    """Elements of a device's part of one layer, and the placement, by path of every weight."""
    mesh, placed = tiny.mesh(**MESH), {}
    for path, leaf in flatten_paths({"params": abstract_variables(tiny.MODEL)["params"]}).items():
        placement = placement_of(path, leaf, mesh)
        layers = leaf.shape[0] if len(leaf.shape) > len(placement.letters) else 1
        parts = math.prod(MESH[axis] for _, axes in placement.gathers for axis in axes)
        parts *= MESH["expert"] if placement.once else 1
        placed[path] = (math.prod(leaf.shape) // layers // parts, placement)
    return placed


def test_experts_are_gathered_once_a_step_over_data_and_fsdp_only(collectives: list[Collective]) -> None:
    layers = {"moe": 2, "mtp": 1}
    stacks = Counter(4 * size * layers[path.split("/")[1]] for path, (size, p) in _placed().items() if p.once)
    assert len(stacks) == 4  # gate_up and down of the expert layers and of the multi-token module
    gathers = [c for c in collectives if c.kind == "all-gather"]
    experts = [c for c in gathers if c.group == 4 and c.times == 1 and c.operand_bytes in stacks]
    assert Counter(c.operand_bytes for c in experts) == stacks
    # Inside a layer nothing as large as one layer's experts of a device travels by all-gather.
    smallest = min(4 * size for size, p in _placed().values() if p.once)
    dense = {4 * size for size, p in _placed().values() if not p.once and p.gathers}
    for one in gathers:
        assert one in experts or one.operand_bytes in dense or one.operand_bytes < smallest, one


def test_every_gather_is_that_of_a_weight_or_of_tokens(collectives: list[Collective]) -> None:
    dense = {4 * size for size, p in _placed().values() if not p.once and p.gathers}
    tokens = tiny.RUN.training.batch_size * tiny.RUN.training.seq_len // 8
    K, D = tiny.MODEL.num_experts_per_tok, tiny.MODEL.hidden_size
    travelling = {4 * tokens * D, 4 * tokens * 2 * K}
    once = {4 * size * n for size, p in _placed().values() if p.once for n in (1, 2)}
    for one in collectives:
        if one.kind == "all-gather":
            allowed = {4: dense | once, 2: travelling}[one.group]
            assert one.operand_bytes in allowed, one


def test_gradients_of_cut_weights_are_reduce_scattered(collectives: list[Collective]) -> None:
    """No whole gradient of a dense matrix or of experts is summed over the axes that the weight is cut over."""
    largest_vector = 4 * max(size * 3 for size, p in _placed().values() if not p.gathers and not p.once)
    whole = {4 * size * n for size, p in _placed().values() if p.gathers for n in (1, 2, 3)}
    for one in collectives:
        if one.kind == "all-reduce":  # a part's gradient over `data`, or something small
            assert (
                one.group == 2 and one.operand_bytes in whole
            ) or one.operand_bytes <= largest_vector * 64, one
