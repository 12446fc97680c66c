"""One interface to native checkpoints, runs and Hugging Face folders: the same weights from each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from convert import from_hf, quantize
from dsv3_jax.checkpoint import open_leaf, read_manifest, save_checkpoint, step_folder
from dsv3_jax.checkpoint.source import open_source
from dsv3_jax.errors import ConfigError, DataError
from tests.convert import folders
from tests.convert.folders import abstract_variables
from tests.golden import cases


def assert_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), found, expected
    )


@pytest.mark.parametrize("name", ["v3", "v3-tied", "v2-lite", "v32", "v3-all-dense"])
def test_a_hugging_face_folder_is_read_directly(tmp_path: Path, name: str) -> None:
    raw, tensors = folders.tensors_of(name)
    source = open_source(folders.write(tmp_path / "f", raw, tensors, shards=2), abstract_variables)
    assert source.kind == "hf" and source.cfg == cases.CASES[name].config and source.hf_config == raw
    assert_equal(source.load(), cases.variables(cases.CASES[name]))


def test_the_three_kinds_give_the_same(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3", mtp=1, dtype=folders.BF16)
    hf = folders.write(tmp_path / "hf", raw, tensors)
    (hf / "tokenizer.json").write_text("{}")
    (hf / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    from_hf.convert(hf, tmp_path / "native")
    one = open_source(hf, abstract_variables)
    save_checkpoint(
        step_folder(tmp_path / "run", 5), one.cfg, one.load(), step=5, hf_dir=tmp_path / "native" / "hf"
    )
    # Training saves the chunks that conversion writes, so that an export of a run needs as little memory.
    step = step_folder(tmp_path / "run", 5)
    for path in read_manifest(step).tree:
        assert (
            open_leaf(step / "weights", path).chunk == open_leaf(tmp_path / "native" / "weights", path).chunk
        )
    (tmp_path / "run" / "tokenizer").mkdir()
    for folder in (tmp_path / "native", tmp_path / "run"):
        other = open_source(folder, abstract_variables)
        assert (other.kind, other.cfg, other.hf_config) == ("native", one.cfg, raw)
        assert other.tokenizer_dir is not None and other.generation_config == {"eos_token_id": [1, 5]}
        assert other.aliases == one.aliases
        assert_equal(other.load(), one.load())
    assert open_source(tmp_path / "run", abstract_variables).step == 5


def test_dtypes_of_a_load(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3", dtype=np.float16)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[bias] = tensors[bias].astype(folders.BF16)
    source = open_source(folders.write(tmp_path / "f", raw, tensors), abstract_variables)
    for asked, stored in (
        (None, np.float16),
        ("bfloat16", folders.BF16),
        ("float32", np.float32),
        (np.float32, np.float32),
    ):
        found = source.load(asked)
        assert {leaf.dtype for leaf in jax.tree.leaves(found["params"])} == {np.dtype(stored)}
        router = found["router"]["moe"]["mlp"]["router"]["bias_E"]
        assert router.dtype == np.float32
        np.testing.assert_array_equal(router[0], tensors[bias].astype(np.float32))


def test_fp8_is_dequantised(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3")
    tensors = folders.quantized(tensors, (16, 16))
    raw["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    source = open_source(folders.write(tmp_path / "f", raw, tensors, shards=3), abstract_variables)
    plain = folders.dequantized(tensors, (16, 16))
    assert_equal(
        source.load(),
        open_source(
            folders.write(tmp_path / "g", {**raw, "quantization_config": None}, plain), abstract_variables
        ).load(),
    )
    exact = folders.dequantized(tensors, (16, 16), np.float32)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert source.tensors[name].read("F32").tobytes() == exact[name].tobytes()


def test_a_run_falls_back_to_its_newest_good_step(tmp_path: Path) -> None:
    case = cases.CASES["v3-tied"]
    for step in (1, 2):
        save_checkpoint(step_folder(tmp_path, step), case.config, cases.variables(case), step=step)
    (step_folder(tmp_path, 2) / "manifest.json").unlink()
    source = open_source(tmp_path, abstract_variables)
    assert source.step == 1 and any("step 2 is not used" in note for note in source.notes)
    (step_folder(tmp_path, 1) / "model.yaml").unlink()
    with pytest.raises(DataError, match="no valid checkpoint"):
        open_source(tmp_path, abstract_variables)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        open_source(tmp_path / "x", abstract_variables)
    with pytest.raises(ConfigError, match=r"neither manifest\.json"):
        open_source(tmp_path, abstract_variables)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(DataError, match="no valid checkpoint"):
        open_source(tmp_path, abstract_variables)


def test_an_unknown_architecture_is_a_config_error(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3-tied")
    folder = folders.write(tmp_path / "f", {**raw, "model_type": "llama"}, tensors)
    with pytest.raises(ConfigError, match=r"config\.json.*llama"):
        open_source(folder, abstract_variables)


def test_leaves_that_do_not_fit_the_model(tmp_path: Path) -> None:
    case = cases.CASES["v3-tied"]
    save_checkpoint(tmp_path / "x", case.config, cases.variables(case))
    file = tmp_path / "x" / "manifest.json"
    document = json.loads(file.read_text())
    document["tree"]["params/spare"] = document["tree"].pop("params/embed_VD")
    del document["checksum"]  # a manifest that says so itself, not a damaged one
    file.write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"missing \['params/embed_VD'\], extra \['params/spare'\]"):
        open_source(tmp_path / "x", abstract_variables)


@pytest.mark.parametrize("method", ["", "int8", "fp8"])
@pytest.mark.parametrize("asked", [None, "bfloat16"])
def test_a_flipped_bit_is_not_decoded_with(tmp_path: Path, method: str, asked: str | None) -> None:
    case = cases.CASES["v3"]
    folder = tmp_path / "plain"
    save_checkpoint(folder, case.config, cases.variables(case))
    if method:
        quantize.convert(folder, tmp_path / "coded", method=method)
        folder = tmp_path / "coded"
    weights = folder / "weights" / "state"
    for name in (
        ("params.moe.attention.o_DHU.codes/", "params.moe.attention.o_DHU.scales/")
        if method
        else ("params.embed_VD/",)
    ):
        file = min(weights.glob(f"{name}c.*"))
        kept = file.read_bytes()
        file.write_bytes(bytes([kept[0] ^ 1]) + kept[1:])
        source = open_source(folder, abstract_variables)
        for formats in {}, source.formats:
            with pytest.raises(DataError, match=f"{file}: SHA-256 differs"):
                source.load(asked, formats=formats)
        file.write_bytes(kept)
    open_source(folder, abstract_variables).load(asked)


def test_a_changed_config_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    case = cases.CASES["v3"]
    save_checkpoint(tmp_path / "x", case.config, cases.variables(case))
    file = tmp_path / "x" / "model.yaml"
    file.write_bytes(file.read_bytes().replace(b"rms_norm_eps: 1", b"rms_norm_eps: 2"))
    with pytest.raises(DataError, match=r"model.yaml: SHA-256 differs"):
        open_source(tmp_path / "x", abstract_variables)
