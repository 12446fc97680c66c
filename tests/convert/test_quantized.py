"""Quantised weights on disk: FP8 folders come back byte for byte, and `fp8` writes what others read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from convert import from_hf, to_hf, verify
from dsv3_jax.checkpoint import validate_step
from dsv3_jax.checkpoint.manifest import read_manifest
from dsv3_jax.checkpoint.source import open_source
from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.hf.rules import flatten_paths
from dsv3_jax.quantization.choose import choose_formats
from dsv3_jax.quantization.formats import parse_format
from dsv3_jax.quantization.leaf import Quantized
from tests.convert import folders

BLOCK = (16, 16)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK), "own": [1]}


def fp8_folder(
    folder: Path, *, mtp: int = 1, shards: int = 4, scales: Any = np.float32
) -> dict[str, np.ndarray]:
    raw, tensors = folders.tensors_of("v3", mtp=mtp)
    tensors = folders.quantized(tensors, BLOCK)
    if scales is not np.float32:
        tensors = {n: a.astype(scales) if n.endswith("_scale_inv") else a for n, a in tensors.items()}
    folders.write(folder, {**raw, "quantization_config": FP8}, tensors, shards)
    return tensors


@pytest.mark.parametrize("scales", [np.float32, ml_dtypes.float8_e8m0fnu, folders.BF16])
def test_an_fp8_folder_comes_back_byte_for_byte(tmp_path: Path, scales: Any) -> None:
    """Codes and scales, scales in other files, partial blocks, powers of two as E8M0; and config.json's entry."""
    tensors = fp8_folder(tmp_path / "hf", scales=scales)
    from_hf.convert(tmp_path / "hf", tmp_path / "native")
    assert validate_step(tmp_path / "native", hashes=True) == []
    to_hf.convert(tmp_path / "native", tmp_path / "back", max_shard_size="60KB")
    folders.assert_same_tensors(folders.read(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"] == FP8
    hf, native = (open_source(tmp_path / name, folders.abstract_variables) for name in ("hf", "native"))
    assert verify.differences(hf, native) == []
    assert native.formats["params/moe/mlp/experts/gate_up_EPFD"] == "fp8:16x16"


@pytest.mark.parametrize("kind", ["hf", "native"])
def test_fp8_activations_leave_the_stored_codes_alone(tmp_path: Path, kind: str) -> None:
    """`--quantize fp8+act8` on a released folder: no byte is rounded again, blocks stay the folder's own."""
    fp8_folder(tmp_path / "hf", scales=ml_dtypes.float8_e8m0fnu, mtp=0)
    from_hf.convert(tmp_path / "hf", tmp_path / "native")
    source = open_source(tmp_path / kind, folders.abstract_variables)
    columns = {entry.path: entry.hf_shape[-1] for entry in source.entries}
    formats, _ = choose_formats(columns, source.formats, parse_format("fp8+act8"))
    assert {formats[path] for path in source.formats} == {"fp8:16x16+act8"}
    stored = flatten_paths(source.load(formats=source.formats))
    for path, leaf in flatten_paths(source.load(formats=formats)).items():
        if path in source.formats:
            assert leaf.coding.activations == "fp8"
            np.testing.assert_array_equal(leaf.codes, stored[path].codes)
            np.testing.assert_array_equal(leaf.scales, stored[path].scales)


def test_values_of_a_kept_folder(tmp_path: Path) -> None:
    """Dequantised at export and at load: the formula, element by element."""
    tensors = fp8_folder(tmp_path / "hf")
    from_hf.convert(tmp_path / "hf", tmp_path / "native")
    for dtype, kind in (("bfloat16", folders.BF16), ("float32", np.float32)):
        to_hf.convert(tmp_path / "native", tmp_path / dtype, dtype=dtype)
        want = folders.dequantized(tensors, BLOCK, kind)
        if dtype == "float32":
            want = {name: array.astype(np.float32) for name, array in want.items()}
        folders.assert_same_tensors(folders.read(tmp_path / dtype), want)
        assert "quantization_config" not in json.loads((tmp_path / dtype / "config.json").read_text())
    loaded = {}
    for name in ("hf", "native"):
        source = open_source(tmp_path / name, folders.abstract_variables)
        loaded[name] = flatten_paths(source.load("float32"))
        kept = flatten_paths(source.load("float32", formats=source.formats))
        for path, leaf in kept.items():
            whole = np.asarray(leaf.astype(np.float32))
            assert whole.tobytes() == loaded[name][path].tobytes(), path
        assert sum(isinstance(leaf, Quantized) for leaf in kept.values()) == len(source.formats) > 10
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded["hf"], loaded["native"]))


def test_a_stack_of_two_kinds_is_widened_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, tensors = folders.tensors_of("v3")
    tensors = folders.quantized(tensors, BLOCK)
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = folders.dequantized(tensors, BLOCK)[name]
    del tensors[f"{name}_scale_inv"]
    folders.write(tmp_path / "hf", {**raw, "quantization_config": FP8}, tensors)
    from_hf.convert(tmp_path / "hf", tmp_path / "native", quiet=False)
    assert "params/moe/attention/o_DHU" in capsys.readouterr().err
    assert "params/moe/attention/o_DHU" not in read_manifest(tmp_path / "native").quantization
    to_hf.convert(tmp_path / "native", tmp_path / "back")
    found, other = folders.read(tmp_path / "back"), "model.layers.2.self_attn.o_proj.weight"
    want = {n: a for n, a in tensors.items() if other not in n}
    want[other] = folders.dequantized(tensors, BLOCK)[other]
    folders.assert_same_tensors(found, want)


@pytest.mark.parametrize("kind", [np.float32, folders.BF16])
def test_fp8_export_of_a_float_model(tmp_path: Path, kind: Any) -> None:
    """Released layout: 128 x 128 blocks, max |w| / 448, which weights; reading it back gives the rounded values."""
    raw, tensors = folders.tensors_of("v3", mtp=1, dtype=kind)
    folders.write(tmp_path / "hf", raw, tensors, shards=2)
    from_hf.convert(tmp_path / "hf", tmp_path / "native")
    to_hf.convert(tmp_path / "native", tmp_path / "fp8", dtype="fp8")
    found = folders.read(tmp_path / "fp8")
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    }  # fmt: skip
    coded = {name for name, array in found.items() if array.dtype == folders.F8}
    assert coded == {n for n, a in tensors.items() if a.ndim == 2 and "_proj" in n and "eh_proj" not in n}
    for name, array in tensors.items():
        if name not in coded:
            assert found[name].tobytes() == array.tobytes()
            continue
        scale, w = found[f"{name}_scale_inv"], array.astype(np.float32)
        assert scale.shape == (1, 1) and scale[0, 0] == np.abs(w).max() / np.float32(448)
        np.testing.assert_array_equal(
            found[name].view(np.uint8), (w / scale).astype(folders.F8).view(np.uint8), err_msg=name
        )
    from_hf.convert(tmp_path / "fp8", tmp_path / "again")
    to_hf.convert(tmp_path / "again", tmp_path / "back")
    folders.assert_same_tensors(folders.read(tmp_path / "back"), found)


def test_a_mixed_source_to_fp8_keeps_codes_and_rounds_the_rest(tmp_path: Path) -> None:
    tensors = fp8_folder(tmp_path / "hf", mtp=0)
    from_hf.convert(tmp_path / "hf", tmp_path / "native")
    to_hf.convert(tmp_path / "native", tmp_path / "fp8", dtype="fp8")
    folders.assert_same_tensors(folders.read(tmp_path / "fp8"), tensors)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_damaged_scales_are_refused_and_nothing_is_left(tmp_path: Path, bad: float, dtype: Any) -> None:
    raw, tensors = folders.tensors_of("v3")
    tensors = folders.quantized(tensors, BLOCK)
    name = "model.layers.2.self_attn.kv_a_proj_with_mqa.weight_scale_inv"
    tensors[name][1, 0] = bad
    folders.write(tmp_path / "hf", {**raw, "quantization_config": FP8}, tensors)
    with pytest.raises(DataError, match=f"{name}.*scale"):
        from_hf.convert(tmp_path / "hf", tmp_path / "native", dtype=dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("bad", [0x7F, 0xFF])
@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_codes_of_nan_are_refused_in_conversion_and_in_loading(tmp_path: Path, bad: int, dtype: Any) -> None:
    """A kernel that multiplies codes as they are stored takes them for 480."""
    raw, tensors = folders.tensors_of("v3")
    tensors = folders.quantized(tensors, BLOCK)
    name = "model.layers.2.self_attn.kv_a_proj_with_mqa.weight"
    tensors[name].view(np.uint8)[-1, -1] = bad
    folders.write(tmp_path / "hf", {**raw, "quantization_config": FP8}, tensors)
    source = open_source(tmp_path / "hf", folders.abstract_variables)
    with pytest.raises(DataError, match=f"{name}.*a code is NaN"):
        source.load(formats=source.formats if dtype == "keep" else {})
    with pytest.raises(DataError, match=f"{name}.*a code is NaN"):
        from_hf.convert(tmp_path / "hf", tmp_path / "native", dtype=dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_missing_part_of_a_native_leaf_is_found(tmp_path: Path) -> None:
    fp8_folder(tmp_path / "hf", mtp=0)
    from_hf.convert(tmp_path / "hf", tmp_path / "native")
    folder = tmp_path / "native" / "weights"
    (leaf,) = folder.rglob("params.moe.attention.o_DHU.scales")
    next(leaf.glob("c.*")).unlink()
    with pytest.raises(DataError, match=r"o_DHU.scales.*missing"):
        open_source(tmp_path / "native", folders.abstract_variables)


def test_codes_without_a_hugging_face_form_are_not_kept(tmp_path: Path) -> None:
    from convert import quantize

    raw, tensors = folders.tensors_of("v3")
    folders.write(tmp_path / "hf", raw, tensors)
    quantize.convert(tmp_path / "hf", tmp_path / "q", method="int8")
    with pytest.raises(ConfigError, match=r"int8.*--dtype"):
        to_hf.convert(tmp_path / "q", tmp_path / "back")


def test_fp8_of_an_fp8_folder_of_other_blocks_names_its_own(tmp_path: Path) -> None:
    """All rounded again in blocks of 128: config.json says so. Some only: no folder can hold both."""
    from convert import quantize

    fp8_folder(tmp_path / "hf", mtp=0)
    quantize.convert(tmp_path / "hf", tmp_path / "q", method="fp8")
    to_hf.convert(tmp_path / "q", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    q, back = (open_source(tmp_path / name, folders.abstract_variables) for name in ("q", "back"))
    assert verify.differences(q, back) == []
    quantize.convert(tmp_path / "hf", tmp_path / "mixed", method="fp8", kinds=("experts",))
    with pytest.raises(ConfigError, match=r"blocks \[\(16, 16\), \(128, 128\)\]"):
        to_hf.convert(tmp_path / "mixed", tmp_path / "back-again")
