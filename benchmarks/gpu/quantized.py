"""Decoding with quantised weights: milliseconds of a product against its floor, the weight's bytes at copy speed.

By the Mosaic kernel and by XLA, beside bfloat16 weights of the same shape (`jnp.dot`) and torch's int4 product where it
is. Nothing is timed that is not within its bound of the reference in float32.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.kernels import error_of, failed
from benchmarks.gpu.rivals import timed as torch_timed
from benchmarks.gpu.rivals import to_torch
from benchmarks.gpu.rivals import why_not as why_not_torch
from benchmarks.gpu.timing import bytes_of, poison, sets_for, timed
from dsv3_jax.errors import ConfigError
from dsv3_jax.kernels.quantized_matmul import dequantize
from dsv3_jax.kernels.quantized_matmul.shapes import (
    BOUND,
    SHAPES,
    Shape,
    arguments,
    coding,
    inputs,
    least_bytes,
    run,
)
from dsv3_jax.quantization.formats import unpack_int4

Row = dict[str, Any]
NAMES = ("v3_o_1", "v3_q_b_16", "v3_kv_a_16", "v3_mlp_16", "a3b_q_64", "a3b_o_1")
ROWS = (1, 16, 64)
FORMATS = ("int4", "int8", "fp8")
TORCH = "torch int4pack_mm"


def measure(small: bool, calls: int, peaks: Row) -> list[Row]:
    """A row for every shape, format and number of tokens."""
    names, counts = (("interpret",), (16,)) if small else (NAMES, ROWS)
    return [
        compare(name, SHAPES[name]._replace(rows=rows), text, calls, peaks, small)
        for name, text, rows in itertools.product(names, FORMATS, counts)
    ]


def compare(name: str, shape: Shape, text: str, calls: int, peaks: Row, small: bool) -> Row:
    """Everything that can run of one product: its time and share of the floor, or why not."""
    size = bytes_of(arguments(shape, text)) + 2 * shape.outputs * shape.inputs
    keys = jax.random.split(jax.random.key(shape.rows), 2 if small else sets_for(size))
    make = jax.jit(functools.partial(inputs, shape=shape, text=text))
    sets = [make(key) for key in keys]
    whole = jax.jit(
        lambda *parts: dequantize((*parts, None), coding(text, shape.inputs), shape.inputs, jnp.bfloat16)
    )
    wide = [(x, whole(codes, scales)) for x, codes, scales in sets]
    by = functools.partial(run, shape=shape, text=text)
    exact = jax.jit(functools.partial(by, implementation="reference"))
    wanted = jax.device_get(exact(sets[0][0].astype(jnp.float32), *sets[0][1:]))
    floor = 1e3 * least_bytes(shape, text) / peaks["bytes_per_s"]
    row: Row = {
        "shape": name.rpartition("_")[0] or name,
        "format": text,
        "rows": shape.rows,
        "bytes": least_bytes(shape, text),
        "floor_ms": round(floor, 5),
        "by": {},
    }

    def add(label: str, function: Callable[..., Any], arrays: list[tuple]) -> None:
        try:
            ready = jax.jit(function).lower(*arrays[0]).compile()
            poison(wanted)
            found = error_of(jax.device_get(ready(*arrays[0])), wanted)
            row["by"][label] = {"error": found, "right": found <= BOUND}
            if found <= BOUND:
                row["by"][label]["time"] = timed(ready, arrays, calls).row()
        except (ConfigError, NotImplementedError) as error:
            row["by"][label] = {"refused": str(error).splitlines()[0][:200]}
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            row["by"][label] = failed(error)

    for label in ("mosaic", "reference"):
        add(label, functools.partial(by, implementation=label), sets)
    add("bfloat16", lambda x, w: jnp.dot(x, w.T), wide)
    if text == "int4":
        row["by"][TORCH] = _torch(sets, wanted, shape, calls, "cuda")
    for one in row["by"].values():
        if "time" in one:
            one["of_floor"] = floor / one["time"]["median"]
            rival = row["by"]["bfloat16"].get("time", {}).get("median", float("nan"))
            one["of_bfloat16"] = rival / one["time"]["median"]
    return row


def _torch(sets: list[tuple], wanted: Any, shape: Shape, calls: int, device: str) -> Row:
    """torch's product with int4 weights in groups; its scales are bfloat16."""
    reason = why_not_torch() if device == "cuda" else None
    if reason is not None:
        return {"refused": reason}
    import torch

    group = coding("int4", shape.inputs).block_columns
    on_cpu = device == "cpu"

    def packed(codes: jax.Array) -> Any:
        whole = torch.from_numpy(unpack_int4(np.asarray(codes), group))
        if on_cpu:
            return torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole.to(torch.int32), 1)
        pairs = (whole[:, ::2] << 4 | whole[:, 1::2]).to(device)
        return torch.ops.aten._convert_weight_to_int4pack(pairs, 8)

    def call(x: Any, weight: Any, scales_and_zeros: Any) -> Any:
        name = "_weight_int4pack_mm_for_cpu" if on_cpu else "_weight_int4pack_mm"
        return getattr(torch.ops.aten, name)(x, weight, group, scales_and_zeros)

    try:
        tensors = []
        for x, codes, scales in sets:
            own = to_torch(scales, device).t().to(torch.bfloat16)
            pair = torch.stack([own, torch.zeros_like(own)], dim=-1).contiguous()
            tensors.append((to_torch(x, device), packed(codes), pair))
        found = error_of([call(*tensors[0]).float().cpu().numpy()], [wanted])
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        return {"refused": str(error).splitlines()[0][:200]}
    result: Row = {"error": found, "right": found <= 2 * BOUND}
    if result["right"]:
        result["time"] = torch_timed(torch, call, tensors, calls, device)
    return result


def lines(rows: list[Row]) -> str:
    """For people."""
    text = []
    for row in rows:
        text.append(f"{row['format']}, {row['shape']}, {row['rows']} tokens: floor {row['floor_ms']:.4f} ms")
        for label, one in row["by"].items():
            told = one.get("refused") or (
                f"{one['time']['median']:.4f} ms, {one['of_floor']:.2f} of the floor, "
                f"{one['of_bfloat16']:.2f}x bfloat16, error {one['error']:.1e}"
                if "time" in one
                else f"WRONG {one['error']:.1e} {one.get('failed', '')}"
            )
            text.append(f"  {label}: {told}")
    return "\n".join(text)
