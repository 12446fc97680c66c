"""Products with weights that stay quantised: dense, and grouped by expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.quantized_matmul import mosaic, reference
from dsv3_jax.kernels.quantized_matmul import mosaic_fp8 as fp8
from dsv3_jax.kernels.quantized_matmul.coding import Coding
from dsv3_jax.kernels.registry import Implementation, call
from dsv3_jax.kernels.registry import mosaic as hopper

Array = jax.Array

# Best first.
QUANTIZED_MATMUL = {
    "mosaic": hopper(mosaic.quantized_matmul, refuses=mosaic.refuses, shape_class=mosaic.shape_class),
    "reference": Implementation(reference.quantized_matmul),
}
GROUPED_QUANTIZED_MATMUL = {
    "mosaic": hopper(
        mosaic.grouped_quantized_matmul,
        refuses=mosaic.grouped_refuses,
        shape_class=mosaic.grouped_shape_class,
    ),
    "reference": Implementation(reference.grouped_quantized_matmul),
}
# Of weights whose coding has fp8 activations.
FP8_MATMUL = {
    "mosaic": hopper(fp8.fp8_matmul, refuses=fp8.refuses_dense, shape_class=fp8.shape_class_dense),
    "reference": Implementation(reference.quantized_matmul),
}
GROUPED_FP8_MATMUL = {
    "mosaic": hopper(fp8.grouped_fp8_matmul, refuses=fp8.refuses, shape_class=fp8.shape_class),
    "reference": Implementation(reference.grouped_quantized_matmul),
}


def quantized_matmul(
    x_NK: Array,
    codes_RK: Array,
    scales: Array,
    zeros: Array | None = None,
    *,
    coding: Coding,
    implementation: str = "auto",
) -> Array:
    """y[n, r] = sum over k of x[n, k] value[r, k], the weight as stored: [out, in] and quantised.

    The reference makes values in float32, rounds them once to x's dtype, and multiplies with a float32 sum; "mosaic"
    multiplies codes, which x's dtype holds exactly, and scales the float32 sums: one rounding less (it takes e4m3's two
    codes of NaN for 480). With `coding.activations == "int8"` tokens are quantised too (scale max |x| / 127) and sums
    are whole numbers; with "fp8" they are e4m3 with a scale per token and block of columns (`fp8_matmul.quantize`),
    values stay float32 and only y is rounded to x's dtype.
    Differentiable in x (where x is quantised: as if it had not been); the weight is frozen.

    Args:
      x_NK: activations.
      codes_RK: [R, K], or [R, K / 2] for int4 (see `coding`); fp8 as bytes (uint8) or float8_e4m3fn.
      scales: float32 [R blocks, K blocks].
      zeros: uint8 zero points like `scales` (asymmetric int4), or None.
      implementation: "auto", "reference" or "mosaic" (Hopper, 16-bit x; with fp8 activations blocks of 128 x 128,
        otherwise R a multiple of 64).

    Returns:
      y_NR in x's dtype.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
    """
    if x_NK.ndim != 2 or codes_RK.ndim != 2:
        raise ValueError(f"expected x [N, K] and codes [R, K], got {x_NK.shape} and {codes_RK.shape}")
    _check(x_NK.shape[1], codes_RK, scales, zeros, coding)
    arguments = x_NK, _arrays(codes_RK, scales, zeros), coding
    if coding.activations == "fp8":
        return call("fp8_matmul", implementation, FP8_MATMUL, *arguments)
    return call("quantized_matmul", implementation, QUANTIZED_MATMUL, *arguments)


def grouped_quantized_matmul(
    x_ND: Array,
    codes_EFD: Array,
    scales: Array,
    zeros: Array | None,
    group_sizes_E: Array,
    *,
    coding: Coding,
    implementation: str = "auto",
) -> Array:
    """y[n] = value[e(n)] @ x[n], rows sorted by expert, as `grouped_matmul` with a quantised weight.

    Args:
      x_ND: rows sorted by expert; rows after the last group give zeros.
      codes_EFD, scales, zeros: as in `quantized_matmul`, with a leading expert axis.
      group_sizes_E: int32 rows of each expert.

    Returns:
      y_NF in x's dtype.

    Raises:
      ValueError: shapes disagree, the coding has int8 activations, or the implementation is unknown.
    """
    if x_ND.ndim != 2 or codes_EFD.ndim != 3 or group_sizes_E.shape != codes_EFD.shape[:1]:
        raise ValueError(
            f"expected x [N, D], codes [E, F, D], group sizes [E], got {x_ND.shape}, {codes_EFD.shape}, "
            f"{group_sizes_E.shape}"
        )
    _check(x_ND.shape[1], codes_EFD, scales, zeros, coding)
    if coding.activations == "int8":
        raise ValueError("experts take no int8 activations: 'none' or (fp8 weights) 'fp8' expected")
    sizes_E = jnp.asarray(group_sizes_E, jnp.int32)
    arguments = x_ND, _arrays(codes_EFD, scales, zeros), sizes_E, coding
    if coding.activations == "fp8":
        return call("grouped_fp8_matmul", implementation, GROUPED_FP8_MATMUL, *arguments)
    return call("grouped_quantized_matmul", implementation, GROUPED_QUANTIZED_MATMUL, *arguments)


def _arrays(*parts: Array | None) -> tuple[Array | None, ...]:
    return tuple(None if part is None else jnp.asarray(part) for part in parts)


def _check(columns: int, codes: Array, scales: Array, zeros: Array | None, coding: Coding) -> None:
    if codes.shape[-1] != coding.code_columns(columns):
        raise ValueError(f"codes {codes.shape} do not fit {columns} columns as {coding.kind}")
    expected = (*codes.shape[:-2], *coding.scale_shape(codes.shape[-2], columns))
    for name, array in (("scales", scales), ("zeros", zeros)):
        if array is not None and array.shape != expected:
            raise ValueError(f"{name} have shape {array.shape}, expected {expected}")
    if zeros is not None and coding.kind != "int4":
        raise ValueError(f"zero points go with int4, not with {coding.kind}")
