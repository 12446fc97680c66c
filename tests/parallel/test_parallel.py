"""Meshes and the sharding table."""

from __future__ import annotations

import dataclasses
import math
import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import MESH_PRESETS, MeshConfig, ModelConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.hf.rules import flatten_paths
from dsv3_jax.model import abstract_variables
from dsv3_jax.parallel import axes_of, compute_spec, make_mesh, mesh_shape, storage_spec
from dsv3_jax.parallel.leaves import placement_of
from dsv3_jax.parallel.rules import Row, spec_by


def leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)


def sizes(**axes: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(shape={"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, **axes})


def test_a_mesh_of_all_devices_with_auto_axes() -> None:
    mesh = make_mesh(MeshConfig(data=2, expert=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape) == {
        "data": 1,
        "fsdp": 1,
        "expert": 1,
        "tensor": 1,
    }


@pytest.mark.parametrize("cfg", [MeshConfig(data=3), MeshConfig(fsdp=4), MeshConfig(expert=16)])
def test_a_mesh_that_does_not_fit_is_refused(cfg: MeshConfig) -> None:
    with pytest.raises(ConfigError, match="devices; expected 8"):
        mesh_shape(cfg, 8)


def test_letters_of_leaves() -> None:
    assert axes_of("params/moe/attention/q_b_HQA", leaf(2, 4, 6, 8)) == ("L", "H", "Q", "A")
    assert axes_of("params/embed_VD", leaf(10, 4)) == ("V", "D")
    assert axes_of("router/mtp/block/mlp/router/bias_E", leaf(1, 4)) == ("L", "E")
    with pytest.raises(AssertionError, match="letters"):
        axes_of("params/embed_VD", leaf(1, 10, 4))


def test_storage_and_compute_of_v3_on_eight_devices() -> None:
    mesh = sizes(fsdp=2, expert=2, tensor=2)
    experts, shape = "params/moe/mlp/experts/gate_up_EPFD", leaf(58, 256, 2, 2048, 7168)
    assert storage_spec(experts, shape, mesh) == P(None, "expert", None, "tensor", "fsdp")
    assert compute_spec(experts, shape, mesh) == P(None, "expert", None, "tensor")
    q_b, shape = "params/moe/attention/q_b_HQA", leaf(58, 128, 192, 1536)
    # Dense weights are cut over the expert axis too, where their layers are data-parallel.
    assert storage_spec(q_b, shape, mesh) == P(None, "tensor", None, ("fsdp", "expert"))
    assert compute_spec(q_b, shape, mesh) == P(None, "tensor")
    # D comes before A in the table, so the axis is used once.
    assert storage_spec("params/moe/attention/q_a_AD", leaf(58, 1536, 7168), mesh) == P(
        None, None, ("fsdp", "expert")
    )


def test_the_indexers_heads_are_never_cut() -> None:
    index, shape = "params/moe/attention/indexer/q_b_YZA", leaf(2, 64, 128, 1536)
    assert compute_spec(index, shape, sizes(tensor=2)) == P()


def test_experts_master_weights_are_cut_over_data_and_fsdp_too() -> None:
    down, shape = "params/moe/mlp/experts/down_EDF", leaf(58, 256, 7168, 2048)
    mesh = sizes(data=8, fsdp=4, expert=64)
    assert storage_spec(down, shape, mesh) == P(None, "expert", ("data", "fsdp"))
    placed = placement_of(down, shape, mesh)
    assert placed.once and placed.gathers == ((-2, ("data", "fsdp")),) and placed.reduce == ()
    router = placement_of("params/moe/mlp/router/router_ED", leaf(58, 256, 7168), mesh)
    assert not router.once and router.gathers == ((-1, ("fsdp", "expert")),) and router.reduce == ("data",)


@pytest.mark.parametrize("name", MESH_PRESETS)
def test_presets_fit_the_671b_model(name: str) -> None:
    devices = {"one_gpu": 1, "8gpu": 8, "64gpu": 64, "2048gpu": 2048}[name]
    shape = mesh_shape(MeshConfig(preset=name), devices)
    assert math.prod(shape.values()) == devices
    for path, leaf_shape in flatten_paths(
        abstract_variables(ModelConfig(num_nextn_predict_layers=1))
    ).items():
        storage_spec(path, leaf_shape, types.SimpleNamespace(shape=shape))
    with pytest.raises(ConfigError, match="devices; expected 6"):
        mesh_shape(MeshConfig(preset=name), 6)


def test_a_preset_beside_axes_of_ones_own_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mesh\.preset is '8gpu'; expected none beside axes of your own"):
        MeshConfig(preset="8gpu", data=2)


def test_vectors_and_the_router_are_whole_where_they_are_used() -> None:
    mesh = sizes(fsdp=2, expert=2, tensor=2)
    assert storage_spec("params/moe/attention_norm_D", leaf(58, 7168), mesh) == P()
    assert storage_spec("router/moe/mlp/router/bias_E", leaf(58, 256), mesh) == P()
    assert compute_spec("params/moe/mlp/router/router_ED", leaf(58, 256, 7168), mesh) == P()


def test_a_dimension_that_does_not_divide_is_named() -> None:
    with pytest.raises(ConfigError, match=r"o_DHU: H \(heads\) is 6, .*tensor = 4"):
        storage_spec("params/dense/attention/o_DHU", leaf(1, 8, 6, 4), sizes(tensor=4))


def test_two_letters_that_claim_one_axis_are_named() -> None:
    with pytest.raises(
        ConfigError, match=r"I \(dense feed-forward width\) and D \(model width\) both claim .*tensor"
    ):
        spec_by((Row("ID", ("tensor",)),), "params/dense/mlp/gate_up_PID", leaf(1, 2, 8, 8), sizes(tensor=2))


@pytest.mark.parametrize("axis", ["fsdp", "expert", "tensor"])
def test_the_671b_model_is_cut_on_every_axis(axis: str) -> None:
    """On 8 devices of one axis nothing fails, and what the axis is for is really cut."""
    cfg = ModelConfig(num_nextn_predict_layers=1)
    mesh = sizes(**{axis: 8})
    total = held = 0
    for path, shape in flatten_paths(abstract_variables(cfg)).items():
        spec = storage_spec(path, shape, mesh)
        cut = math.prod(8 for entry in spec if entry)
        total, held = total + math.prod(shape.shape), held + math.prod(shape.shape) // cut
        assert cut in (1, 8)
    assert held < total * {"fsdp": 0.1251, "expert": 0.1251, "tensor": 0.13}[axis]


def test_arrays_can_be_placed_by_the_table() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    cfg = dataclasses.replace(
        ModelConfig(), hidden_size=8, moe_intermediate_size=4, n_routed_experts=8, num_hidden_layers=2, vocab_size=16,
        first_k_dense_replace=1, intermediate_size=8, num_attention_heads=2, q_lora_rank=4, kv_lora_rank=4,
        qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, n_group=1, topk_group=1, num_experts_per_tok=2,
    )  # fmt: skip
    for path, shape in flatten_paths(abstract_variables(cfg)).items():
        for rule in (storage_spec, compute_spec):
            array = jax.device_put(
                np.zeros(shape.shape, np.float32), NamedSharding(mesh, rule(path, shape, mesh))
            )
            assert array.shape == shape.shape
