"""Whole programs compiled for H200s: train steps on one and eight devices, decode steps, a layer's prompt."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.h200.compiler import Report, compile_for_h200, devices, on_one_device
from benchmarks.shapes import MODEL_2B, MODEL_V3_SLICE, model_16b
from dsv3_jax.config import MeshConfig, ModelConfig, RunConfig, TrainingConfig, parse_kernels
from dsv3_jax.hf.rules import flatten_paths, hf_entries, unflatten_paths
from dsv3_jax.inference import steps
from dsv3_jax.inference.device import make_memory
from dsv3_jax.inference.settings import EngineOptions
from dsv3_jax.inference.table import RowTable
from dsv3_jax.inference.weights import Weights, unstack_layers
from dsv3_jax.model import abstract_variables
from dsv3_jax.parallel import make_mesh
from dsv3_jax.quantization.choose import choose_formats
from dsv3_jax.quantization.formats import parse_format
from dsv3_jax.quantization.leaf import Quantized, implemented
from dsv3_jax.training.step import abstract_state, batch_sharding, make_train_step

PAGE = 64


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


def inference_weights(model: ModelConfig, fmt: str | None, kernels: str) -> Weights:
    """Abstract weights as the engine has them, those that `--quantize` rounds in this format."""
    variables = abstract_variables(model)
    if fmt is not None:
        variables = quantized(model, variables, fmt)
    weights = jax.eval_shape(functools.partial(unstack_layers, model), variables)
    return implemented(weights, parse_kernels(kernels).quantized_matmul)


def quantized(model: ModelConfig, variables: Any, fmt: str) -> Any:
    """Abstract variables with the leaves of `choose_formats` in their parts."""
    leaves: dict[str, Any] = flatten_paths(variables)
    entries = {entry.path: entry for entry in hf_entries(model, variables)}
    columns = {path: entry.hf_shape[-1] for path, entry in entries.items()}
    for path, name in choose_formats(columns, {}, parse_format(fmt))[0].items():
        entry, chosen = entries[path], parse_format(name)
        lead = leaves[path].shape[: len(entry.index)]
        parts = {
            part: jax.ShapeDtypeStruct((*lead, *shape), dtype)
            for part, (shape, dtype) in chosen.part_shapes(entry.hf_shape).items()
        }
        if chosen.kind == "fp8":  # bytes, as `quantized_leaf` has them
            parts["codes"] = parts["codes"].update(dtype=jnp.uint8)
        coding = chosen.coding(entry.hf_shape[-1])
        leaves[path] = Quantized(
            parts["codes"], parts["scales"], parts.get("zeros"), coding, tuple(entry.block_shape)
        )
    return unflatten_paths(leaves)


def memory_of(model: ModelConfig, pages: int, rows: int, context: int) -> steps.Memory:
    """Abstract pages of the latent cache, 64 tokens each."""
    options = EngineOptions(
        rows=rows,
        page_size=PAGE,
        pages=pages,
        context=context,
        max_logprobs=None,
        cache_dtype=model.dtype,
    )
    return jax.eval_shape(functools.partial(make_memory, model, options))


def decode(
    name: str, model: ModelConfig, rows: int, context: int, kernels: str, fmt: str | None = None
) -> Program:
    """The engine's decode call: a device loop over tokens of all rows; every row has pages for `context` tokens.

    With a format, its weights are quantised.
    """
    width = context // PAGE
    pages = rows * width + 1
    memory = memory_of(model, pages, rows, context)

    def compiled() -> Report:
        sizes = steps.Sizes(pages, model.vocab_size, None, 16, parse_kernels(kernels))
        weights = inference_weights(model, fmt, kernels)
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

    coded = "" if fmt is None else f"{fmt} "
    full = f"decode {name}, {rows} rows of {context} {coded}{kernels}"
    elements = math.prod(memory.latent_NPJ.shape)
    operations = ("latent_attention", "grouped_matmul" if fmt is None else "quantized_matmul")
    return Program(full, compiled, model, rows, 1, elements, operations, kernels)


def prompt(name: str, model: ModelConfig, tiles: int, length: int, fmt: str, kernels: str) -> Program:
    """The engine's call of one layer with experts for `tiles` prompts of `length` tokens, its weights quantised."""
    width = length // PAGE
    pages = tiles * width + 1
    memory = memory_of(model, pages, tiles, length)

    def compiled() -> Report:
        sizes = steps.Sizes(pages, model.vocab_size, None, 1, parse_kernels(kernels))
        x = jax.ShapeDtypeStruct((tiles, length, model.hidden_size), model.dtype)
        arguments = (
            x,
            memory,
            inference_weights(model, fmt, kernels).layers[-1],
            jax.ShapeDtypeStruct((tiles, length), jnp.int32),
            jax.ShapeDtypeStruct((tiles, width), jnp.int32),
            jax.ShapeDtypeStruct((), jnp.int32),
        )
        call = functools.partial(steps.prompt_layer, model, "moe", sizes)
        return compile_for_h200(call, *on_one_device(arguments), donate=(0, 1))

    full = f"prompts {name}, {tiles}x{length} {fmt} {kernels}"
    elements = math.prod(memory.latent_NPJ.shape)
    operations = ("latent_attention", "quantized_matmul")
    return Program(full, compiled, model, tiles * length, 1, elements, operations, kernels)


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
    small = model_16b(layers=3)
    for fmt in ("int4", "int8", "fp8", "fp8+act8"):
        programs += [
            decode("16B-A3B, 3 layers", small, 64, 1024, "mosaic", fmt),
            prompt("16B-A3B, a layer", small, 4, 1024, fmt, "mosaic"),
        ]
    return programs
