"""GPTQ (Frantar et al., arXiv 2210.17323): rounding a matrix column by column, later columns making up for earlier.

With H = sum of x x^T over calibration inputs, the loss of replacing W by W' is tr((W - W') H (W - W')^T). Columns are
rounded in order; the error of one is spread over the columns not yet rounded along the rows of U, the upper triangular
factor of H^-1 = U^T U. Scales of a group are taken when its first column comes up, from the weights as they are by
then: of some clippings the one whose rounding errors, weighed by 1 / U_kk^2 (what an error in column k costs once all
later columns have made up for it), are least.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from scipy.linalg import lapack
from threadpoolctl import threadpool_limits

from dsv3_jax.errors import DataError
from dsv3_jax.quantization.clipping import CLIPPINGS, clipped_grid
from dsv3_jax.quantization.formats import Format, Parts, pack_int4

DAMPING = 0.01
"""Added to the diagonal of H, times its mean: keeps directions that calibration hardly saw in place."""

_BLOCK = 16  # columns between which errors go one at a time; between blocks they go by matrix products
_PIECE_BYTES = 8 << 20  # of float64 weights rounded side by side in one thread


class Factor(NamedTuple):
    """Of one H: the upper triangular U with U^T U = H^-1 (damped), and which inputs were always zero."""

    upper_KK: np.ndarray
    dead_K: np.ndarray


def factor(hessian_KK: np.ndarray) -> Factor:
    """Factorise H once for all matrices that share its inputs: H = R R^T with R upper triangular, U = R^-1.

    Raises DataError where H is not finite.
    """
    if not np.isfinite(hessian_KK).all():
        raise DataError("a weight or an activation that is not finite cannot be quantised")
    H = hessian_KK.astype(np.float64)
    H = (H + H.T) / 2
    dead_K = np.diag(H) <= 0
    H[dead_K, dead_K] = 1.0
    H[np.diag_indices_from(H)] += DAMPING * np.mean(np.diag(H))
    # Cholesky from the last row up: that of the reversed matrix, reversed.
    lower, failed = lapack.dpotrf(H[::-1, ::-1], lower=1, clean=1)
    assert not failed, "a damped sum of outer products is positive definite"
    inverse, failed = lapack.dtrtri(lower, lower=1)
    assert not failed
    return Factor(np.ascontiguousarray(inverse[::-1, ::-1]), dead_K)


def gptq(
    matrix_RK: np.ndarray, hessian_KK: np.ndarray, fmt: Format, clippings: Sequence[float] = CLIPPINGS
) -> Parts:
    """Quantise one matrix.

    Args:
      matrix_RK: float32 [rows, columns].
      hessian_KK: [columns, columns], sum of outer products of inputs; any scale.
      fmt: int8 or int4; its groups divide the columns.
      clippings: to choose from, for int4.
    Raises:
      DataError: a weight or the Hessian is not finite.
    """
    with threadpool_limits(1):
        own = factor(hessian_KK)
    return gptq_each(matrix_RK[None], lambda _: own, fmt, clippings).map(lambda part: part[0])


def gptq_each(
    matrices_BRK: np.ndarray,
    factor_of: Callable[[int], Factor],
    fmt: Format,
    clippings: Sequence[float] = CLIPPINGS,
) -> Parts:
    """Quantise matrices of one shape, each with a factor of its own; in float64.

    Small matrices are rounded side by side and large ones some rows at a time, on all processors: pieces are cut by the
    shape alone, so the result does not depend on their number.

    Args:
      factor_of: the factor of each matrix, asked for once for each of its pieces, from several threads.
    Raises:
      DataError: a weight that is not finite.
    """
    if not np.isfinite(matrices_BRK).all():
        raise DataError("a weight or an activation that is not finite cannot be quantised")
    B, R, K = matrices_BRK.shape
    rows = min(R, max(1, _PIECE_BYTES // (8 * K)))
    some = max(1, _PIECE_BYTES // (8 * K * R))

    def piece(corner: tuple[int, int]) -> Parts:
        b, r = corner
        factors = [factor_of(i) for i in range(b, min(b + some, B))]
        return _Rounding(matrices_BRK[b : b + some, r : r + rows], factors, fmt, clippings).parts()

    corners = [(b, r) for b in range(0, B, some) for r in range(0, R, rows)]
    # Products this small gain nothing from several BLAS threads, which on a busy machine wait for each other.
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(piece, corners))
    across = len(corners) // len(range(0, B, some))
    return joined([joined(found[at : at + across], 1) for at in range(0, len(found), across)], 0)


def joined(pieces: Sequence[Parts], axis: int) -> Parts:
    """Parts put one after the other."""
    codes, scales, zeros = zip(*pieces, strict=True)
    joined = None if zeros[0] is None else np.concatenate(zeros, axis)
    return Parts(np.concatenate(codes, axis), np.concatenate(scales, axis), joined)


class _Rounding:
    """Matrices being rounded; columns lead, so that all rows of a column lie together.

    w_BKR holds weights for columns to come and, for those done, the errors that the others make up for.
    """

    def __init__(
        self, matrices_BRK: np.ndarray, factors: Sequence[Factor], fmt: Format, clippings: Sequence[float]
    ) -> None:
        self.fmt, self.clippings = fmt, clippings
        self.w_BKR = np.ascontiguousarray(matrices_BRK.transpose(0, 2, 1), np.float64)
        self.upper_BKK = np.stack([one.upper_KK for one in factors])
        self.w_BKR[np.stack([one.dead_K for one in factors])] = 0.0
        B, K, R = self.w_BKR.shape
        self.size = fmt.coding(K).block_columns
        self.codes_BKR = np.empty((B, K, R), np.int8 if fmt.kind == "int8" else np.uint8)
        self.scales_BRG = np.empty((B, R, K // self.size), np.float32)
        self.zeros_BRG = np.empty(self.scales_BRG.shape, np.uint8) if fmt.asymmetric else None

    def parts(self) -> Parts:
        """Round everything."""
        self._columns(0, self.w_BKR.shape[1])
        codes_BRK = np.ascontiguousarray(self.codes_BKR.transpose(0, 2, 1))
        codes = codes_BRK if self.fmt.kind == "int8" else pack_int4(codes_BRK, self.size)
        return Parts(codes, self.scales_BRG, self.zeros_BRG)

    def _columns(self, start: int, stop: int) -> None:
        """Round columns that have every error from before `start`: halves, each error passed on by one product."""
        width = stop - start
        if width == self.size:
            self._scale(start // self.size)
        if width <= min(_BLOCK, self.size):
            return self._block(start, stop)
        middle = start + (width // self.size // 2 * self.size if width > self.size else width // 2)
        self._columns(start, middle)
        spread = self.upper_BKK[:, start:middle, middle:stop].transpose(0, 2, 1)
        self.w_BKR[:, middle:stop] -= spread @ self.w_BKR[:, start:middle]
        return self._columns(middle, stop)

    def _block(self, start: int, stop: int) -> None:
        group = start // self.size
        scale_BR = self.scales_BRG[..., group].astype(np.float64)
        offset, low, high = self._levels(group)
        for k in range(start, stop):
            weight_BR = self.w_BKR[:, k]
            code_BR = np.clip(np.rint(weight_BR / scale_BR) + offset, low, high)
            self.codes_BKR[:, k] = code_BR
            weight_BR -= (code_BR - offset) * scale_BR
            weight_BR /= self.upper_BKK[:, k, k, None]
            self.w_BKR[:, k + 1 : stop] -= self.upper_BKK[:, k, k + 1 : stop, None] * weight_BR[:, None]

    def _levels(self, group: int) -> tuple[np.ndarray | float, int, int]:
        """The code of zero, the least and the greatest."""
        if self.fmt.kind == "int8":
            return 0.0, -127, 127
        return 8.0 if self.zeros_BRG is None else self.zeros_BRG[..., group].astype(np.float64), 0, 15

    def _scale(self, group: int) -> None:
        """Choose the group's scales."""
        columns = slice(group * self.size, (group + 1) * self.size)
        diagonal_BK = np.diagonal(self.upper_BKK, axis1=1, axis2=2)[:, columns]
        cost_BK = diagonal_BK.min(1, keepdims=True) / diagonal_BK
        scales_BR, zeros_BR = clipped_grid(
            self.w_BKR[:, columns].astype(np.float32), cost_BK, self.fmt, self.clippings
        )
        self.scales_BRG[..., group] = scales_BR
        if self.zeros_BRG is not None and zeros_BR is not None:
            self.zeros_BRG[..., group] = zeros_BR
