"""Whole programs compiled for H200s: train steps on one and eight devices, and a decode step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.h200.compiler import Report, compile_for_h200, devices, on_one_device
from benchmarks.shapes import MODEL_2B, MODEL_V3_SLICE, model_16b
from dsv3_jax.config import MeshConfig, ModelConfig, RunConfig, TrainingConfig, parse_kernels
from dsv3_jax.inference import steps
from dsv3_jax.inference.device import make_memory
from dsv3_jax.inference.settings import EngineOptions
from dsv3_jax.inference.table import RowTable
from dsv3_jax.inference.weights import unstack_layers
from dsv3_jax.model import abstract_variables
from dsv3_jax.parallel import make_mesh
from dsv3_jax.training.step import abstract_state, batch_sharding, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """One whole program.

    Attributes:
      name: for people and files.
      compile: compiles it and gives the report.
      model: what it computes, for the rules of `checks`.
      tokens: of one device.
      expert: devices the experts are cut over.
      cache_elements: of the latent cache; 0 without.
      operations: those whose kernels it uses, by the names of `--kernels`.
      kernels: the choice.
    """

    name: str
    compile: Callable[[], Report]
    model: ModelConfig
    tokens: int
    expert: int = 1
    cache_elements: int = 0
    operations: tuple[str, ...] = ("attention", "grouped_matmul")
    kernels: str = "reference"


def train(name: str, model: ModelConfig, mesh: MeshConfig, count: int, batch: int, kernels: str) -> Program:
    """A train step of `batch` sequences of 4096 tokens on `count` devices."""
    length = 4096
    cfg = RunConfig(
        model=model,
        training=TrainingConfig(batch_size=batch, seq_len=length),
        mesh=mesh,
        kernels=kernels,
    )

    def compiled() -> Report:
        over = make_mesh(cfg.mesh, devices(count))
        abstract = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=batch_sharding(over))
        names = ("tokens_BT", "targets_BT", "segments_BT", "positions_BT")
        state = abstract_state(cfg, over)
        return compile_for_h200(
            make_train_step(cfg, over), state, dict.fromkeys(names, abstract), donate=(0,)
        )

    return Program(
        f"train {name} {kernels}", compiled, model, batch * length // count, mesh.expert, kernels=kernels
    )


def decode(name: str, model: ModelConfig, rows: int, context: int, kernels: str) -> Program:
    """The engine's decode call: a device loop over tokens of all rows; every row has pages for `context` tokens."""
    page, width = 64, context // 64
    options = EngineOptions(
        rows=rows,
        page_size=page,
        pages=rows * width + 1,
        context=context,
        max_logprobs=None,
        cache_dtype=model.dtype,
    )
    memory = jax.eval_shape(functools.partial(make_memory, model, options))
    latent = memory.latent_NPJ

    def compiled() -> Report:
        sizes = steps.Sizes(rows * width + 1, model.vocab_size, None, 16, parse_kernels(kernels))
        variables = abstract_variables(model)
        weights = jax.eval_shape(functools.partial(unstack_layers, model), variables)
        row, flag = jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((), jnp.bool_)
        arguments = (
            memory,
            weights,
            steps.State(row, row, row, row),
            jax.ShapeDtypeStruct((rows, width), jnp.int32),
            jax.ShapeDtypeStruct((sizes.steps, rows), jnp.int32),
            jax.eval_shape(RowTable(rows, width, model.vocab_size).choosing),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            flag,
            jax.ShapeDtypeStruct((), jnp.int32),
            flag,
        )
        call = functools.partial(steps.decode, model, sizes)
        return compile_for_h200(call, *on_one_device(arguments), donate=(0,))

    full = f"decode {name}, {rows} rows of {context} {kernels}"
    elements = math.prod(latent.shape)
    operations = ("latent_attention", "grouped_matmul")
    return Program(full, compiled, model, rows, 1, elements, operations, kernels)


def all_programs() -> list[Program]:
    """Every whole program, with XLA's references and with the Mosaic kernels."""
    # Decoding has no scan over layers, so that compiling grows with them.
    moonlight = model_16b(layers=6)
    programs = []
    for kernels in ("reference", "mosaic"):
        programs += [
            train("2B 8x4096, 1 device", MODEL_2B, MeshConfig(fsdp=1), 1, 8, kernels),
            train("2B 64x4096, 8 devices", MODEL_2B, MeshConfig(expert=8, fsdp=1), 8, 64, kernels),
            train("V3 slice 8x4096, 8 devices", MODEL_V3_SLICE, MeshConfig(expert=8, fsdp=1), 8, 8, kernels),
            decode("16B-A3B, 6 layers", moonlight, 1, 1024, kernels),
            decode("16B-A3B, 6 layers", moonlight, 64, 1024, kernels),
            decode("16B-A3B, 6 layers", moonlight, 64, 8192, kernels),
        ]
    return programs
