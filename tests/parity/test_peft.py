"""Adapters against the real `peft` on transformers' DeepseekV3: its logits with our files, ours with its files.

Dense and shared layers are not among them: peft 0.21 takes their modules' names for the experts' (finetune/peft.py).

Not run where `peft` is missing: `./run setup --extras parity` installs it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import to_hf, to_peft
from dsv3_jax.checkpoint.source import open_source
from dsv3_jax.finetune import attach
from dsv3_jax.finetune.files import open_adapter
from dsv3_jax.model import Transformer, abstract_variables, init_variables
from tests.finetune.test_files import CFG, pairs_of, save_adapter

peft = pytest.importorskip("peft", reason="NOT RUN: the package peft is missing")
torch = pytest.importorskip("torch")

from dsv3_jax.checkpoint import save_checkpoint  # noqa: E402
from tests.parity import hf  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn about each other

CFG = dataclasses.replace(CFG, num_nextn_predict_layers=0)
TOKENS = np.random.default_rng(0).integers(0, CFG.vocab_size, (2, 11))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    variables = jax.device_get(jax.jit(init_variables, static_argnums=0)(CFG, jax.random.key(1)))
    save_checkpoint(folder / "base", CFG, variables)
    to_hf.convert(folder / "base", folder / "hf", "float32")
    return folder


def our_logits(folder: Path, adapter: Path | None) -> Any:
    source = open_source(folder / "base", abstract_variables)
    tree = source.load("float32")
    if adapter is not None:
        found = open_adapter(adapter, source.cfg, source.abstract)
        tree["params"] = attach(tree["params"], found.pairs["params"], found.lora)
    model = Transformer(CFG)

    @jax.jit
    def run(tree: Any) -> Any:
        hidden = model.apply(tree, jnp.asarray(TOKENS, jnp.int32)).hidden_BTD
        return model.apply(tree, hidden, method="logits")

    return np.asarray(run(jax.tree.map(jnp.asarray, tree)))


@pytest.mark.parametrize(
    ("targets", "rslora"),
    [(("attention",), True), (("attention", "experts"), False)],
    ids=["attention", "experts"],
)
def test_peft_opens_our_files(folder: Path, tmp_path: Path, targets: tuple[str, ...], rslora: bool) -> None:
    lora, pairs = pairs_of(CFG, targets, rslora=rslora)
    ours = save_adapter(tmp_path / "ours", folder / "base", CFG, lora, pairs)
    to_peft.convert(ours, tmp_path / "peft")
    base = hf.load(folder / "hf")
    plain = hf.logits(base, TOKENS)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "peft"))
    loaded = peft.get_peft_model_state_dict(model)
    assert sum(value.numel() for value in loaded.values()) >= sum(x.size for x in jax.tree.leaves(pairs))
    got = hf.logits(model, TOKENS)
    assert np.abs(got - plain).max() > 1e-2
    np.testing.assert_allclose(got, our_logits(folder, ours), rtol=0, atol=1e-4)


def test_we_open_pefts_files(folder: Path, tmp_path: Path) -> None:
    """Attention as modules, the experts' parameters by `target_parameters`, ranks apart."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_b_proj", "kv_b_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"kv_b_proj": 2},
        alpha_pattern={"kv_b_proj": 5},
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(hf.load(folder / "hf"), config)
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.2)
    model.eval().save_pretrained(tmp_path / "theirs")
    got = our_logits(folder, tmp_path / "theirs")
    assert np.abs(got - our_logits(folder, None)).max() > 1e-2
    np.testing.assert_allclose(got, hf.logits(model, TOKENS), rtol=0, atol=1e-4)
