"""from_hf and to_hf: the same bytes back for every kind, everything that travels along, every --dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import from_hf, to_hf
from dsv3_jax.checkpoint import load_checkpoint, read_manifest, save_checkpoint, step_folder, validate_step
from tests.convert import folders
from tests.golden import cases

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
Tensors = dict[str, np.ndarray]


def there_and_back(
    tmp_path: Path, raw: dict[str, Any], tensors: Tensors, shards: int = 1, **flags: Any
) -> Tensors:
    folders.write(tmp_path / "hf", raw, tensors, shards)
    from_hf.convert(tmp_path / "hf", tmp_path / "native", **flags)
    to_hf.convert(tmp_path / "native", tmp_path / "back")
    return folders.read(tmp_path / "back")


@pytest.mark.parametrize(
    "name", ["v2-lite", "v2-group", "v3", "v3-tied", "v3-all-dense", "v3-wide-shared", "moonlight", "v32"]
)
def test_every_family_comes_back_byte_for_byte(tmp_path: Path, name: str) -> None:
    raw, tensors = folders.tensors_of(name, dtype=folders.BF16)
    folders.assert_same_tensors(there_and_back(tmp_path, raw, tensors, shards=3), tensors)
    assert validate_step(tmp_path / "native", hashes=True) == []


def test_mixed_dtypes_come_back_as_they_were(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3", mtp=1)
    kinds = [np.float32, folders.BF16, np.float16]
    rng = np.random.default_rng(0)
    mixed = {name: array.astype(kinds[rng.integers(3)]) for name, array in tensors.items()}
    for copy, main in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        mixed[f"model.layers.3.{copy}.weight"] = mixed[f"{main}.weight"]
    folders.assert_same_tensors(there_and_back(tmp_path, raw, mixed, shards=2), mixed)
    router = load_checkpoint(tmp_path / "native").variables["router"]["moe"]["mlp"]["router"]["bias_E"]
    assert router.dtype == np.float32


def test_every_bfloat16_pattern_survives_a_widened_stack(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3-tied")
    raw |= {"vocab_size": 2048}  # 2048 x 32 values: all 65536 patterns, NaNs with a payload included
    tensors["model.embed_tokens.weight"] = (
        np.arange(65536, dtype=np.uint16).view(folders.BF16).reshape(2048, 32)
    )
    names = [f"model.layers.{i}.self_attn.o_proj.weight" for i in (1, 2)]
    tensors[names[0]] = (
        tensors["model.embed_tokens.weight"].reshape(-1)[-1280:].reshape(32, 40).copy()
    )  # NaNs
    folders.assert_same_tensors(there_and_back(tmp_path, raw, tensors), tensors)
    assert read_manifest(tmp_path / "native").tree["params/moe/attention/o_DHU"]["dtype"] == "float32"


def test_own_and_aliased_multi_token_copies(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3", mtp=2, dtype=folders.BF16)
    name = "model.layers.4.embed_tokens.weight"
    tensors[name] = -tensors[name]
    folders.assert_same_tensors(there_and_back(tmp_path, raw, tensors), tensors)
    manifest = read_manifest(tmp_path / "native")
    assert "params/mtp/embed_VD" in manifest.tree and "params/mtp/head_VD" not in manifest.tree


def test_fp8_to_float32_is_the_exact_product(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3")
    tensors = folders.quantized(tensors, (16, 16))
    raw["quantization_config"] = FP8
    found = there_and_back(tmp_path, raw, tensors, dtype="float32")
    expected = folders.dequantized(tensors, (16, 16), np.float32)
    folders.assert_same_tensors(found, {name: array.astype(np.float32) for name, array in expected.items()})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_cast_is_what_was_asked_and_spares_the_router_bias(tmp_path: Path, dtype: Any) -> None:
    raw, tensors = folders.tensors_of("v3", dtype=np.float16)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[bias] = tensors[bias].astype(folders.BF16)
    target = {"bfloat16": folders.BF16, "float32": np.float32}[dtype]
    cast = {n: a if n.endswith("correction_bias") else a.astype(target) for n, a in tensors.items()}
    folders.assert_same_tensors(there_and_back(tmp_path, raw, tensors, dtype=dtype), cast)
    from_hf.convert(tmp_path / "hf", tmp_path / "kept")
    to_hf.convert(tmp_path / "kept", tmp_path / "cast", dtype=dtype)
    folders.assert_same_tensors(folders.read(tmp_path / "cast"), cast)
    assert json.loads((tmp_path / "cast" / "config.json").read_text())["torch_dtype"] == dtype


def test_what_travels_along(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3-tied")
    raw["auto_map"] = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    folder = folders.write(tmp_path / "hf", {**raw, "num_nextn_predict_layers": 1}, tensors)
    files = {
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b'{"a": "\xc3\xa9"}',
        "generation_config.json": b"{}",
    }
    files |= {
        "README.md": b"hello",
        "configuration_deepseek.py": b"raise SystemExit",
        "tiktoken.model": b"\0\1",
    }
    for name, content in {**files, "pytorch_model.bin": b"x", ".gitattributes": b"x"}.items():
        (folder / name).write_bytes(content)
    from_hf.convert(folder, tmp_path / "native")
    assert sorted(p.name for p in (tmp_path / "native" / "tokenizer").iterdir()) == [
        "tiktoken.model", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    to_hf.convert(tmp_path / "native", tmp_path / "back")
    found = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()}
    assert set(found) == {*files, "config.json", "model.safetensors"}
    assert all(found[name] == content for name, content in files.items())
    config = json.loads(found["config.json"])
    assert config["own_key"] == raw["own_key"] and config["auto_map"] == raw["auto_map"]
    assert config["num_nextn_predict_layers"] == 1  # announced without tensors: the key travels too


def test_export_of_a_training_run_reads_weights_only(tmp_path: Path) -> None:
    case = cases.CASES["v3"]
    cfg = cases.with_mtp(case, 1)
    variables = cases.variables(case, cfg)
    for step in (1, 2):
        save_checkpoint(
            step_folder(tmp_path / "run", step),
            cfg,
            variables,
            step=step,
            optimizer={"mu": np.zeros(3, np.float32)},
        )
    (step_folder(tmp_path / "run", 2) / "manifest.json").unlink()
    to_hf.convert(tmp_path / "run", tmp_path / "out", max_shard_size="20KB")
    _, expected = folders.tensors_of("v3", mtp=1)
    folders.assert_same_tensors(folders.read(tmp_path / "out"), expected)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


def test_a_hugging_face_folder_can_be_recast(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3-tied")
    folders.write(tmp_path / "hf", raw, tensors)
    to_hf.convert(tmp_path / "hf", tmp_path / "out", dtype="bfloat16", max_shard_size="20KB")
    expected = {n: a if n.endswith("correction_bias") else a.astype(folders.BF16) for n, a in tensors.items()}
    folders.assert_same_tensors(folders.read(tmp_path / "out"), expected)
    to_hf.convert(tmp_path / "out", tmp_path / "again")
    folders.assert_same_tensors(folders.read(tmp_path / "again"), expected)
