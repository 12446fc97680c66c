"""FP8 (e4m3) weights as DeepSeek releases them: codes times one float32 scale per block.

`weight = code * weight_scale_inv[row // block_rows, column // block_columns]`, in float32, rounded once to the
asked dtype. The block size is `quantization_config.weight_block_size`, never inferred from shapes: the last
block of a side may be partial (576 rows have 5 blocks of 128, not 5 of 116).
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from dsv3_jax.errors import ConfigError, DataError

SCALE_SUFFIX = "_scale_inv"

QUANTIZATION_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
"""`quantization_config` of the released V3."""

# Every value of the format, so that a lookup replaces a slow element-wise cast; code 0x7f and 0xff are NaN.
E4M3_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)

# The values of two neighbouring codes by the 16 bits they take: half the lookups.
_PAIRS = E4M3_VALUES[np.arange(1 << 16, dtype=np.uint16).view(np.uint8)].view(np.uint64)

_CACHED_VALUES = 1 << 16  # worked on at a time, so that they stay in the processor's cache


def block_size(hf_config: dict[str, Any]) -> tuple[int, int] | None:
    """`quantization_config.weight_block_size` of a config.json, or None when it has no quantization_config.

    Raises ConfigError for a quantisation other than block-wise FP8.
    """
    quantization = hf_config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise ConfigError(f"config.json: quantization_config must be an object, not {quantization!r}")
    method, fmt = quantization.get("quant_method"), quantization.get("fmt", "e4m3")
    if method != "fp8" or fmt not in ("e4m3", "float8_e4m3fn"):
        raise ConfigError(
            f"config.json: quantization_config: quant_method {method!r}, fmt {fmt!r}: 'fp8', 'e4m3' expected"
        )
    block = quantization.get("weight_block_size")
    if (
        not isinstance(block, (list, tuple))
        or len(block) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in block)
    ):
        raise ConfigError(
            f"config.json: quantization_config.weight_block_size is {block!r}: two sizes such as [128, 128] expected"
        )
    return block[0], block[1]


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """The shape of the scale of a weight: one value per block, partial blocks included."""
    if len(shape) != 2:
        raise DataError(f"an FP8 weight must have two dimensions, not shape {list(shape)}")
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def _decode(codes: np.ndarray, out: np.ndarray) -> None:
    """Values of contiguous codes."""
    flat, table = codes.reshape(-1).view(np.uint8), E4M3_VALUES
    target = out.reshape(-1)
    if flat.size % 2 == 0:
        flat, table, target = flat.view(np.uint16), _PAIRS, target.view(np.uint64)
    # "clip" never clips here; it spares numpy its range check, which costs three times the lookup.
    np.take(table, flat, out=target, mode="clip")


def dequantize(codes: np.ndarray, scale: np.ndarray, block: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """FP8 codes [rows, columns] times their block's scale, in float32, rounded once to `dtype`.

    `codes` may be any whole number of block rows of a larger weight, with the matching rows of `scale`.
    Raises DataError when the scale's shape does not fit.
    """
    expected = scale_shape(codes.shape, block)
    if scale.shape != expected:
        raise DataError(
            f"FP8 weight of shape {list(codes.shape)}: scale has shape {list(scale.shape)}, not {list(expected)}"
        )
    out = np.empty(codes.shape, dtype)
    columns = codes.shape[1]
    step = max(1, min(block[0], _CACHED_VALUES // max(columns, 1)))
    values = np.empty((step, columns), np.float32)
    with np.errstate(invalid="ignore"):  # a NaN code stays a NaN
        for index, row in enumerate(scale.astype(np.float32, copy=False)):
            factors = np.repeat(row, block[1])[None, :columns]
            end = min((index + 1) * block[0], codes.shape[0])
            for start in range(index * block[0], end, step):
                part = values[: min(step, end - start)]
                _decode(codes[start : start + len(part)], part)
                part *= factors
                out[start : start + len(part)] = part
    return out
