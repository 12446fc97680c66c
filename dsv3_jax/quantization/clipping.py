"""Scales of 4-bit groups by search: of some clippings of the largest weight the one whose rounding costs least."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dsv3_jax.kernels.quantized_matmul.coding import SYMMETRIC_ZERO
from dsv3_jax.quantization.formats import Format, Parts, grid, pack_int4, to_codes

CLIPPINGS = (1.0, 0.95, 0.9, 0.85)
"""Shares of the largest weight of a group of 4-bit codes that are tried as the largest code's value."""


def clipped_grid(
    w_BKR: np.ndarray, cost_BK: np.ndarray, fmt: Format, clippings: Sequence[float] = CLIPPINGS
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales and zero points of groups: float32 [B, R], uint8 [B, R] or None.

    Args:
      w_BKR: float32, in each of B the K columns of one group of R rows.
      cost_BK: weighs the errors of a column (squared).
      fmt: int8 has the whole range.
    """
    own = dataclasses.replace(fmt, group=w_BKR.shape[1])
    scales, zeros = grid(w_BKR.transpose(0, 2, 1), own)
    scales_BR = scales[..., 0]
    zeros_BR = None if zeros is None else zeros[..., 0]
    if fmt.kind == "int8":
        return scales_BR, zeros_BR
    zero = np.float32(SYMMETRIC_ZERO) if zeros_BR is None else zeros_BR[:, None].astype(np.float32)
    cost_BK1 = cost_BK[..., None].astype(np.float32)
    chosen_BR, best_BR = scales_BR, np.full(scales_BR.shape, np.inf, np.float32)
    for clipping in clippings:
        scale_BR = scales_BR * np.float32(clipping)
        error = np.clip(np.rint(w_BKR / scale_BR[:, None]), -zero, 15 - zero) * scale_BR[:, None]
        error -= w_BKR
        error *= cost_BK1
        found_BR = np.einsum("bkr,bkr->br", error, error)
        better_BR = found_BR < best_BR
        best_BR = np.where(better_BR, found_BR, best_BR)
        chosen_BR = np.where(better_BR, scale_BR, chosen_BR)
    return chosen_BR, zeros_BR


def quantize_clipped(matrix_RK: np.ndarray, cost_K: np.ndarray, fmt: Format) -> Parts:
    """Round a finite matrix to nearest on the cheapest grids."""
    R, K = matrix_RK.shape
    size = fmt.coding(K).block_columns
    matrix_RK = np.ascontiguousarray(matrix_RK, np.float32)
    groups_GKR = matrix_RK.T.reshape(K // size, size, R)
    scales_GR, zeros_GR = clipped_grid(groups_GKR, cost_K.reshape(-1, size), fmt)
    scales_RG = np.ascontiguousarray(scales_GR.T)
    zeros_RG = None if zeros_GR is None else np.ascontiguousarray(zeros_GR.T)
    codes_RK = to_codes(matrix_RK, scales_RG, zeros_RG, fmt)
    return Parts(codes_RK if fmt.kind == "int8" else pack_int4(codes_RK, size), scales_RG, zeros_RG)
