"""FP8 matmul against bfloat16: TFLOP/s of the same product in one run, by us, by XLA, and by torch where it is.

`fp8` rounds the activations, then multiplies; `product alone` has them rounded already; bfloat16 multiplies what the
weight's codes stand for, rounded. Nothing is timed that is not within its bound of bfloat16's result in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu.kernels import error_of, failed
from benchmarks.gpu.rivals import to_torch
from benchmarks.gpu.rivals import why_not as why_not_torch
from benchmarks.gpu.timing import bytes_of, poison, sets_for, timed
from dsv3_jax.errors import ConfigError
from dsv3_jax.kernels.fp8_matmul import mosaic_quantize
from dsv3_jax.kernels.fp8_matmul.mosaic_product import product
from dsv3_jax.kernels.fp8_matmul.quantize import quantize_lines
from dsv3_jax.kernels.fp8_matmul.shapes import CODING, SHAPES, Shape
from dsv3_jax.kernels.fp8_matmul.shapes import _forward as fp8
from dsv3_jax.kernels.fp8_matmul.shapes import _inputs as inputs
from dsv3_jax.kernels.grouped_matmul import grouped_matmul
from dsv3_jax.kernels.quantized_matmul import dequantize
from dsv3_jax.kernels.quantized_matmul.mosaic_fp8 import coded, default_tile

Row = dict[str, Any]
NAMES = ("v3_q_b", "v3_o", "v3_dense_gate_up", "v3_q_b_decode", "v3_gate_up", "v3_down", "v3_gate_up_decode")
# Both operands lose all but 3 bits of their mantissa; sums of random signs, relative to the largest one.
BOUND = 0.05


def run(small: bool, calls: int) -> list[Row]:
    """A row a shape."""
    return [compare(name, calls, small) for name in (("interpret", "interpret_experts") if small else NAMES)]


def compare(name: str, calls: int, small: bool) -> Row:
    """Everything that can run of one shape: {"tflops": ..} or why not."""
    shape = SHAPES[name]
    size = bytes_of(shape.arrays()) + 2 * max(shape.experts, 1) * shape.outputs * shape.inputs
    keys = jax.random.split(jax.random.key(3), 2 if small else sets_for(size))
    sets = [inputs(key, shape=shape) for key in keys]
    widths = [(x, _values(codes, scales, shape), *sizes) for x, codes, scales, *sizes in sets]
    wanted = jax.device_get(jax.jit(functools.partial(_bfloat16, name="reference"))(*widths[0]))
    row: Row = {"shape": name, "flops": shape.flops(), "by": {}}

    def add(label: str, function: Callable[..., Any], arrays: list[tuple]) -> None:
        try:
            ready = jax.jit(function).lower(*arrays[0]).compile()
            poison(wanted)
            found = error_of(jax.device_get(ready(*arrays[0])), wanted)
            row["by"][label] = {"error": found, "right": found <= BOUND}
            if found <= BOUND:
                time = timed(ready, arrays, calls).row()
                row["by"][label] |= {"time": time, "tflops": shape.flops() / time["median"] / 1e9}
        except (ConfigError, NotImplementedError, ValueError) as error:
            row["by"][label] = {"refused": str(error).splitlines()[0][:200]}
        except jax.errors.JaxRuntimeError as error:
            row["by"][label] = failed(error)

    for which in ("reference", "mosaic") if shape.experts else ("reference",):
        add(f"bfloat16 {which}", functools.partial(_bfloat16, name=which), widths)
    add("fp8 mosaic", functools.partial(fp8, implementation="mosaic"), sets)
    add("fp8 mosaic, product alone", functools.partial(_alone, shape=shape), _rounded(sets, row))
    if not shape.experts:
        row["by"]["torch scaled_mm, product alone"] = _torch(sets, wanted, shape, calls)
    return row


def _values(codes: jax.Array, scales: jax.Array, shape: Shape) -> jax.Array:
    """The weight in bfloat16, an expert at a time."""
    one = lambda parts: dequantize((*parts, None), CODING, shape.inputs, jnp.bfloat16)  # noqa: E731
    return jax.jit(lambda *parts: jax.lax.map(one, parts) if shape.experts else one(parts))(codes, scales)


def _bfloat16(x: jax.Array, w: jax.Array, *sizes: jax.Array, name: str) -> jax.Array:
    if sizes:
        return grouped_matmul(x, w, *sizes, implementation=name)
    return jnp.dot(x, w.T)


def _rounded(sets: list[tuple], row: Row) -> list[tuple]:
    """The same with x already rounded, as the kernel takes it."""
    try:
        lines = jax.jit(mosaic_quantize.quantize_lines)
        return [(lines(x), *rest) for x, *rest in sets]
    except (ValueError, NotImplementedError) as error:  # no Mosaic here; XLA's give the same numbers
        row["note"] = f"activations rounded by XLA: {str(error).splitlines()[0][:120]}"
        return [(_lined(x), *rest) for x, *rest in sets]


@jax.jit
def _lined(x: jax.Array) -> Any:
    rounded = quantize_lines(x)
    return rounded._replace(scales=jnp.pad(rounded.scales.T, ((0, 0), (0, -x.shape[0] % 4))))


def _alone(x: Any, codes: jax.Array, scales: jax.Array, *sizes: jax.Array, shape: Shape) -> jax.Array:
    w = coded((codes, scales, None))
    if not shape.experts:
        w = jax.tree.map(lambda part: part[None], w)
    groups = sizes[0] if sizes else jnp.full((1,), shape.rows, jnp.int32)
    tile = default_tile(shape.rows, max(shape.experts, 1), shape.outputs)
    return product(x, w, groups, tile, jnp.bfloat16)


def _torch(sets: list[tuple], wanted: Any, shape: Shape, calls: int) -> Row:
    """torch._scaled_mm with the same codes and scales (blocks of 1 x 128 and 128 x 128: CUDA 12.9 or later)."""
    reason = why_not_torch()
    if reason is not None:
        return {"refused": reason}
    import torch

    from benchmarks.gpu.rivals import timed as torch_timed

    tensors = []
    for x, codes, scales in sets:
        rounded = jax.jit(quantize_lines)(x)
        bytes_NK = jax.lax.bitcast_convert_type(rounded.codes, jnp.uint8)
        a, b = (to_torch(t, "cuda").view(torch.float8_e4m3fn) for t in (bytes_NK, codes))
        tensors.append((a, b.t(), to_torch(rounded.scales, "cuda"), to_torch(scales, "cuda").t()))

    def call(a: Any, b: Any, scale_a: Any, scale_b: Any) -> Any:
        return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16)

    try:
        error = error_of([call(*tensors[0]).float().cpu().numpy()], [wanted])
    except (RuntimeError, TypeError, ValueError) as problem:
        return {"refused": str(problem).splitlines()[0][:200]}
    result: Row = {"error": error, "right": error <= BOUND}
    if result["right"]:
        result["time"] = torch_timed(torch, call, tensors, calls, "cuda")
        result["tflops"] = shape.flops() / result["time"]["median"] / 1e9
    return result


def lines(rows: list[Row]) -> str:
    """For people."""
    text = []
    for row in rows:
        text.append(f"fp8 against bfloat16, {row['shape']}")
        for label, one in row["by"].items():
            told = one.get("refused") or (
                f"{one['tflops']:.0f} TFLOP/s, error {one['error']:.1e}"
                if "tflops" in one
                else f"WRONG {one['error']:.1e} {one.get('failed', '')}"
            )
            text.append(f"  {label}: {told}")
    return "\n".join(text)
