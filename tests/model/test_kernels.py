"""`--kernels` reaches every kernel of the model, in training under the mesh and in decoding."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import Kernels, parse_kernels
from dsv3_jax.config.kernels import IMPLEMENTATIONS, OPERATIONS
from dsv3_jax.errors import ConfigError
from dsv3_jax.inference import Engine, EngineOptions
from dsv3_jax.kernels.attention.api import ATTENTION
from dsv3_jax.kernels.grouped_matmul.api import GROUPED_MATMUL
from dsv3_jax.kernels.mla_decode.api import LATENT_ATTENTION
from dsv3_jax.kernels.mla_decode.paged import PAGED_LATENT_ATTENTION
from dsv3_jax.kernels.quantized_matmul.api import GROUPED_QUANTIZED_MATMUL, QUANTIZED_MATMUL
from dsv3_jax.model import Transformer, abstract_variables, make_cache
from dsv3_jax.parallel import make_mesh
from dsv3_jax.planning.plan import BATCH_KEYS
from dsv3_jax.quantization.formats import parse_format, quantize
from dsv3_jax.quantization.leaf import implemented, quantized_leaf
from dsv3_jax.training.step import abstract_state, batch_sharding, make_eval_step, make_train_step
from tests.inference import tiny as small
from tests.quantization.coded import quantized_variables
from tests.training import tiny

TABLES = {
    "attention": ATTENTION,
    "grouped_matmul": GROUPED_MATMUL,
    "latent_attention": LATENT_ATTENTION,
    "quantized_matmul": QUANTIZED_MATMUL,
}
# The kernel of an operation that a pass comes to first.
ASKED = {"grouped_matmul": "grouped_swiglu"}


def test_every_operation_has_a_table_whose_names_the_flag_knows():
    assert set(TABLES) == set(OPERATIONS)
    for table in TABLES.values():
        assert {"reference"} <= set(table) <= set(IMPLEMENTATIONS)


def test_pages_are_read_by_the_implementations_of_the_same_flag():
    assert {"reference"} <= set(PAGED_LATENT_ATTENTION) <= set(IMPLEMENTATIONS)


def test_quantised_experts_are_multiplied_by_the_implementations_of_the_same_flag():
    assert set(GROUPED_QUANTIZED_MATMUL) == set(QUANTIZED_MATMUL)


def test_a_name_for_all_and_exceptions():
    assert parse_kernels("auto") == Kernels()
    assert parse_kernels("mosaic,latent_attention=reference") == Kernels(
        "mosaic", "mosaic", "reference", "mosaic"
    )
    assert parse_kernels("attention=mosaic") == Kernels("mosaic", "auto", "auto", "auto")


@pytest.mark.parametrize("operation", ["attention", "grouped_matmul"])
@pytest.mark.parametrize("expert", [1, 2])
def test_the_training_step_asks_for_the_named_implementation_under_the_mesh(operation, expert):
    mesh_cfg = dataclasses.replace(tiny.RUN.mesh, fsdp=1, expert=expert)
    cfg = dataclasses.replace(tiny.RUN, kernels=f"{operation}=mosaic", mesh=mesh_cfg)
    mesh = make_mesh(cfg.mesh, jax.devices()[:expert])
    shape = (cfg.training.batch_size, cfg.training.seq_len)
    batch = {k: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh)) for k in BATCH_KEYS}
    state = abstract_state(cfg, mesh)
    with pytest.raises(ConfigError, match=f"kernel {ASKED.get(operation, operation)}.* 'mosaic'"):
        jax.eval_shape(make_train_step(cfg, mesh), state, batch)
    with pytest.raises(ConfigError, match=f"kernel {ASKED.get(operation, operation)}.* 'mosaic'"):
        jax.eval_shape(make_eval_step(cfg, mesh), state.params, state.router, batch)


@pytest.mark.parametrize(
    ("operation", "form"),
    [("attention", "expanded"), ("grouped_matmul", "absorbed"), ("latent_attention", "absorbed")],
)
def test_a_pass_over_the_cache_asks_for_the_named_implementation(operation, form):
    model = Transformer(tiny.MODEL, form, kernels=parse_kernels(f"{operation}=mosaic"))
    tokens = jnp.zeros((2, 1), jnp.int32)
    cache = jax.eval_shape(lambda: make_cache(tiny.MODEL, 2, 256))
    with pytest.raises(ConfigError, match=f"kernel {ASKED.get(operation, operation)}.* 'mosaic'"):
        jax.eval_shape(lambda v, c: model.apply(v, tokens, cache=c), abstract_variables(tiny.MODEL), cache)


def test_quantised_leaves_ask_for_the_named_implementation_in_the_engine():
    variables, _ = quantized_variables(small.V3, small.variables("v3"), "int8")
    options = EngineOptions(rows=2, pages=4, context=64, kernels=parse_kernels("quantized_matmul=mosaic"))
    engine = Engine(
        small.V3,
        variables,
        options=options,
        eos_ids=small.V3.eos_token_id,
        vocab_limit=small.VOCAB_LIMIT,
    )
    with pytest.raises(ConfigError, match="kernel quantized_matmul: implementation 'mosaic' cannot run"):
        engine.warm()


def test_quantised_experts_ask_for_the_named_implementation():
    parts = quantize(np.ones((2, 64, 128), np.float32), parse_format("int8"))
    leaf = quantized_leaf(parts, parse_format("int8").coding(128), (64, 128))
    x_ND, sizes_E = jnp.ones((3, 128)), jnp.asarray([1, 2])
    assert implemented({"a": [leaf]}, "reference")["a"][0].grouped(x_ND, sizes_E).shape == (3, 64)
    with pytest.raises(ConfigError, match="kernel grouped_quantized_matmul: implementation 'mosaic'"):
        implemented(leaf, "mosaic").grouped(x_ND, sizes_E)
