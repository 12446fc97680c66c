"""Adapters on disk: ours and PEFT's hold the same, merge adds up, decoding with one is decoding the merged model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from convert import from_peft, merge, quantize, to_peft
from dsv3_jax.checkpoint import read_manifest, save_checkpoint
from dsv3_jax.checkpoint.source import open_source
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.finetune import Lora, attach, chosen_targets, init_pairs
from dsv3_jax.finetune import merge as merged_tree
from dsv3_jax.finetune.base import fingerprint
from dsv3_jax.finetune.files import open_adapter, read_record, record_of
from dsv3_jax.hf.rules import flatten_paths
from dsv3_jax.hf.safetensors import read_header
from dsv3_jax.inference.batch import Job, run_file
from dsv3_jax.inference.load import open_model
from dsv3_jax.inference.options import Sampling
from dsv3_jax.model import abstract_variables, init_variables
from dsv3_jax.text import Tokenizer
from tests.inference import tiny

CFG = dataclasses.replace(tiny.V3, num_hidden_layers=3, num_nextn_predict_layers=1)


def pairs_of(cfg: ModelConfig, targets: tuple[str, ...], **values: Any) -> tuple[Lora, Any]:
    """A description and pairs of which b is not zero."""
    abstract = abstract_variables(cfg)
    paths = tuple(chosen_targets(flatten_paths(abstract), targets))
    lora = Lora(**{"rank": 2, "alpha": 3.0, "rslora": False, "paths": paths} | values)
    pairs = init_pairs(lora, abstract, jax.random.key(2))["params"]
    rng = np.random.default_rng(3)
    return lora, jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), pairs)


def save_adapter(
    folder: Path, base: Path, cfg: ModelConfig, lora: Lora, pairs: Any, rounded_to: str = "none"
) -> Path:
    record = record_of(lora, {"path": str(base), "sha256": fingerprint(base), "rounded_to": rounded_to})
    save_checkpoint(folder, cfg, {"params": pairs, "router": {}}, adapter=record)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float32 model, its int4 copy, and an adapter of every kind of weight."""
    folder = tmp_path_factory.mktemp("adapters")
    variables = jax.device_get(jax.jit(init_variables, static_argnums=0)(CFG, jax.random.key(1)))
    Tokenizer.bytes().save(folder / "tokenizer")
    save_checkpoint(folder / "base", CFG, variables, tokenizer_dir=folder / "tokenizer")
    quantize.convert(folder / "base", folder / "int4", "int4", group_size=16)
    lora, pairs = pairs_of(CFG, ("all-linear", "eh_proj"))
    save_adapter(folder / "adapter", folder / "base", CFG, lora, pairs)
    return {name: folder / name for name in ("base", "int4", "adapter")}


def weights(folder: Path) -> dict[str, np.ndarray]:
    return flatten_paths(open_source(folder, abstract_variables).load("float32"))


def adapted(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    """What the merged model should be, through the tree."""
    source = open_source(base, abstract_variables)
    found = open_adapter(adapter, source.cfg, source.abstract)
    tree = source.load("float32")
    params = attach(tree["params"], found.pairs["params"], found.lora)
    return jax.device_get(flatten_paths({**tree, "params": merged_tree(params)}))


@pytest.mark.parametrize("base", ["base", "int4"])
def test_merge_is_the_merged_tree(folders: dict[str, Path], tmp_path: Path, base: str) -> None:
    merge.convert(folders[base], folders["adapter"], tmp_path / "merged", "float32")
    got, want = weights(tmp_path / "merged"), adapted(folders[base], folders["adapter"])
    plain = weights(folders[base])
    assert got.keys() == want.keys()
    for path, leaf in want.items():
        np.testing.assert_allclose(got[path], leaf, rtol=0, atol=1e-6, err_msg=path)
        changed = np.abs(got[path] - plain[path]).max() > 1e-3
        assert changed == (path in open_adapter(folders["adapter"], CFG, abstract_variables(CFG)).lora.paths)


def test_merge_keeps_types_and_dequantises(folders: dict[str, Path], tmp_path: Path) -> None:
    merge.convert(folders["int4"], folders["adapter"], tmp_path / "merged")
    tree = read_manifest(tmp_path / "merged").tree
    assert tree["params/moe/mlp/experts/gate_up_EPFD"]["dtype"] == "bfloat16"
    assert tree["params/embed_VD"]["dtype"] == "float32"
    assert not any(path.endswith("/codes") for path in tree)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_files_come_back(folders: dict[str, Path], tmp_path: Path, rslora: bool) -> None:
    """All but the multi-token module; the experts' pairs come back with the rank that gate and up have together."""
    lora, pairs = pairs_of(CFG, ("all-linear",), rslora=rslora)
    ours = save_adapter(tmp_path / "ours", folders["base"], CFG, lora, pairs)
    to_peft.convert(ours, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 3.0, rslora)
    assert config["target_modules"] == [
        "down_proj", "gate_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj", "up_proj",
    ]  # fmt: skip
    infos, _ = read_header(tmp_path / "peft" / "adapter_model.safetensors")
    shapes = {name.removeprefix("base_model.model.model.layers."): info.shape for name, info in infos.items()}
    H, E, F, D = CFG.num_attention_heads, CFG.n_routed_experts, CFG.moe_intermediate_size, CFG.hidden_size
    assert shapes["2.self_attn.q_b_proj.lora_A.weight"] == (2, CFG.q_lora_rank)
    assert shapes["2.self_attn.q_b_proj.lora_B.weight"] == (
        H * (CFG.qk_nope_head_dim + CFG.qk_rope_head_dim),
        2,
    )
    assert shapes["1.mlp.experts.base_layer.lora_A.weight"] == (E * 4, D)
    assert shapes["1.mlp.experts.base_layer.lora_B.weight"] == (2 * F, E * 4)
    assert shapes["1.mlp.experts.lora_A.weight"] == (E * 2, F)
    assert not any(name.startswith("3.") for name in shapes)
    from_peft.convert(tmp_path / "peft", folders["base"], tmp_path / "back")
    got, want = adapted(folders["base"], tmp_path / "back"), adapted(folders["base"], ours)
    for path, leaf in want.items():
        if not path.startswith("params/mtp/"):
            np.testing.assert_allclose(got[path], leaf, rtol=0, atol=2e-6, err_msg=path)


def test_a_peft_folder_of_some_layers_and_of_separate_experts(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Weights without a pair get zeros; a module for each expert is read as well."""
    from tests.convert.folders import safetensors_bytes

    rng = np.random.default_rng(0)
    D, F = CFG.hidden_size, CFG.moe_intermediate_size
    name = "base_model.model.model.layers.{}.lora_{}.weight"
    tensors = {
        name.format("0.self_attn.q_a_proj", "A"): rng.normal(size=(3, D)).astype(np.float32),
        name.format("0.self_attn.q_a_proj", "B"): rng.normal(size=(CFG.q_lora_rank, 3)).astype(np.float32),
        name.format("1.mlp.experts.5.up_proj", "A"): rng.normal(size=(3, D)).astype(np.float32),
        name.format("1.mlp.experts.5.up_proj", "B"): rng.normal(size=(F, 3)).astype(np.float32),
    }
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_a_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    got, plain = adapted(folders["base"], folder), weights(folders["base"])
    found = open_adapter(folder, CFG, abstract_variables(CFG))
    assert "have no pair" in found.notes[0]
    delta = [2.0 * b @ a for a, b in (list(tensors.values())[:2], list(tensors.values())[2:])]
    q_a = plain["params/dense/attention/q_a_AD"].copy()
    q_a[0] += delta[0]
    np.testing.assert_allclose(got["params/dense/attention/q_a_AD"], q_a, rtol=0, atol=1e-5)
    gate_up = plain["params/moe/mlp/experts/gate_up_EPFD"].copy()
    gate_up[0, 5, 1] += delta[1]
    np.testing.assert_allclose(got["params/moe/mlp/experts/gate_up_EPFD"], gate_up, rtol=0, atol=1e-5)
    for key, value, message in (
        ("use_dora", True, "use_dora is True"),
        ("peft_type", "IA3", "peft_type is 'IA3'"),
        ("modules_to_save", ["lm_head"], "modules_to_save is"),
        ("alora_invocation_tokens", [1], "alora_invocation_tokens is"),
        ("layer_replication", [[0, 2]], "layer_replication is"),
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights is 'pissa_niter_4'"),
        ("lora_alpha", 0, "lora_alpha is 0"),
        ("alpha_pattern", ["q_a_proj"], "alpha_pattern is"),
        ("r", True, "r is True"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ConfigError, match=message):
            open_adapter(folder, CFG, abstract_variables(CFG))

    (folder / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": {"(": 1}}))
    with pytest.raises(DataError, match=r"alpha_pattern '\('"):
        open_adapter(folder, CFG, abstract_variables(CFG))


E = CFG.n_routed_experts


@pytest.mark.parametrize(
    ("module", "a", "b", "message"),
    [
        ("0.self_attn.q_a_proj", (3, CFG.hidden_size), (CFG.q_lora_rank, 2), "factors of .*q_a_proj are"),
        ("0.self_attn.q_a_proj", (CFG.hidden_size,), (CFG.q_lora_rank, 1), "factors of .*q_a_proj are"),
        ("0.self_attn.q_a_proj", (3, CFG.hidden_size + 1), (CFG.q_lora_rank, 3), "the model's weight is"),
        ("1.mlp.experts", (E + 1, CFG.moe_intermediate_size), (CFG.hidden_size, E + 1), "not those of"),
        ("1.mlp.experts", (E, CFG.hidden_size), (CFG.moe_intermediate_size, E), "the model's weight is"),
    ],
)
def test_peft_factors_that_do_not_fit_are_refused(
    tmp_path: Path, module: str, a: tuple[int, ...], b: tuple[int, ...], message: str
) -> None:
    from tests.convert.folders import safetensors_bytes

    name = f"base_model.model.model.layers.{module}"
    tensors = {
        f"{name}.lora_{half}.weight": np.ones(shape, np.float32) for half, shape in (("A", a), ("B", b))
    }
    (tmp_path / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6}))
    with pytest.raises((ConfigError, DataError), match=message):
        open_adapter(tmp_path, CFG, abstract_variables(CFG))


def decode(folder: Path, checkpoint: Path, **values: Any) -> list[dict[str, Any]]:
    folder.mkdir()
    (folder / "in.jsonl").write_text(
        "\n".join(json.dumps({"prompt": text}) for text in ("latent", "experts go"))
    )
    sampling = Sampling(max_new_tokens=12, logprobs=0, ignore_eos=True)
    job = Job(checkpoint, sampling, batch_size=2, page_size=16, dtype="float32", **values)
    assert run_file(job, folder / "in.jsonl", folder / "out.jsonl") == 0
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def decoded(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("decoded")
    merge.convert(folders["base"], folders["adapter"], folder / "merged", "float32")
    return decode(folder / "run", folder / "merged")


@pytest.mark.parametrize("kind", ["ours", "peft"])
def test_decoding_with_an_adapter_is_decoding_the_merged_model(
    folders: dict[str, Path], decoded: list[dict[str, Any]], tmp_path: Path, kind: str
) -> None:
    """Prefill, absorbed decode over pages, experts: the same tokens, log-probabilities within 1e-5."""
    adapter = folders["adapter"]
    if kind == "peft":
        to_peft.convert(adapter, tmp_path / "peft")
        adapter = tmp_path / "peft"
    got = decode(tmp_path / "run", folders["base"], adapter=adapter)
    plain = decode(tmp_path / "plain", folders["base"])
    for ours, merged, without in zip(got, decoded, plain, strict=True):
        assert ours["token_ids"] == merged["token_ids"] != without["token_ids"]
        np.testing.assert_allclose(logprobs(ours), logprobs(merged), rtol=0, atol=1e-5)


def logprobs(line: dict[str, Any]) -> list[float]:
    return [entry["logprob"] if isinstance(entry, dict) else entry for entry in line["logprobs"]]


def test_what_is_no_adapter_or_another_models(folders: dict[str, Path], tmp_path: Path) -> None:
    abstract = abstract_variables(CFG)
    with pytest.raises(ConfigError, match="is no adapter"):
        open_adapter(folders["base"], CFG, abstract)
    with pytest.raises(ConfigError, match="no such folder"):
        open_adapter(tmp_path / "nowhere", CFG, abstract)
    with pytest.raises(ConfigError, match="an adapter, no model"):
        open_source(folders["adapter"], abstract_variables)
    found = open_adapter(folders["adapter"], CFG, abstract)
    other = dataclasses.replace(CFG, q_lora_rank=32)
    with pytest.raises(ConfigError, match=r"q_a_AD/b_AO is \[1, 24, 2\]; the model x needs \[1, 32, 2\]"):
        found.check_model(abstract_variables(other), Path("x"))
    assert found.check_model(abstract, folders["base"]) == []
    (note,) = found.check_model(abstract, folders["int4"])
    assert "trained on other weights" in note


def test_a_base_without_the_multi_token_module_leaves_its_pairs_out_and_says_so(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Decoding uses the others as they are; merging, which would lose these, is refused."""
    short = dataclasses.replace(CFG, num_nextn_predict_layers=0)
    whole = open_source(folders["base"], abstract_variables).load("float32")
    variables = {name: {k: v for k, v in tree.items() if k != "mtp"} for name, tree in whole.items()}
    save_checkpoint(tmp_path / "short", short, variables, tokenizer_dir=folders["base"].parent / "tokenizer")
    found = open_model(tmp_path / "short", adapter=folders["adapter"])
    count = sum(path.startswith("params/mtp/") for path in read_record(folders["adapter"])[0].paths)
    assert count and any(f"pairs for {count} of its weights are left out" in note for note in found.notes)
    usual = open_model(folders["base"], adapter=folders["adapter"])
    assert not any("left out" in note for note in usual.notes)
    got, want = found.load(host=True), usual.load(host=True)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True))
    with pytest.raises(ConfigError, match=r"params/mtp/.*decoding can do without"):
        merge.convert(tmp_path / "short", folders["adapter"], tmp_path / "merged")
    lora, pairs = pairs_of(CFG, ("eh_proj",))
    only = save_adapter(tmp_path / "only", folders["base"], CFG, lora, pairs)
    with pytest.raises(ConfigError, match="all pairs are of the multi-token module"):
        open_model(tmp_path / "short", adapter=only)


def test_a_damaged_adapter_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    lora, pairs = pairs_of(CFG, ("o_proj",))
    folder = save_adapter(tmp_path / "adapter", folders["base"], CFG, lora, pairs)
    chunk = next(file for file in (folder / "weights").rglob("c.*") if file.is_file())
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1])
    with pytest.raises(DataError, match="not a whole adapter"):
        open_adapter(folder, CFG, abstract_variables(CFG))
    chunk.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=f"{chunk.name}: SHA-256"):
        open_adapter(folder, CFG, abstract_variables(CFG))


def test_a_base_that_was_rounded_in_training_is_told_where_it_is_not(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    lora, pairs = pairs_of(CFG, ("o_proj",))
    folder = save_adapter(tmp_path / "adapter", folders["base"], CFG, lora, pairs, "int4:16")
    abstract = abstract_variables(CFG)
    found = open_adapter(folder, CFG, abstract)
    assert found.check_model(abstract, folders["base"], "int4:16") == []
    (note,) = found.check_model(abstract, folders["base"])
    assert "rounded to int4:16; here they are not" in note
    (note,) = open_model(folders["base"], adapter=folder, quantize="int8").notes[-1:]
    assert "rounded to int4:16; here they are rounded to int8" in note
