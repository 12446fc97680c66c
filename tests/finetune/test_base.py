"""The base of a LoRA run goes straight into its shards: the same bits, and no more of it on the host than a leaf."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from convert import quantize
from dsv3_jax.checkpoint import save_checkpoint
from dsv3_jax.checkpoint.source import open_source
from dsv3_jax.config import LoraConfig
from dsv3_jax.finetune.base import FrozenBase, open_base
from dsv3_jax.hf.rules import flatten_paths
from dsv3_jax.model import abstract_variables, init_variables
from dsv3_jax.parallel.leaves import storage_shardings
from tests.convert.test_quantized import fp8_folder
from tests.training import tiny

CFG = dataclasses.replace(tiny.MODEL, hidden_size=256, moe_intermediate_size=256, num_hidden_layers=5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float32 model, its int4 copy, and a Hugging Face folder in FP8 with scales that are powers of two."""
    folder = tmp_path_factory.mktemp("bases")
    variables = jax.device_get(jax.jit(init_variables, static_argnums=0)(CFG, jax.random.key(1)))
    save_checkpoint(folder / "float32", CFG, variables)
    quantize.convert(folder / "float32", folder / "int4", "int4a", group_size=16)
    fp8_folder(folder / "fp8", scales=ml_dtypes.float8_e8m0fnu)
    return {name: folder / name for name in ("float32", "int4", "fp8")}


def opened(folder: Path, rounded: str = "none") -> FrozenBase:
    cfg = open_source(folder, abstract_variables).cfg
    return open_base(LoraConfig(rank=2, base=str(folder), base_quantize=rounded), cfg)


def placed(base: FrozenBase, mesh: jax.sharding.Mesh) -> Any:
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        base.abstract,
        storage_shardings(base.abstract, mesh),
    )


@pytest.mark.parametrize(
    ("name", "rounded", "axes"),
    [
        ("float32", "none", {"data": 2, "expert": 2, "tensor": 2}),
        ("float32", "int8", {"fsdp": 2, "expert": 4}),
        ("int4", "none", {"data": 4, "expert": 2}),
        ("fp8", "int4:16", {"fsdp": 2, "expert": 2}),
    ],
)
def test_shares_are_the_parts_of_what_one_host_would_load(
    folders: dict[str, Path], name: str, rounded: str, axes: dict[str, int]
) -> None:
    base = opened(folders[name], rounded=rounded)
    want = placed(base, tiny.mesh(**axes))
    got = base.load(want)
    whole = flatten_paths(base.source.load(formats=base.formats))
    for path, leaf in flatten_paths(got).items():
        for mine, other, shape in zip(
            *map(jax.tree.leaves, (leaf, whole[path], flatten_paths(want)[path])), strict=True
        ):
            assert mine.sharding == shape.sharding and mine.dtype == other.dtype, path
            for shard in mine.addressable_shards:
                have, should = np.asarray(shard.data), np.ascontiguousarray(other[shard.index])
                assert have.tobytes() == should.tobytes(), (path, shard.index)


def test_the_host_holds_a_part_of_a_leaf(folders: dict[str, Path]) -> None:
    """Experts over 8 devices: an eighth of a leaf, that of the one before (freed later), pieces of files."""
    base = opened(folders["float32"])
    want = placed(base, tiny.mesh(expert=8))
    base.load(want)  # imports and caches are not counted
    tracemalloc.start()
    base.load(want)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in flatten_paths(want).values())
    assert peak < largest / 2 < base.nbytes / 3, (peak, largest, base.nbytes)
