"""What the compiled step moves between devices: exactly what is written in the model's code, and no expert weight."""

from __future__ import annotations

import math
from collections import Counter

import jax
import pytest

from dsv3_jax.hf.rules import flatten_paths
from dsv3_jax.model import abstract_variables
from dsv3_jax.parallel.leaves import Placement, placement_of
from dsv3_jax.planning.collectives import Collective, parse
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


def _placed() -> dict[str, tuple[int, int, Placement]]:
    """Bytes of a device's part of one layer, number of layers, and the placement, by path of every weight."""
    mesh, placed = tiny.mesh(**MESH), {}
    for path, leaf in flatten_paths({"params": abstract_variables(tiny.MODEL)["params"]}).items():
        placement = placement_of(path, leaf, mesh)
        layers = leaf.shape[0] if len(leaf.shape) > len(placement.letters) else 1
        parts = math.prod(MESH[axis] for _, axes in placement.gathers for axis in axes)
        parts *= MESH["expert"] if placement.once else 1
        placed[path] = (4 * math.prod(leaf.shape) // layers // parts, layers, placement)
    return placed


def test_experts_are_gathered_once_a_step_outside_the_layers_over_data_and_fsdp(
    collectives: list[Collective],
) -> None:
    copies = Counter(size * layers for size, layers, p in _placed().values() if p.once)
    assert sum(copies.values()) == 4  # gate_up and down of the expert layers and of the multi-token module
    outside = [
        c for c in collectives if c.kind == "all-gather" and "Transformer" not in c.where and c.group == 4
    ]
    outside = [c for c in outside if "jvp" not in c.where]
    assert Counter(c.operand_bytes for c in outside) == copies
    assert {c.times for c in outside} == {1}


def test_inside_the_layers_only_dense_weights_and_tokens_are_gathered(collectives: list[Collective]) -> None:
    dense = {size for size, _, p in _placed().values() if p.gathers and not p.once}
    tokens = tiny.RUN.training.batch_size * tiny.RUN.training.seq_len // 8
    travelling = {4 * tokens * tiny.MODEL.hidden_size, 4 * tokens * 2 * tiny.MODEL.num_experts_per_tok}
    inside = [c for c in collectives if c.kind == "all-gather" and "jvp" in c.where]
    assert len(inside) > 30
    for one in inside:
        if "mlp/experts" in one.where:  # over the expert axis: hidden states, choices and their weights
            assert one.group == 2 and one.operand_bytes in travelling, one
        else:
            assert one.group == 4 and one.operand_bytes in dense, one


def test_gradients_of_cut_weights_are_scattered_and_only_their_parts_summed(
    collectives: list[Collective],
) -> None:
    parts = sum(size * layers for size, layers, p in _placed().values() if p.gathers and not p.once)
    vectors = sum(size * layers for size, layers, p in _placed().values() if not p.gathers and not p.once)
    sums = [c for c in collectives if c.kind == "all-reduce"]
    over_data = [c for c in sums if c.group == 2]
    assert 0 <= sum(c.operand_bytes for c in over_data) - parts <= 64  # jax 0.12 sums part of the norm there
    assert vectors < sum(c.operand_bytes for c in sums if c.group == 8) < vectors + 4 * 256  # metrics besides
    others = [c for c in sums if c.group not in (2, 8)]  # jax 0.12 sums the norm axis by axis
    assert sum(c.operand_bytes for c in others) < 4 * 256
    scattered = [c for c in collectives if c.kind == "reduce-scatter" and c.group == 4]
    whole = sum(4 * size * layers for size, layers, p in _placed().values() if p.gathers)
    # The embedding is read twice (also by the multi-token module), each with a gradient of its own.
    again = 4 * _placed()["params/embed_VD"][0]
    assert sum(c.operand_bytes * c.times for c in scattered) == whole + again
