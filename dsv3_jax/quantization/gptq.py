"""GPTQ (Frantar et al., arXiv 2210.17323): rounding a matrix column by column, later columns making up for earlier.

With H = sum of x x^T over calibration inputs, the loss of replacing W by W' is tr((W - W') H (W - W')^T). Columns are
rounded in order; the error of one is spread over the columns not yet rounded along the rows of the Cholesky factor of
H^-1. Scales of a group are taken when its first column comes up, from the weights as they are by then.
"""

from __future__ import annotations

import numpy as np

from dsv3_jax.errors import DataError
from dsv3_jax.quantization.formats import Format, Parts, grid, pack_int4

DAMPING = 0.01
"""Added to the diagonal of H, times its mean: keeps directions that calibration hardly saw in place."""

_BLOCK = 128  # columns whose errors are spread within before they reach the rest


def gptq(matrix: np.ndarray, hessian: np.ndarray, fmt: Format) -> Parts:
    """Quantise one matrix.

    Args:
      matrix: float32 [rows, columns].
      hessian: [columns, columns], sum of outer products of inputs; any scale.
      fmt: int8 or int4; its groups divide the columns.
    Raises:
      DataError: a weight or the Hessian is not finite.
    """
    w = matrix.astype(np.float64)
    K = w.shape[1]
    if not (np.isfinite(w).all() and np.isfinite(hessian).all()):
        raise DataError("a weight or an activation that is not finite cannot be quantised")
    coding = fmt.coding(K)
    size = coding.block_columns
    upper = _inverse_factor(hessian, w)
    scales, zeros = np.empty((len(w), K // size), np.float32), None
    if fmt.asymmetric:
        zeros = np.empty(scales.shape, np.uint8)
    codes = np.empty(w.shape, np.int8 if fmt.kind == "int8" else np.uint8)
    for start in range(0, K, _BLOCK):
        stop = min(start + _BLOCK, K)
        errors = np.zeros((len(w), stop - start))
        for k in range(start, stop):
            group = k // size
            if k % size == 0:
                # The rest of the block has every earlier error; columns beyond it are due at the end of the block.
                ahead = w[:, k : k + size].copy()
                if k + size > stop:
                    ahead[:, stop - k :] -= errors[:, : k - start] @ upper[start:k, stop : k + size]
                found, zero = grid(ahead.astype(np.float32), fmt)
                scales[:, group : group + 1] = found
                if zeros is not None and zero is not None:
                    zeros[:, group : group + 1] = zero
            offset = 0.0 if fmt.kind == "int8" else 8.0 if zeros is None else zeros[:, group].astype(float)
            scale, (low, high) = (
                scales[:, group].astype(float),
                (-127, 127) if fmt.kind == "int8" else (0, 15),
            )
            code = np.clip(np.rint(w[:, k] / scale) + offset, low, high)
            codes[:, k] = code
            value = (code - offset) * scale
            errors[:, k - start] = (w[:, k] - value) / upper[k, k]
            w[:, k + 1 : stop] -= np.outer(errors[:, k - start], upper[k, k + 1 : stop])
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return Parts(codes if fmt.kind == "int8" else pack_int4(codes, size), scales, zeros)


def _inverse_factor(hessian: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Upper triangular U with U^T U = H^-1 of the damped H; columns that no input reaches are cleared in `w`."""
    H = hessian.astype(np.float64)
    H = (H + H.T) / 2
    dead = np.diag(H) <= 0
    H[dead, dead] = 1.0
    w[:, dead] = 0.0
    H[np.diag_indices_from(H)] += DAMPING * np.mean(np.diag(H))
    return np.linalg.cholesky(np.linalg.inv(H)).T
