"""AWQ (Lin et al., arXiv 2306.00978): columns of a matrix that large inputs meet are scaled up before rounding.

A column k times s_k, its input divided by s_k, gives the same product and a smaller rounding error in that column. The
division goes where the input comes from: into the norm before, or into rows of the matrix before, so nothing is left to
do when the model runs. Scales are powers of two, which makes that exact in every floating type: the model with scaled
weights is the model. s_k = rms(x_k)^a, with the exponent of a grid that costs least on the calibration inputs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from dsv3_jax.quantization.formats import Format, dequantize, quantize

EXPONENTS = tuple(i / 10 for i in range(11))
"""Tried for each set of scales; 0 leaves the weights as they are."""


@dataclasses.dataclass(frozen=True)
class Fold:
    """Where the scales of some matrices' columns are undone; paths within a layer's stack.

    Attributes:
      source: a norm; or a matrix whose rows are the inputs: the value rows of kv_b_HWC, the up half of gate_up.
      readers: every leaf that multiplies with those inputs, quantised or not.
    """

    source: str
    readers: tuple[str, ...]


FOLDS = (
    Fold(
        "attention_norm_D",
        (
            "attention/q_HQD",
            "attention/q_a_AD",
            "attention/kv_a_JD",
            "attention/indexer/k_ZD",
            "attention/indexer/weights_YD",
        ),
    ),
    Fold("attention/q_norm_A", ("attention/q_b_HQA", "attention/indexer/q_b_YZA")),
    Fold("attention/kv_norm_C", ("attention/kv_b_HWC",)),
    Fold("attention/kv_b_HWC", ("attention/o_DHU",)),
    Fold(
        "mlp_norm_D",
        ("mlp/gate_up_PID", "mlp/router/router_ED", "mlp/experts/gate_up_EPFD", "mlp/shared/gate_up_PMD"),
    ),
    Fold("mlp/gate_up_PID", ("mlp/down_DI",)),
    Fold("mlp/experts/gate_up_EPFD", ("mlp/experts/down_EDF",)),
    Fold("mlp/shared/gate_up_PMD", ("mlp/shared/down_DM",)),
)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A matrix that is rounded, and the inputs that it multiplies with.

    matrix_RK: float32. moment: gives the sum of x x^T over what this matrix saw, [K, K]. fmt: its format.
    """

    matrix_RK: np.ndarray
    moment: Callable[[], np.ndarray]
    fmt: Format


def layer_scales(
    leaves: Mapping[str, np.ndarray],
    formats: Mapping[str, Format],
    moments: Callable[[str, int], np.ndarray],
    fixed: Container[str],
) -> dict[str, np.ndarray]:
    """For the source of each fold that pays, the scales of its inputs: [B, K], B experts with inputs of their own or 1.

    Args:
      leaves: float32 leaves of one layer by path within its stack, without their layer axis.
      formats: of those that are rounded.
      moments: of a leaf's inputs, for each expert; raises KeyError for a leaf that nothing was recorded of.
      fixed: leaves whose values cannot be changed (codes that are kept); a fold that touches one is left out.
    """
    found = {}
    for one in FOLDS:
        present = [path for path in one.readers if path in leaves]
        if one.source not in leaves or any(path in fixed for path in (one.source, *present)):
            continue
        rounded = [path for path in present if path in formats]
        if not rounded:
            continue
        readers = [
            [
                Reader(matrix_RK, functools.partial(moments, path, b), formats[path])
                for b, matrix_RK in enumerate(_by_inputs(path, leaves[path]))
            ]
            for path in rounded
        ]
        # One BLAS thread each, as in gptq_each.
        with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
            if one.source.endswith("experts/gate_up_EPFD"):
                each = pool.map(lambda reader: best_scales([reader]), readers[0])
                found[one.source] = np.stack(list(each))
            else:
                shared = [reader for own in readers for reader in own]
                found[one.source] = best_scales(shared, pool.map)[None]
    return {source: scales_BK for source, scales_BK in found.items() if (scales_BK != 1).any()}


def _by_inputs(path: str, leaf: np.ndarray) -> np.ndarray:
    """[B, R, K]: experts, or one, with all of their rows on top of each other."""
    axes = 2 if path.endswith("o_DHU") else 1
    K = math.prod(leaf.shape[-axes:])
    return leaf.reshape(len(leaf) if "/experts/" in path else 1, -1, K)


def best_scales(readers: Sequence[Reader], each: Callable[..., Iterable[Any]] = map) -> np.ndarray:
    """float32 [K], powers of two: of one set of inputs, for all of its readers.

    The loss is that of the layer's products, tr((W - W') H (W - W')^T) summed over readers, W' rounded to nearest.

    Args:
      each: `map`, or that of a pool.
    """
    power_K = np.sum([np.diagonal(reader.moment()) for reader in readers], axis=0, dtype=np.float64)
    rms_K = np.sqrt(np.maximum(power_K, max(1e-12 * power_K.max(), 1e-30)))
    tried = [_scales(rms_K, exponent) for exponent in EXPONENTS]
    losses = np.sum(list(each(functools.partial(_losses, tried), readers)), axis=0)
    return tried[int(np.argmin(losses))]


def _scales(rms_K: np.ndarray, exponent: float) -> np.ndarray:
    scales_K = rms_K**exponent
    scales_K = scales_K / np.sqrt(scales_K.min() * scales_K.max())
    return np.exp2(np.clip(np.rint(np.log2(scales_K)), -8, 8)).astype(np.float32)


def _losses(tried: Sequence[np.ndarray], reader: Reader) -> list[float]:
    moment_KK, found = reader.moment().astype(np.float32), []
    for scales_K in tried:
        scaled_RK = reader.matrix_RK * scales_K
        parts = quantize(scaled_RK, reader.fmt)
        error_RK = (dequantize(parts, reader.fmt, scaled_RK.shape[1]) - scaled_RK) / scales_K
        found.append(float(np.vdot(error_RK @ moment_KK, error_RK)))
    return found


def folded(
    leaves: Mapping[str, np.ndarray], scales: Mapping[str, np.ndarray], value_rows: slice
) -> dict[str, np.ndarray]:
    """The leaves of one layer with its scales multiplied in and undone: the same layer.

    Args:
      leaves, scales: as in and from `layer_scales`.
      value_rows: the value part of kv_b_HWC's W.
    """
    result = dict(leaves)
    for one in FOLDS:
        if one.source not in scales:
            continue
        scales_BK = scales[one.source]
        source = result[one.source].copy()
        if one.source.endswith("kv_b_HWC"):
            source[:, value_rows] /= scales_BK.reshape(len(source), -1, 1)
        elif "gate_up" in one.source:
            source[..., 1, :, :] /= scales_BK.reshape(*source.shape[:-3], -1, 1)
        else:
            source /= scales_BK[0]
        result[one.source] = source
        for path in one.readers:
            if path in result:
                leaf = result[path]
                result[path] = (_by_inputs(path, leaf) * scales_BK[:, None]).reshape(leaf.shape)
    return result


def column_scales(path: str, scales: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """What a leaf's columns were multiplied with, [B, K], if with anything."""
    return next((scales[one.source] for one in FOLDS if path in one.readers and one.source in scales), None)
