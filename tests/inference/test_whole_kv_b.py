"""kv_b of a quantised model is dequantised once: the same bits, nothing else leaves its codes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference import Engine, EngineOptions, Request, Sampling
from dsv3_jax.inference.weights import Weights, unstack_layers, with_whole_kv_b
from dsv3_jax.model import init_variables
from dsv3_jax.model.adapted import Adapted
from dsv3_jax.quantization.leaf import Quantized
from tests.inference import tiny
from tests.quantization.coded import quantized_variables

CFG = dataclasses.replace(tiny.V3, num_hidden_layers=1, num_nextn_predict_layers=1)
OPTIONS = EngineOptions(rows=2, page_size=16, prefill_tiles=2, tile=8, context=64)


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    return quantized_variables(CFG, init_variables(CFG, jax.random.key(3)), "int8")[0]


def quantized(weights: Weights) -> dict[str, Any]:
    """Leaves that are codes, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(
        (weights.layers, weights.mtp), is_leaf=lambda leaf: isinstance(leaf, Quantized)
    )
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Quantized)}


@pytest.mark.parametrize("host", [False, True])
def test_only_kv_b_leaves_its_codes_and_keeps_its_values(variables: dict[str, Any], host: bool) -> None:
    before = unstack_layers(CFG, variables, host=host)
    after = with_whole_kv_b(before, "bfloat16")
    gone = quantized(before).keys() - quantized(after).keys()
    assert len(gone) == 2 and all(path.endswith("['kv_b_HWC']") for path in gone)  # the layer's, the module's
    assert after.mtp is not None
    for old, new in zip([*before.layers, before.mtp], [*after.layers, after.mtp], strict=True):
        coded, whole = (tree["params"] for tree in (old, new))
        while "attention" not in coded:  # the module's block lies deeper
            coded, whole = coded["block"], whole["block"]
        leaf, array = coded["attention"]["kv_b_HWC"], whole["attention"]["kv_b_HWC"]
        assert isinstance(array, np.ndarray if host else jax.Array) and array.shape == leaf.shape
        np.testing.assert_array_equal(
            np.asarray(array, np.float32),
            np.asarray(leaf.astype(jnp.float32).astype(jnp.bfloat16), np.float32),
        )


def test_a_pair_stays_beside_it(variables: dict[str, Any]) -> None:
    weights = unstack_layers(CFG, variables)
    attention = weights.layers[0]["params"]["attention"]
    leaf = attention["kv_b_HWC"]
    a, b = jnp.ones((2, CFG.kv_lora_rank)), jnp.ones((*leaf.shape[:2], 2))
    attention["kv_b_HWC"] = Adapted(leaf, a, b, 0.5, 0, 1)
    found = with_whole_kv_b(weights, "float32").layers[0]["params"]["attention"]["kv_b_HWC"]
    assert isinstance(found, Adapted) and isinstance(found.base, jax.Array) and found.b is b


def test_the_engine_gives_the_same_bits_with_and_without(variables: dict[str, Any]) -> None:
    sampling = Sampling(10, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    results = []
    for keep in (True, False):
        engine = Engine(CFG, variables, options=dataclasses.replace(OPTIONS, keep_kv_b_codes=keep))
        held = [path for path in quantized(engine._device._weights) if "kv_b" in path]
        assert len(held) == (2 if keep else 0)
        results.append(tiny.finish(engine, [Request(tiny.prompt(20), sampling)])[0])
    assert results[0] == results[1]
