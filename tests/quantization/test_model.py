"""A quantised leaf is a leaf: the model computes the same with it as with the array that it stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.hf.rules import flatten_paths
from dsv3_jax.inference.weights import unstack_layers
from dsv3_jax.model import Transformer, abstract_variables, init_variables
from dsv3_jax.model.module import einsum
from dsv3_jax.quantization.choose import chosen_leaves, kind_of_leaf
from dsv3_jax.quantization.leaf import Quantized
from tests.golden import cases
from tests.quantization.coded import quantized_variables


@functools.cache
def small(name):
    cfg = cases.CASES[name].config
    return cfg, init_variables(cfg, jax.random.key(1))


@pytest.mark.parametrize("text", ["fp8:16x16", "fp8", "int8", "int4a:16"])
def test_a_forward_pass_in_scanned_layers(text):
    """Expanded attention, dense and expert layers, under nn.scan; logits as with the dequantised weights."""
    cfg, variables = small("v3")
    coded, whole = quantized_variables(cfg, variables, text)
    assert sum(isinstance(leaf, Quantized) for leaf in flatten_paths(coded).values()) >= 7
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 9)), jnp.int32)

    @jax.jit
    def logits(variables):
        model = Transformer(cfg)
        return model.apply(variables, model.apply(variables, tokens).hidden_BTD, method="logits")

    got, want = logits(coded), logits(whole)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_fp8_activations_are_rounded_in_every_product():
    """Logits of fp8+act8 leave those of the same codes by the rounding of activations (3 bits), and only by it."""
    cfg, variables = small("v3")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 9)), jnp.int32)

    @jax.jit
    def logits(variables):
        model = Transformer(cfg)
        return model.apply(variables, model.apply(variables, tokens).hidden_BTD, method="logits")

    exact, rounded = (
        logits(quantized_variables(cfg, variables, text)[0]) for text in ("fp8:16x16", "fp8:16x16+act8")
    )
    off = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-3 < off < 0.15, off


def test_unstacked_layers_keep_their_codes():
    cfg, variables = small("v3")
    coded, whole = quantized_variables(cfg, variables, "int8")
    layers = unstack_layers(cfg, coded).layers
    experts = layers[-1]["params"]["mlp"]["experts"]["gate_up_EPFD"]
    assert isinstance(experts, Quantized) and experts.codes.dtype == jnp.int8
    want = np.asarray(whole["params"]["moe"]["mlp"]["experts"]["gate_up_EPFD"])[-1]
    np.testing.assert_array_equal(experts.astype(jnp.float32), want)


def test_the_absorbed_use_of_kv_b_dequantises():
    cfg, variables = small("v3")
    coded, whole = quantized_variables(cfg, variables, "int8")
    leaf, array = (tree["params"]["dense"]["attention"]["kv_b_HWC"] for tree in (coded, whole))
    q = jax.random.normal(
        jax.random.key(0), (2, 3, cfg.num_attention_heads, cfg.qk_nope_head_dim + cfg.v_head_dim)
    )
    got = einsum("BTHW,HWC->BTHC", q, leaf.layer(0))
    np.testing.assert_allclose(got, einsum("BTHW,HWC->BTHC", q, array[0]), rtol=1e-5, atol=1e-6)


def test_what_is_never_chosen():
    """Norms, biases, routers, embeddings, and by default the head; every matrix of a product is of some kind."""
    for name in ("v3", "v2-lite", "v32"):
        cfg = cases.CASES[name].config
        paths = flatten_paths(abstract_variables(cfg))
        left = {path for path in paths if kind_of_leaf(path) is None}
        assert all(
            any(
                word in path for word in ("norm", "bias", "router", "embed", "indexer", "proj_DX", "mtp/head")
            )
            for path in left
        ), left
        assert "params/head_VD" not in chosen_leaves(paths) and "params/head_VD" in chosen_leaves(
            paths, ["head"]
        )
        assert not any("experts" in path for path in chosen_leaves(paths, skip=["*/experts/*"]))
