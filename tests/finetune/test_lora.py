"""A leaf with a pair is a leaf: the model computes the same with W and its pair as with W + scale * b a."""

import dataclasses
import functools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.errors import ConfigError
from dsv3_jax.finetune import Lora, abstract_pairs, attach, chosen_targets, init_pairs, merge, split
from dsv3_jax.finetune.targets import letters_of
from dsv3_jax.hf.rules import flatten_paths
from dsv3_jax.inference.batch import Job
from dsv3_jax.inference.options import Sampling
from dsv3_jax.inference.weights import unstack_layers
from dsv3_jax.model import Transformer, abstract_variables, init_variables, make_cache
from dsv3_jax.model.adapted import Adapted
from dsv3_jax.model.module import einsum, grouped_matmul, part
from dsv3_jax.quantization.formats import parse_format, quantize
from dsv3_jax.quantization.leaf import Quantized, quantized_leaf
from tests.golden import cases
from tests.inference import tiny
from tests.quantization.coded import quantized_variables

ALL = ("all-linear", "eh_proj")


@functools.cache
def small(name="v3"):
    cfg = cases.CASES[name].config
    if name == "v3":
        cfg = dataclasses.replace(cfg, num_nextn_predict_layers=1)
    return cfg, jax.jit(init_variables, static_argnums=0)(cfg, jax.random.key(1))


def lora_of(cfg, targets=ALL, **values):
    paths = chosen_targets(flatten_paths(abstract_variables(cfg)), targets)
    return Lora(**{"rank": 3, "alpha": 6.0, "rslora": False, "paths": tuple(paths)} | values)


def drawn(lora, variables):
    """Pairs of which b is not zero."""
    pairs = init_pairs(lora, variables, jax.random.key(5))["params"]
    keys = iter(jax.random.split(jax.random.key(6), 100))
    return jax.tree.map(lambda x: 0.3 * jax.random.normal(next(keys), x.shape), pairs)


@functools.partial(jax.jit, static_argnums=0)
def outputs(cfg, variables, tokens):
    """Logits of the main model and of the multi-token module."""
    model = Transformer(cfg, remat="full")
    hidden = model.apply(variables, tokens).hidden_BTD
    logits = [model.apply(variables, hidden, method="logits")]
    if cfg.num_nextn_predict_layers:
        ahead = model.apply(variables, hidden, tokens[None], method="mtp").hidden_LBTD[0]
        logits.append(model.apply(variables, ahead, method="mtp_logits"))
    return logits


def tokens_of(cfg, B=2, T=9):
    return jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, (B, T)), jnp.int32)


@pytest.mark.parametrize(("name", "text"), [("v3", None), ("v3", "int4a:16"), ("v2-lite", "fp8:16x16")])
def test_logits_are_those_of_the_merged_model(name, text):
    """Attention, dense layers, experts and the multi-token module, in scanned and rematerialised layers."""
    cfg, variables = small(name)
    base, whole = (variables, variables) if text is None else quantized_variables(cfg, variables, text)
    lora = lora_of(cfg, ALL if cfg.num_nextn_predict_layers else ALL[:1])
    pairs = drawn(lora, variables)
    adapted = {**base, "params": attach(base["params"], pairs, lora)}
    merged = {**whole, "params": merge(attach(whole["params"], pairs, lora))}
    assert not any(isinstance(leaf, (Adapted, Quantized)) for leaf in flatten_paths(merged).values())
    tokens = tokens_of(cfg)
    plain = outputs(cfg, whole, tokens)
    for got, want, without in zip(
        outputs(cfg, adapted, tokens), outputs(cfg, merged, tokens), plain, strict=True
    ):  # float32 sums in another order
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * np.abs(want).max())
        assert np.abs(want - without).max() > 1e-2 * np.abs(want).max()  # the pairs matter


def test_absorbed_attention_has_the_pair_of_kv_b_too():
    cfg, variables = small()
    lora = lora_of(cfg, ("kv_b_proj",))
    base, _ = quantized_variables(cfg, variables, "int8")
    params = attach(base["params"], drawn(lora, variables), lora)
    tokens = tokens_of(cfg)
    hidden = {}
    for form in ("expanded", "absorbed"):
        run = jax.jit(Transformer(cfg, form=form).apply)
        hidden[form] = run({**base, "params": params}, tokens, cache=make_cache(cfg, 2, 256)).hidden_BTD
    without = run(base, tokens, cache=make_cache(cfg, 2, 256)).hidden_BTD
    np.testing.assert_allclose(hidden["absorbed"], hidden["expanded"], rtol=0, atol=1e-4)
    assert np.abs(hidden["absorbed"] - without).max() > 1e-2


def test_an_absorbed_slice_of_kv_b():
    cfg, variables = small()
    lora = lora_of(cfg, ("kv_b_proj",))
    params = attach(variables["params"], drawn(lora, variables), lora)
    leaf = jax.tree.map(lambda x: x[0], params["dense"]["attention"]["kv_b_HWC"])
    q = jax.random.normal(jax.random.key(0), (2, 3, cfg.num_attention_heads, cfg.qk_nope_head_dim))
    got = einsum("BTHN,HNC->BTHC", q, part(leaf, 1, 0, cfg.qk_nope_head_dim))
    want = jnp.einsum("BTHN,HNC->BTHC", q, leaf.astype(jnp.float32)[:, : cfg.qk_nope_head_dim])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def loss(params, base, lora, cfg, tokens):
    variables = {**base, "params": attach(base["params"], params, lora)}
    logits = outputs(cfg, variables, tokens)
    return sum(jnp.mean(jax.nn.logsumexp(x, axis=-1) - x[..., 0]) for x in logits)


def test_gradients_are_projections_of_the_full_gradient():
    """d/da = scale b^T G and d/db = scale G a^T, where G is the gradient of the merged weight."""
    cfg, variables = small()
    lora = lora_of(cfg, rslora=True)
    assert lora.scale == pytest.approx(6 / math.sqrt(3))
    pairs, tokens = drawn(lora, variables), tokens_of(cfg)
    merged = {**variables, "params": merge(attach(variables["params"], pairs, lora))}
    full = jax.grad(
        lambda params: sum(
            jnp.mean(jax.nn.logsumexp(x, axis=-1) - x[..., 0])
            for x in outputs(cfg, {**merged, "params": params}, tokens)
        )
    )(merged["params"])
    grads = flatten_paths(jax.grad(loss)(pairs, variables, lora, cfg, tokens), "params")
    G, P = flatten_paths(full, "params"), flatten_paths(pairs, "params")
    assert len(grads) == 2 * len(lora.paths)
    for path in lora.paths:
        letters = letters_of(path)
        a, b = f"{path}/a_{letters.a}", f"{path}/b_{letters.b}"
        front = P[a].shape[: P[a].ndim - 1 - letters.inputs]
        a_OK = np.asarray(P[a]).reshape(*front, lora.rank, -1)
        b_RO = np.asarray(P[b]).reshape(*front, -1, lora.rank)
        G_RK = np.asarray(G[path]).reshape(*front, b_RO.shape[-2], a_OK.shape[-1])
        for name, want in ((a, b_RO.mT @ G_RK), (b, G_RK @ a_OK.mT)):
            want = lora.scale * want.reshape(grads[name].shape)
            assert np.abs(want).max() > 0
            # Two float32 computations of one gradient: 5.4e-5 apart under jax 0.10, 1.1e-4 to 2.4e-4 under 0.12.
            np.testing.assert_allclose(grads[name], want, rtol=0, atol=5e-4 * np.abs(want).max())


@pytest.mark.parametrize("grouped", [False, True])
def test_a_product_and_its_gradients_through_a_quantised_base_are_those_in_float64(grouped):
    """y = x (W + scale b a)^T and the gradients of sum(c y), against the formulas in float64; W is int4."""
    rng = np.random.default_rng(0)
    E, R, K, rank, N = 3, 24, 32, 2, 40
    x, c = rng.standard_normal((N, K)), rng.standard_normal((N, R))
    a, b = rng.standard_normal((E, rank, K)), rng.standard_normal((E, R, rank))
    fmt = parse_format("int4a:16")
    base = quantized_leaf(quantize(rng.standard_normal((E, R, K)), fmt), fmt.coding(K), (R, K))
    expert = np.repeat(np.arange(E), [7, 0, N - 7]) if grouped else np.zeros(N, int)
    W = np.float64(base.astype(jnp.float32)) + 0.5 * b @ a

    @jax.jit
    def run(x, a, b):
        leaf = Adapted(base, a, b, lead=1, inputs=1, scale=0.5)
        if grouped:
            return grouped_matmul(x, leaf, jnp.bincount(jnp.asarray(expert), length=E))
        return einsum("BD,ID->BI", x, dataclasses.replace(jax.tree.map(lambda part: part[0], leaf), lead=0))

    f32 = [jnp.asarray(value, jnp.float32) for value in (x, a, b)]
    y, back = jax.vjp(run, *f32)
    one_hot = np.eye(E)[expert]
    G = np.einsum("nr,nk,ne->erk", c, x, one_hot)  # of W
    wanted = (
        np.einsum("nk,nrk->nr", x, W[expert]),
        np.einsum("nr,nrk->nk", c, W[expert]),
        0.5 * np.einsum("ero,erk->eok", b, G),
        0.5 * np.einsum("erk,eok->ero", G, a),
    )
    for got, want in zip((y, *back(jnp.asarray(c, jnp.float32))), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_the_first_pairs_change_nothing_and_follow_the_seed():
    cfg, variables = small()
    lora = lora_of(cfg)
    one, same = (init_pairs(lora, variables, jax.random.key(3)) for _ in range(2))
    other = init_pairs(lora, variables, jax.random.key(4))
    flat, again, another = flatten_paths(one), flatten_paths(same), flatten_paths(other)
    assert {p: x.shape for p, x in flat.items()} == {
        p: x.shape for p, x in flatten_paths(abstract_pairs(lora, variables)).items()
    }
    for path, x in flat.items():
        np.testing.assert_array_equal(x, again[path])
        if "/b_" in path:
            assert not x.any()
            continue
        assert (x != another[path]).all()
        bound = 1 / math.sqrt(math.prod(x.shape[-letters_of(path.rpartition("/")[0]).inputs :]))
        assert 0.8 * bound < np.abs(x).max() <= bound
    tokens = tokens_of(cfg)
    adapted = {**variables, "params": attach(variables["params"], one["params"], lora)}
    for got, want in zip(outputs(cfg, adapted, tokens), outputs(cfg, variables, tokens), strict=True):
        np.testing.assert_array_equal(got, want)


def test_split_takes_apart_what_attach_put_together():
    cfg, variables = small()
    lora = lora_of(cfg)
    pairs = drawn(lora, variables)
    weights, found = split(attach(variables["params"], pairs, lora))
    for got, want in ((weights, variables["params"]), (found, pairs)):
        assert jax.tree.structure(got) == jax.tree.structure(jax.tree.map(lambda x: x, dict(want)))
        assert all(a is b for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


def test_letters_of_pairs():
    letters = {
        p: (letters_of(p).a, letters_of(p).b)
        for p in chosen_targets(flatten_paths(abstract_variables(small()[0])), ALL)
    }
    assert letters["params/moe/attention/q_b_HQA"] == ("OA", "HQO")
    assert letters["params/moe/attention/o_DHU"] == ("OHU", "DO")
    assert letters["params/dense/mlp/gate_up_PID"] == ("POD", "PIO")
    assert letters["params/moe/mlp/experts/gate_up_EPFD"] == ("EPOD", "EPFO")
    assert letters["params/moe/mlp/experts/down_EDF"] == ("EOF", "EDO")


def test_targets():
    paths = list(flatten_paths(abstract_variables(small()[0])))
    kinds = {path.rpartition("/")[2] for path in chosen_targets(paths)}
    assert kinds == {"q_a_AD", "q_b_HQA", "kv_a_JD", "kv_b_HWC", "o_DHU"}
    assert not any("experts" in path for path in chosen_targets(paths, ["down_proj"]))
    assert chosen_targets(paths, ["*/experts/down_EDF"]) == [
        "params/moe/mlp/experts/down_EDF",
        "params/mtp/block/mlp/experts/down_EDF",
    ]
    both = chosen_targets(paths, ["gate_proj", "up_proj"])
    assert both and all("gate_up" in path for path in both)
    with pytest.raises(
        ConfigError, match=r"'k_proj' matches no weight.*attention, dense, shared, experts.*q_a_proj"
    ):
        chosen_targets(paths, ["k_proj"])
    with pytest.raises(ConfigError, match="one leaf"):
        chosen_targets(paths, ["gate_proj"])
    with pytest.raises(ConfigError, match="without targets"):
        chosen_targets(paths, [])


def test_unstacked_layers_keep_their_pairs():
    cfg, variables = small()
    lora = lora_of(cfg, ("experts",))
    pairs = drawn(lora, variables)
    base, whole = quantized_variables(cfg, variables, "int8")
    layers = unstack_layers(cfg, {**base, "params": attach(base["params"], pairs, lora)}).layers
    leaf = layers[-1]["params"]["mlp"]["experts"]["down_EDF"]
    assert isinstance(leaf, Adapted) and isinstance(leaf.base, Quantized)
    want = merge(attach(whole["params"], pairs, lora))["moe"]["mlp"]["experts"]["down_EDF"][-1]
    np.testing.assert_allclose(leaf.astype(jnp.float32), want, rtol=1e-6, atol=1e-6)


def test_weights_for_a_mesh_stay_on_the_host():
    """One device need not hold them all; the values are those on the device, in bfloat16 too."""
    cfg, variables = small()
    cfg = dataclasses.replace(cfg, dtype="bfloat16")
    pairs = drawn(lora_of(cfg, ("experts",)), variables)
    base, _ = quantized_variables(cfg, variables, "int8")
    tree = {**base, "params": attach(base["params"], pairs, lora_of(cfg, ("experts",)))}
    host, device = (unstack_layers(cfg, tree, host=host) for host in (True, False))
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(host))
    assert jax.tree.structure(host) == jax.tree.structure(device)
    for ours, theirs in zip(jax.tree.leaves(host), jax.tree.leaves(device), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, np.asarray(theirs))


@pytest.mark.parametrize(("mesh", "host"), [(None, False), ("data=2,expert=4", True)])
def test_a_job_on_a_mesh_loads_on_the_host(mesh, host):
    asked = []

    def load(**options):
        asked.append(options)
        raise NotImplementedError

    model: Any = SimpleNamespace(cfg=tiny.V3, load=load)
    request: Any = SimpleNamespace(ids=[1, 2], sampling=Sampling(max_new_tokens=2))
    with pytest.raises(NotImplementedError):
        Job(Path("x"), Sampling(), batch_size=2, page_size=16, mesh=mesh).engine(model, [request])
    assert asked == [{"host": host}]
