"""Named shapes of products with quantised weights, for tests, benchmarks, compilation checks and tuning."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.kernels.cases import Case, normal
from dsv3_jax.kernels.grouped_matmul.pipeline import SHARED_BYTES
from dsv3_jax.kernels.quantized_matmul.api import grouped_quantized_matmul, quantized_matmul
from dsv3_jax.kernels.quantized_matmul.coding import Coding
from dsv3_jax.kernels.quantized_matmul.mosaic import grouped_tokens_of, tokens_of
from dsv3_jax.kernels.quantized_matmul.mosaic_codes import slices
from dsv3_jax.kernels.quantized_matmul.mosaic_product import REGISTERS, Tile


class Shape(NamedTuple):
    """N R K; experts 0 for a dense product."""

    rows: int
    outputs: int
    inputs: int
    experts: int = 0

    def sizes(self) -> np.ndarray:
        """Group sizes as a balanced router draws them."""
        E = self.experts
        return np.random.default_rng(0).multinomial(self.rows, np.full(E, 1 / E)).astype(np.int32)


SHAPES = {
    "one_token": Shape(1, 12, 64),
    "odd": Shape(3, 37, 96),
    "kv_a": Shape(2, 576, 256),
    "experts_decode": Shape(6, 24, 64, 4),
    "experts_prefill": Shape(70, 24, 64, 4),
    "cpu_100m": Shape(16, 1024, 512),
    # DeepSeek-V3: the widest and the narrowest projection, those that the summed axis must be split for, the dense MLP.
    "v3_q_b_16": Shape(16, 24576, 1536),
    "v3_o_1": Shape(1, 7168, 16384),
    "v3_o_16": Shape(16, 7168, 16384),
    "v3_o_64": Shape(64, 7168, 16384),
    "v3_o_prefill": Shape(4096, 7168, 16384),
    "v3_kv_a_16": Shape(16, 576, 7168),
    "v3_mlp_16": Shape(16, 36864, 7168),
    "v3_experts_8": Shape(8, 4096, 7168, 256),
    "v3_experts_512": Shape(512, 4096, 7168, 256),
    "v3_experts_down_512": Shape(512, 7168, 2048, 256),
    "v3_experts_prefill": Shape(65536, 4096, 7168, 256),
    # 16B-A3B: 64 experts of 1408, six a token.
    "a3b_q_64": Shape(64, 3072, 2048),
    "a3b_o_1": Shape(1, 2048, 2048),
    "a3b_o_16": Shape(16, 2048, 2048),
    "a3b_experts_384": Shape(384, 2816, 2048, 64),
    "a3b_experts_down_384": Shape(384, 2048, 1408, 64),
    # Small enough for the interpreter.
    "interpret": Shape(20, 192, 512),
    "interpret_split": Shape(3, 64, 1024),
    "interpret_experts": Shape(40, 128, 256, 5),
}

# (shape, format) of what is compiled for a GPU and timed there, and of what is interpreted.
DEVICE = [
    *itertools.product(("v3_o_16", "v3_o_64", "a3b_o_1", "a3b_q_64"), ("int4", "int8", "fp8")),
    ("v3_o_1", "int4"),
    ("v3_o_16", "int4a"),
    ("v3_o_16", "int4:64"),
    ("v3_o_16", "int4:32"),
    ("v3_o_16", "int8:128"),
    ("v3_o_prefill", "int4"),
    ("v3_o_prefill", "fp8"),
    ("v3_o_prefill", "int4a:64"),
    ("v3_o_prefill", "int4a:32"),
    ("v3_o_prefill", "int8:64"),
    ("v3_kv_a_16", "fp8"),
    ("v3_q_b_16", "fp8"),
    ("v3_mlp_16", "int8"),
    *itertools.product(("v3_experts_512", "a3b_experts_384"), ("int4", "int8", "fp8")),
    ("v3_experts_8", "int4"),
    ("v3_experts_512", "int4a"),
    ("v3_experts_down_512", "fp8"),
    ("a3b_experts_down_384", "int4"),
    ("v3_experts_prefill", "fp8"),
]
SMALL = [
    *itertools.product(("interpret", "interpret_experts"), ("int4", "int4a", "int8", "int8:64", "fp8")),
    ("interpret_split", "int4"),
]

# Relative to the largest: one rounding to bfloat16 of the result (0.004), of the reference also of every value.
BOUND = 0.01


def coding(text: str, columns: int) -> Coding:
    """ "fp8", "int8", "int8:G", "int4", "int4a", "int4:G": int4 has groups of 128 where it names none."""
    kind, _, group = text.partition(":")
    if kind == "fp8":
        return Coding("fp8", 128, 128)
    if kind == "int8":
        return Coding("int8", 1, int(group or columns))
    return Coding("int4", 1, int(group or 128))


def arguments(shape: Shape, text: str, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
    """Abstract x, codes, scales, zeros (asymmetric int4) and group sizes (experts)."""
    own = coding(text, shape.inputs)
    lead = (shape.experts,) if shape.experts else ()
    codes = (*lead, shape.outputs, own.code_columns(shape.inputs))
    scales = (*lead, *own.scale_shape(shape.outputs, shape.inputs))
    parts = [
        jax.ShapeDtypeStruct((shape.rows, shape.inputs), dtype),
        jax.ShapeDtypeStruct(codes, jnp.int8 if own.kind == "int8" else jnp.uint8),
        jax.ShapeDtypeStruct(scales, jnp.float32),
    ]
    if text.startswith("int4a"):
        parts.append(jax.ShapeDtypeStruct(scales, jnp.uint8))
    return (*parts, *([jax.ShapeDtypeStruct(lead, jnp.int32)] if lead else []))


def inputs(key: jax.Array, shape: Shape, text: str, dtype: Any = jnp.bfloat16) -> tuple[jax.Array, ...]:
    """Codes of every value that is a number, scales between a half and one and a half of what makes y about 1."""
    own, parts = coding(text, shape.inputs), arguments(shape, text, dtype)
    keys = jax.random.split(key, 4)
    x, codes, scales = parts[:3]
    drawn = jax.random.bits(keys[1], codes.shape, jnp.uint8)
    if own.kind == "fp8":
        drawn = jnp.where(drawn & 0x7F == 0x7F, jnp.uint8(0), drawn)
    spread = {"fp8": 120.0, "int8": 74.0, "int4": 5.0}[own.kind]
    found = [normal(keys[0], x), jax.lax.bitcast_convert_type(drawn, codes.dtype)]
    width = jax.random.uniform(keys[2], scales.shape, jnp.float32, 0.5, 1.5)
    found.append(width / (spread * shape.inputs**0.5))
    if text.startswith("int4a"):
        found.append(jax.random.randint(keys[3], scales.shape, 0, 16).astype(jnp.uint8))
    return (*found, *([jnp.asarray(shape.sizes())] if shape.experts else []))


def run(x: jax.Array, *parts: jax.Array, shape: Shape, text: str, implementation: str) -> jax.Array:
    """The product of `arguments`."""
    codes, scales, *rest = parts
    zeros = rest.pop(0) if text.startswith("int4a") else None
    how = dict(coding=coding(text, shape.inputs), implementation=implementation)
    if shape.experts:
        return grouped_quantized_matmul(x, codes, scales, zeros, rest[0], **how)
    return quantized_matmul(x, codes, scales, zeros, **how)


def least_bytes(shape: Shape, text: str) -> int:
    """x, codes, scales and zero points of experts that have rows, and y, once each."""
    x, *parts = arguments(shape, text)
    weight = sum(a.size * a.dtype.itemsize for a in parts if a.ndim > 1)
    if shape.experts:
        weight = weight * int((shape.sizes() > 0).sum()) // shape.experts
    return weight + x.dtype.itemsize * shape.rows * (shape.inputs + shape.outputs)


def tiles(shape: Shape, text: str) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """What to try: every tile that fits shared memory and leaves no part of the sum empty."""
    own = coding(text, shape.inputs)
    cut = slices(own, shape.inputs)
    steps = shape.inputs // cut.columns
    if shape.experts:
        tokens = grouped_tokens_of(shape.rows, shape.experts, cut)
    else:
        tokens = tokens_of(shape.rows, cut)
    splits = (1,) if shape.experts else (1, 2, 3, 4, 8, 16)
    clusters = (1, 2) if tokens > 16 else (1,)
    each = itertools.product({tokens, max(8, tokens // 2)}, REGISTERS, (4, 6, 8, 12), splits, clusters)
    found = [
        tile._asdict()
        for tile in itertools.starmap(Tile, each)
        if tile.shared_bytes(cut) <= SHARED_BYTES
        and -(-steps // tile.splits) * (tile.splits - 1) < steps
        and tile.fits_registers()
        and shape.outputs >= tile.rows * tile.cluster
    ]
    return {"grouped_quantized_matmul" if shape.experts else "quantized_matmul": found}


def cases() -> list[Case]:
    """Forward: backward is the reference's."""
    found = []
    for name, text in (*SMALL, *DEVICE):
        shape, full = SHAPES[name], (name, text) in DEVICE
        found.append(
            Case(
                kernel="grouped_quantized_matmul" if shape.experts else "quantized_matmul",
                program="forward",
                shape=f"{name} {text}",
                size="full" if full else "small",
                function=functools.partial(run, shape=shape, text=text),
                arguments=arguments(shape, text),
                flops=2.0 * shape.rows * shape.outputs * shape.inputs,
                bytes=least_bytes(shape, text),
                bound=BOUND,
                inputs=functools.partial(inputs, shape=shape, text=text),
                tiles=tiles(shape, text) if full else {},
            )
        )
    return found
