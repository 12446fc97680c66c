"""A snapshot is a real copy, holds every chunk once, and what it writes does not depend on how leaves are cut."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.checkpoint import Background, load_tree, save_tree, snapshot_checkpoint, store, validate_step
from dsv3_jax.checkpoint import snapshot as snapshots
from dsv3_jax.checkpoint.snapshot import take_snapshot
from tests.golden import cases

MESH = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
RNG = np.random.default_rng(0)


def cut(value: np.ndarray, *spec: Any) -> jax.Array:
    return jax.device_put(value, NamedSharding(MESH, PartitionSpec(*spec)))


@pytest.mark.parametrize(
    "spec",
    [(), (None, "b", None, "a"), (None, None, None, ("a", "b")), ("a", "b"), (None, ("a", "b"), None, None)],
    ids=str,
)
def test_chunks_are_assembled_from_any_cut(tmp_path: Path, spec: tuple[Any, ...]) -> None:
    value = RNG.normal(size=(2, 8, 6, 16)).astype(np.float32)
    records = save_tree(tmp_path / "x", {"x": cut(value, *spec)}, {"x": (1, 1, 6, 16)})
    assert len(records) == 16
    leaf = store.open_leaf(tmp_path / "x", "x")
    for index in np.ndindex(2, 8):
        assert leaf[index].tobytes() == value[index].tobytes()


def test_a_step_that_overwrites_the_state_does_not_reach_the_snapshot() -> None:
    value = RNG.normal(size=(8, 16)).astype(np.float32)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    for spec in ((), ("a", "b")):
        array = cut(value, *spec)
        kept = take_snapshot({"x": array}, {"x": (4, 16)}, copy=True)["x"]
        step(array).block_until_ready()
        assert array.is_deleted()
        assert np.concatenate([kept.take((0, 0)), kept.take((1, 0))]).tobytes() == value.tobytes()
    # What makes the copy necessary: on the CPU a host array is the device's own memory.
    array = cut(value)
    view = take_snapshot({"x": array}, {"x": (8, 16)}, copy=False)["x"].take((0, 0))
    assert np.shares_memory(view, np.asarray(array.addressable_shards[0].data))


@pytest.mark.parametrize("limit", [1, 1 << 30], ids=["slabs of one row", "one slab"])
@pytest.mark.parametrize(
    ("chunk", "spec"),
    [
        ((1, 1, 6, 16), (None, "b", None, "a")),  # experts on b, D cut by a: a moves to the experts
        ((1, 8, 6, 16), (None, None, None, ("a", "b"))),  # a dense matrix: gathered
        ((4, 8, 6, 16), (None, None, "a", "b")),  # one chunk larger than a slab
        ((1, 2, 6, 16), ("a", None, None, "b")),  # rows are cut already
    ],
    ids=str,
)
def test_slabs_cut_between_chunks_hold_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, limit: int, chunk: tuple[int, ...], spec: tuple[Any, ...]
) -> None:
    """What several processes do when none holds a whole chunk, with one process that holds all."""
    monkeypatch.setattr(snapshots, "SLAB_BYTES", limit)
    value = RNG.normal(size=(4, 8, 6, 16)).astype(np.float32)
    leaf = cut(value, *spec)
    kept = snapshots.LeafSnapshot(leaf.shape, np.dtype("float32"), chunk)
    rows, partition = snapshots._slab(kept, leaf.sharding)
    shard = NamedSharding(MESH, partition).shard_shape((rows, *leaf.shape[1:]))
    assert all(
        s % c == 0 or (c % s == 0 and s in (rows, size))
        for s, c, size in zip(shard, chunk, leaf.shape, strict=True)
    )
    assert rows == (4 if limit > 1 or spec[0] else 1)
    snapshots._add_resharded(kept, leaf, *snapshots._cut_program(kept, leaf), iter(range(1000)))
    for index in np.ndindex(*(s // c for s, c in zip(leaf.shape, chunk, strict=True))):
        region = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunk, strict=True))
        assert kept.take(index).tobytes() == value[region].tobytes()
    assert kept.parts == {}


MESHES = {1: [(1, 1), (1, 1)], 2: [(2, 1), (1, 2)], 4: [(2, 2), (1, 4)], 8: [(2, 4), (8, 1)]}


def test_a_tree_saved_on_any_mesh_comes_back_on_any_other(tmp_path: Path) -> None:
    """{1, 2, 4, 8 devices} x two meshes, each with each: 64 pairs, equal to the bit."""
    values = {
        "experts_LEFD": RNG.normal(size=(2, 8, 4, 16)).astype(np.float32),
        "q_LHD": RNG.normal(size=(2, 8, 16)).astype(np.float32),
        "norm_LD": RNG.normal(size=(2, 16)).astype(np.float32),
        "count": np.int32(7),
    }
    chunks = {"experts_LEFD": (1, 1, 4, 16), "q_LHD": (1, 8, 16), "norm_LD": (1, 16)}
    specs = {
        "experts_LEFD": PartitionSpec(None, "expert", None, "fsdp"),
        "q_LHD": PartitionSpec(None, None, ("fsdp", "expert")),
        "norm_LD": PartitionSpec(),
        "count": PartitionSpec(),
    }

    def shardings(shape: tuple[int, int]) -> dict[str, NamedSharding]:
        devices = jax.devices()[: shape[0] * shape[1]]
        types = (jax.sharding.AxisType.Auto,) * 2
        mesh = jax.make_mesh(shape, ("fsdp", "expert"), axis_types=types, devices=devices)
        return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}

    meshes = [shape for pair in MESHES.values() for shape in pair]
    for number, shape in enumerate(meshes):
        where = shardings(shape)
        placed = {name: jax.device_put(value, where[name]) for name, value in values.items()}
        save_tree(tmp_path / str(number), placed, chunks)
        for other in meshes:
            target = shardings(other)
            wanted = {
                name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=target[name])
                for name, value in values.items()
            }
            for name, leaf in load_tree(tmp_path / str(number), wanted).items():
                assert leaf.sharding == target[name]
                assert np.asarray(leaf).tobytes() == values[name].tobytes(), (shape, other, name)


def test_each_chunk_is_read_once_for_all_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv3_jax.checkpoint import placement

    save_tree(tmp_path / "x", {"x": RNG.normal(size=(4, 8, 16)).astype(np.float32)}, {"x": (1, 8, 16)})
    read: list[str] = []
    real = placement.read_array
    monkeypatch.setattr(
        placement, "read_array", lambda file, *rest: read.append(file.name) or real(file, *rest)
    )
    sharding = NamedSharding(MESH, PartitionSpec("a", None, "b"))
    load_tree(tmp_path / "x", {"x": jax.ShapeDtypeStruct((4, 8, 16), np.float32, sharding=sharding)})
    assert sorted(read) == [f"c.{i}.0.0" for i in range(4)]


def test_a_failed_job_is_told_once_and_before_the_next() -> None:
    jobs, release = Background(), threading.Event()
    done: list[int] = []

    def fail() -> None:
        release.wait(60)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    jobs.start(fail, "fails")
    jobs.check()  # still running
    release.set()
    with pytest.raises(OSError, match="No space"):
        jobs.start(lambda: done.append(1), "not run")
    assert done == []
    jobs.start(lambda: done.append(2), "runs")
    jobs.wait()
    jobs.check()
    assert done == [2]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.CASES["v3"]
    cfg, variables = cases.with_mtp(case, 1), cases.variables(case, cases.with_mtp(case, 1))
    snapshot_checkpoint(cfg, variables, step=1).commit(tmp_path / "1")
    real, left = os.pwrite, iter(range(40))

    def full(fd: int, data: Any, at: int) -> int:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, at)

    monkeypatch.setattr(store.os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        snapshot_checkpoint(cfg, variables, step=2).commit(tmp_path / "2")
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert validate_step(tmp_path / "1", hashes=True) == []


def test_a_file_that_is_not_as_long_as_written_is_found_before_the_step_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases.CASES["v3"]
    cfg, variables = cases.with_mtp(case, 1), cases.variables(case, cases.with_mtp(case, 1))
    real = store.os.pwrite
    # A disk that takes the last byte and loses it.
    monkeypatch.setattr(store.os, "pwrite", lambda fd, data, at: real(fd, data[:-1], at) + 1)
    with pytest.raises(Exception, match="not as written"):
        snapshot_checkpoint(cfg, variables, step=2).commit(tmp_path / "2")
    assert list(tmp_path.iterdir()) == []
