"""Trees on disk: exact chunk shapes, opened by plain Orbax, sharded; a lost or wrong part is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from dsv3_jax.checkpoint import load_tree, open_leaf, save_tree
from dsv3_jax.checkpoint.store import tree_paths
from dsv3_jax.errors import DataError

RNG = np.random.default_rng(0)
CHUNKS = {"params/moe/experts_EPFD": (1, 1, 1, 6, 16)}


def tree() -> dict[str, Any]:
    return {
        "params": {
            "moe": {"experts_EPFD": RNG.normal(size=(2, 4, 2, 6, 16)).astype(ml_dtypes.bfloat16)},
            "norm_D": RNG.normal(size=(16,)).astype(np.float32),
        },
        "router": {"bias_E": RNG.normal(size=(2, 4)).astype(np.float32)},
    }


def abstract(values: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), values)


def assert_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (
            a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        )


def test_a_chunk_is_a_file_of_one_slice(tmp_path: Path) -> None:
    values = tree()
    records = save_tree(tmp_path / "x", values, CHUNKS)
    leaf = open_leaf(tmp_path / "x", "params/moe/experts_EPFD")
    expected = values["params"]["moe"]["experts_EPFD"]
    assert leaf.shape == expected.shape and leaf.chunk == (1, 1, 1, 6, 16) and leaf.dtype == expected.dtype
    assert leaf.file((1, 2, 0)).read_bytes() == expected[1, 2, 0].tobytes()
    assert leaf[1, 3, 1].tobytes() == expected[1, 3, 1].tobytes()
    assert len(records) == 16 + 1 + 1
    assert all((tmp_path / "x" / name).stat().st_size == record["size"] for name, record in records.items())


def test_plain_orbax_opens_it(tmp_path: Path) -> None:
    values = tree()
    save_tree(tmp_path / "x", values, CHUNKS)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), values)
    assert_equal(ocp.load(tmp_path / "x", targets), values)
    shapes = ocp.metadata(tmp_path / "x").metadata
    assert shapes["params"]["moe"]["experts_EPFD"].shape == (2, 4, 2, 6, 16)
    with pytest.warns(UserWarning, match="Sharding info not provided"):
        assert_equal(ocp.load(tmp_path / "x"), values)


@pytest.mark.parametrize("axis", [1, 3, 4])
def test_restores_sharded_over_eight_devices(tmp_path: Path, axis: int) -> None:
    values = {"x": RNG.normal(size=(2, 8, 2, 8, 16)).astype(np.float32)}
    save_tree(tmp_path / "x", values, {"x": (1, 1, 1, 8, 16)})
    mesh = jax.make_mesh((8,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(*["m" if i == axis else None for i in range(5)])
    sharding = jax.sharding.NamedSharding(mesh, spec)
    found = load_tree(
        tmp_path / "x", {"x": jax.ShapeDtypeStruct(values["x"].shape, jnp.float32, sharding=sharding)}
    )
    assert found["x"].sharding == sharding and len(found["x"].addressable_shards) == 8
    assert_equal(found, values)


def test_sharded_arrays_are_saved(tmp_path: Path) -> None:
    mesh = jax.make_mesh((8,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "m"))
    values = {"x": jax.device_put(RNG.normal(size=(3, 16)).astype(np.float32), sharding)}
    save_tree(tmp_path / "x", values, {"x": (1, 16)})
    assert_equal(load_tree(tmp_path / "x", abstract(values)), values)


def test_an_optimizer_state_comes_back_with_its_structure(tmp_path: Path) -> None:
    params = jax.tree.map(jnp.asarray, tree()["params"])
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-3, 10)))
    state = jax.tree.map(lambda leaf: leaf + 3, tx.init(params))
    save_tree(tmp_path / "x", state)
    assert_equal(load_tree(tmp_path / "x", jax.eval_shape(tx.init, params)), state)


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "int32", "uint32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
)
def test_dtypes_come_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    kind = np.dtype(dtype)
    raw = RNG.integers(0, 2 if dtype == "bool" else 127, 24 * kind.itemsize, dtype=np.uint8)
    values = {"x": raw.view(kind).reshape(4, 6), "scalar": raw[: kind.itemsize].view(kind).reshape(())}
    save_tree(tmp_path / "x", values, {"x": (1, 6)})
    assert_equal(load_tree(tmp_path / "x", abstract(values)), values)


def test_large_leaves_without_a_chunk_are_split(tmp_path: Path) -> None:
    values = {"x": np.zeros((5, 2, 4 << 20), np.float32)}
    save_tree(tmp_path / "x", values)
    assert open_leaf(tmp_path / "x", "x").chunk == (1, 2, 4 << 20)


def test_a_cast_while_loading(tmp_path: Path) -> None:
    values = tree()
    save_tree(tmp_path / "x", values, CHUNKS)
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), values)
    assert_equal(
        load_tree(tmp_path / "x", wanted), jax.tree.map(lambda leaf: leaf.astype(np.float32), values)
    )


def test_a_lost_chunk_is_an_error_not_zeros(tmp_path: Path) -> None:
    values = tree()
    save_tree(tmp_path / "x", values, CHUNKS)
    leaf = open_leaf(tmp_path / "x", "params/moe/experts_EPFD")
    leaf.file((1, 2, 0)).unlink()
    with pytest.raises(DataError, match=r"c\.1\.2\.0\.0\.0: no such file"):
        leaf[1, 2, 0]
    with pytest.raises(DataError, match=r"1 chunk\(s\) missing, such as .*c\.1\.2\.0\.0\.0"):
        load_tree(tmp_path / "x", abstract(values))


def test_other_shapes_and_leaves_are_refused(tmp_path: Path) -> None:
    values = tree()
    save_tree(tmp_path / "x", values, CHUNKS)
    wanted = abstract(values)
    wanted["params"]["norm_D"] = jax.ShapeDtypeStruct((17,), jnp.float32)
    with pytest.raises(DataError, match=r"params/norm_D: shape \[16\] stored, \[17\] expected"):
        load_tree(tmp_path / "x", wanted)
    wanted = abstract(values)
    del wanted["router"]["bias_E"]
    with pytest.raises(DataError, match=r"router\.bias_E: stored, but not expected"):
        load_tree(tmp_path / "x", wanted)
    wanted = abstract(values) | {"more": jax.ShapeDtypeStruct((1,), jnp.float32)}
    with pytest.raises(DataError, match="more"):
        load_tree(tmp_path / "x", wanted)


def test_paths_are_those_of_orbax() -> None:
    state = optax.adam(1e-3).init({"a": {"b": jnp.zeros(2)}})
    assert list(tree_paths(state)) == ["0/count", "0/mu/a/b", "0/nu/a/b"]
