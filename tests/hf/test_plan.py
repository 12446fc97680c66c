"""One report of everything that does not fit a config, before any weight is read; copies become aliases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.hf.config import load_hf_config
from dsv3_jax.hf.plan import HFPlan, choose_dtypes, plan_folder
from dsv3_jax.hf.safetensors import SafetensorsFolder
from tests.convert import folders

Tensors = dict[str, np.ndarray]
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}


def plan(folder: Path) -> HFPlan:
    cfg, raw = load_hf_config(folder)
    return plan_folder(SafetensorsFolder(folder), cfg, raw, folders.abstract_variables)


def report(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        plan(folder)
    return str(caught.value)


def test_one_report_has_every_problem(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3")
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.experts.12.up_proj.weight"] = np.zeros((28, 32), np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(np.int64)
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = np.ones((1, 1), np.float32)
    text = report(folders.write(tmp_path / "f", raw, tensors, shards=2))
    assert "missing: model.norm.weight (shape [32])" in text
    assert "extra: model.layers.1.mlp.experts.12.up_proj.weight" in text
    assert "misshaped: lm_head.weight: shape [95, 32], [96, 32] expected" in text
    assert "dtype: model.embed_tokens.weight: dtype I64" in text
    assert "scale: model.layers.0.mlp.up_proj.weight_scale_inv: its weight is F32" in text


def test_a_long_report_is_cut_and_counted(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3")
    kept = {name: array for name, array in tensors.items() if ".experts." not in name}
    text = report(folders.write(tmp_path / "f", raw, kept))
    assert "missing: ... and 52 more (72 in all)" in text and text.count("missing: model") == 20


@pytest.mark.parametrize("case", ["v2-lite", "v2-group", "v3", "v3-tied", "v3-all-dense", "moonlight", "v32"])
def test_every_family_is_accounted_for(tmp_path: Path, case: str) -> None:
    raw, tensors = folders.tensors_of(case)
    found = plan(folders.write(tmp_path / "f", raw, tensors, shards=3))
    assert set(found.tensors) == set(tensors) and found.aliases == {} and found.notes == []


def test_multi_token_copies_are_aliases(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3", mtp=2)
    found = plan(folders.write(tmp_path / "f", raw, tensors))
    assert found.aliases == {
        "model.layers.3.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.4.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.3.shared_head.head.weight": "lm_head.weight",
        "model.layers.4.shared_head.head.weight": "lm_head.weight",
    }
    assert not found.cfg.mtp_own_embedding and not found.cfg.mtp_own_head
    assert "embed_VD" not in found.abstract["params"]["mtp"]


def test_different_copies_are_leaves_of_their_own(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3", mtp=2)
    name = "model.layers.4.shared_head.head.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][95, 31] += 1
    found = plan(folders.write(tmp_path / "f", raw, tensors))
    assert found.cfg.mtp_own_head and not found.cfg.mtp_own_embedding
    assert found.abstract["params"]["mtp"]["head_VD"].shape == (2, 96, 32)
    assert set(found.aliases) == {"model.layers.3.embed_tokens.weight", "model.layers.4.embed_tokens.weight"}


def test_a_module_without_any_copies_shares_the_main_ones(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3", mtp=1)
    del tensors["model.layers.3.embed_tokens.weight"], tensors["model.layers.3.shared_head.head.weight"]
    found = plan(folders.write(tmp_path / "f", raw, tensors))
    assert found.aliases == {} and found.cfg.num_nextn_predict_layers == 1


def test_announced_but_absent_multi_token_layers_are_left_out(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3")
    found = plan(folders.write(tmp_path / "f", {**raw, "num_nextn_predict_layers": 1}, tensors))
    assert found.cfg.num_nextn_predict_layers == 0 and "mtp" not in found.abstract["params"]
    assert len(found.notes) == 1 and "loaded without" in found.notes[0]


@pytest.mark.parametrize(
    "name", ["enorm.weight", "embed_tokens.weight", "shared_head.head.weight", "mlp.experts.3.up_proj.weight"]
)
def test_part_of_the_multi_token_tensors_is_an_error(tmp_path: Path, name: str) -> None:
    raw, tensors = folders.tensors_of("v3", mtp=1)
    del tensors[f"model.layers.3.{name}"]
    text = report(folders.write(tmp_path / "f", raw, tensors))
    assert f"missing: model.layers.3.{name}" in text and "all or none" in text


def test_one_multi_token_tensor_alone_is_an_error(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3", mtp=1)
    kept = {
        n: a
        for n, a in tensors.items()
        if not n.startswith("model.layers.3.") or n.endswith("3.enorm.weight")
    }
    assert "all or none" in report(folders.write(tmp_path / "f", raw, kept))


def test_multi_token_tensors_that_no_config_announces_are_extra(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3", mtp=1)
    assert "extra: model.layers.3.enorm" in report(
        folders.write(tmp_path / "f", {**raw, "num_nextn_predict_layers": 0}, tensors)
    )


def test_a_head_beside_a_tied_embedding(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3-tied", mtp=1)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    found = plan(folders.write(tmp_path / "same", raw, tensors))
    assert found.aliases["lm_head.weight"] == "model.embed_tokens.weight" and found.cfg.tie_word_embeddings
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    assert "lm_head.weight differs" in report(folders.write(tmp_path / "other", raw, tensors))


def test_rotary_buffers_are_ignored_and_said(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    found = plan(folders.write(tmp_path / "f", raw, tensors))
    assert (
        found.ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq",) and "ignored 1" in found.notes[0]
    )


def fp8_folder(tmp_path: Path, change: Any = None) -> Path:
    raw, tensors = folders.tensors_of("v3")
    tensors = folders.quantized(tensors, (16, 16))
    raw = {**raw, "quantization_config": FP8}
    if change is not None:
        change(raw, tensors)
    return folders.write(tmp_path / "f", raw, tensors, shards=3)


NAME = "model.layers.2.self_attn.kv_a_proj_with_mqa.weight"  # 28 rows: the last block is partial


def test_scales_in_other_files_are_found(tmp_path: Path) -> None:
    folder = fp8_folder(tmp_path)
    found = plan(folder)
    tensor = found.tensors[NAME]
    assert tensor.scale is not None and tensor.scale.shape == (2, 2)
    assert any(t.scale is not None and t.scale.file != t.file for t in found.tensors.values())
    kept, cast = (choose_dtypes(found.entries, found.tensors, dtype) for dtype in ("keep", "BF16"))
    assert kept.tensors[NAME] == "F8_E4M3" and kept.formats["params/moe/attention/kv_a_JD"] == "fp8:16x16"
    assert cast.tensors[NAME] == "BF16" and cast.formats == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw, t: t.pop(f"{NAME}_scale_inv"), f"{NAME}: F8_E4M3 without its scale"),
        (lambda raw, t: t.pop(NAME), f"{NAME}_scale_inv: no weight"),
        (
            lambda raw, t: t.update({f"{NAME}_scale_inv": np.ones((2, 3), np.float32)}),
            r"shape \[2, 3\].*\[2, 2\] expected",
        ),
        (lambda raw, t: t.update({f"{NAME}_scale_inv": np.ones((2, 2), np.int64)}), "dtype I64"),
        (lambda raw, t: raw.pop("quantization_config"), "no quantization_config"),
    ],
)
def test_unpaired_and_misshaped_scales(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        plan(fp8_folder(tmp_path, change))


def test_a_quantization_without_block_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weight_block_size"):
        plan(
            fp8_folder(tmp_path, lambda raw, t: raw["quantization_config"].pop("weight_block_size") and None)
        )


def test_a_mixed_stack_is_widened_and_remembers(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name] = tensors[name].astype(folders.BF16)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[bias] = tensors[bias].astype(folders.BF16)
    found = plan(folders.write(tmp_path / "f", raw, tensors))
    dtypes = choose_dtypes(found.entries, found.tensors, "keep")
    assert dtypes.leaves["params/moe/mlp/experts/gate_up_EPFD"] == "F32" and dtypes.tensors[name] == "BF16"
    assert dtypes.leaves["router/moe/mlp/router/bias_E"] == "F32" and dtypes.tensors[bias] == "BF16"
    assert any("gate_up_EPFD" in note for note in dtypes.notes)
    cast = choose_dtypes(found.entries, found.tensors, "BF16")
    assert (
        set(cast.leaves.values()) == {"BF16", "F32"} and cast.leaves["router/moe/mlp/router/bias_E"] == "F32"
    )
    assert cast.tensors[bias] == "BF16" and cast.tensors[bias.replace("s.1.", "s.2.")] == "F32"


def test_a_router_bias_is_float32_however_it_is_stored(tmp_path: Path) -> None:
    raw, tensors = folders.tensors_of("v3", dtype=folders.BF16)
    tensors = {name: array.astype(folders.BF16) for name, array in tensors.items()}
    found = plan(folders.write(tmp_path / "f", raw, tensors))
    dtypes = choose_dtypes(found.entries, found.tensors, "keep")
    assert dtypes.leaves["router/moe/mlp/router/bias_E"] == "F32" and set(dtypes.tensors.values()) == {"BF16"}
