"""GPTQ (Frantar et al., arXiv 2210.17323): rounding a matrix column by column, later columns making up for earlier.

With H = sum of x x^T over calibration inputs, the loss of replacing W by W' is tr((W - W') H (W - W')^T). Columns are
rounded in order; the error of one is spread over the columns not yet rounded along the rows of U, the upper triangular
factor of H^-1 = U^T U. Scales of a group are taken when its first column comes up, from the weights as they are by
then: of some clippings the one whose rounding errors, weighed by 1 / U_kk^2 (what an error in column k costs once all
later columns have made up for it), are least.

Columns may also go by falling diagonal of H ("act-order"): those that large inputs meet first, while most others can
still make up for their errors. Groups stay those of neighbouring columns, with scales taken beforehand from the weights
as they were ("static groups"), so what is stored does not tell the order.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
    """Of one H: the upper triangular U with U^T U = H^-1 (damped), and which inputs were always zero.

    order_K: the columns in the order in which they are rounded, and in which U has them; None as they come.
    """

    upper_KK: np.ndarray
    dead_K: np.ndarray
    order_K: np.ndarray | None = None


def factor(hessian_KK: np.ndarray, act_order: bool = False) -> Factor:
    """Factorise H once for all matrices that share its inputs: H = R R^T with R upper triangular, U = R^-1.

    Args:
      act_order: round columns by falling diagonal of H, equal ones as they come.
    Raises:
      DataError: H is not finite.
    """
    if not np.isfinite(hessian_KK).all():
        raise DataError("a weight or an activation that is not finite cannot be quantised")
    H = hessian_KK.astype(np.float64)
    H = (H + H.T) / 2
    dead_K = np.diag(H) <= 0
    H[dead_K, dead_K] = 1.0
    H[np.diag_indices_from(H)] += DAMPING * np.mean(np.diag(H))
    order_K = np.argsort(-np.diag(H), kind="stable") if act_order else None
    if order_K is not None:
        H = H[np.ix_(order_K, order_K)]
    # Cholesky from the last row up: that of the reversed matrix, reversed.
    lower, failed = lapack.dpotrf(H[::-1, ::-1], lower=1, clean=1)
    assert not failed, "a damped sum of outer products is positive definite"
    inverse, failed = lapack.dtrtri(lower, lower=1)
    assert not failed
    return Factor(np.ascontiguousarray(inverse[::-1, ::-1]), dead_K, order_K)


def gptq(
    matrix_RK: np.ndarray,
    hessian_KK: np.ndarray,
    fmt: Format,
    clippings: Sequence[float] = CLIPPINGS,
    act_order: bool = False,
) -> Parts:
    """Quantise one matrix.

    Args:
      matrix_RK: float32 [rows, columns].
      hessian_KK: [columns, columns], sum of outer products of inputs; any scale.
      fmt: int8 or int4; its groups divide the columns.
      clippings: to choose from, for int4.
      act_order: see `factor`.
    Raises:
      DataError: a weight or the Hessian is not finite.
    """
    with threadpool_limits(1):
        own = factor(hessian_KK, act_order)
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
      factor_of: the factor of each matrix, all ordered or none; asked for once, from several threads. At most two for
        each processor are held.
    Raises:
      DataError: a weight that is not finite.
    """
    if not np.isfinite(matrices_BRK).all():
        raise DataError("a weight or an activation that is not finite cannot be quantised")
    B, R, K = matrices_BRK.shape
    rows = min(R, max(1, _PIECE_BYTES // (8 * K)))
    some = max(1, _PIECE_BYTES // (8 * K * R))

    starts, cuts, workers = range(0, B, some), range(0, R, rows), os.cpu_count() or 1
    shared = {
        b: _Shared([partial(factor_of, i) for i in range(b, min(b + some, B))], len(cuts)) for b in starts
    }

    def piece(corner: tuple[int, int]) -> Parts:
        b, r = corner
        with shared[b] as factors:
            return _Rounding(matrices_BRK[b : b + some, r : r + rows], factors, fmt, clippings).parts()

    # Every processor begins with a matrix of its own, so that none waits for another's factor.
    batches = (starts[at : at + workers] for at in range(0, len(starts), workers))
    corners = [(b, r) for batch in batches for r in cuts for b in batch]
    # Products this small gain nothing from several BLAS threads, which on a busy machine wait for each other.
    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        found = dict(zip(corners, pool.map(piece, corners), strict=True))
    return joined([joined([found[b, r] for r in cuts], 1) for b in starts], 0)


class _Shared:
    """Factors that several pieces need: made by the first, let go by the last of so many."""

    def __init__(self, make: Sequence[Callable[[], Factor]], uses: int) -> None:
        self._make, self._left = make, uses
        self._lock = threading.Lock()
        self._factors: list[Factor] | None = None

    def __enter__(self) -> list[Factor]:
        with self._lock:
            if self._factors is None:
                self._factors = [make() for make in self._make]
            return self._factors

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._left -= 1
            if not self._left:
                self._factors = None


def joined(pieces: Sequence[Parts], axis: int) -> Parts:
    """Parts put one after the other."""
    codes, scales, zeros = zip(*pieces, strict=True)
    joined = None if zeros[0] is None else np.concatenate(zeros, axis)
    return Parts(np.concatenate(codes, axis), np.concatenate(scales, axis), joined)


class _Rounding:
    """Matrices being rounded; columns lead, so that all rows of a column lie together.

    w_BKR holds weights for columns to come and, for those done, the errors that the others make up for; its columns and
    the codes' are in the order of rounding.
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
        self.scales_BGR = np.empty((B, K // self.size, R), np.float32)
        self.zeros_BGR = np.empty(self.scales_BGR.shape, np.uint8) if fmt.asymmetric else None
        orders = [one.order_K for one in factors if one.order_K is not None]
        assert len(orders) in (0, B), "all ordered or none"
        self.order_BK = np.stack(orders) if orders else None
        # The group of each column that is rounded, and where a range of columns may be cut.
        self.group_BK = np.broadcast_to(np.arange(K) // self.size, (B, K))
        self.seam = self.size
        if self.order_BK is not None:
            self._static_scales(self.order_BK)

    def _static_scales(self, order_BK: np.ndarray) -> None:
        """All scales from the weights as they are, and then the weights in the order of rounding."""
        place_BK = np.argsort(order_BK, axis=1)
        cost_BK = np.take_along_axis(self._cost(), place_BK, 1)
        for group in range(self.scales_BGR.shape[1]):
            columns = slice(group * self.size, (group + 1) * self.size)
            self._scale(group, self.w_BKR[:, columns], cost_BK[:, columns])
        self.w_BKR = np.take_along_axis(self.w_BKR, order_BK[..., None], 1)
        self.group_BK, self.seam = order_BK // self.size, 1

    def parts(self) -> Parts:
        """Round everything."""
        self._columns(0, self.w_BKR.shape[1])
        codes_BKR = self.codes_BKR
        if self.order_BK is not None:
            codes_BKR = np.take_along_axis(codes_BKR, np.argsort(self.order_BK, axis=1)[..., None], 1)
        codes_BRK = np.ascontiguousarray(codes_BKR.transpose(0, 2, 1))
        codes = codes_BRK if self.fmt.kind == "int8" else pack_int4(codes_BRK, self.size)
        scales, zeros = (
            None if part is None else np.ascontiguousarray(part.transpose(0, 2, 1))
            for part in (self.scales_BGR, self.zeros_BGR)
        )
        assert scales is not None
        return Parts(codes, scales, zeros)

    def _columns(self, start: int, stop: int) -> None:
        """Round columns that have every error from before `start`: halves, each error passed on by one product."""
        width, seam = stop - start, self.seam
        if width == seam and self.order_BK is None:
            columns = slice(start, stop)
            self._scale(start // self.size, self.w_BKR[:, columns], self._cost()[:, columns])
        if width <= (_BLOCK if self.order_BK is not None else min(_BLOCK, seam)):
            return self._block(start, stop)
        middle = start + (width // seam // 2 * seam if width > seam else width // 2)
        self._columns(start, middle)
        spread = self.upper_BKK[:, start:middle, middle:stop].transpose(0, 2, 1)
        self.w_BKR[:, middle:stop] -= spread @ self.w_BKR[:, start:middle]
        return self._columns(middle, stop)

    def _block(self, start: int, stop: int) -> None:
        each = np.arange(len(self.w_BKR))
        for k in range(start, stop):
            weight_BR, group_B = self.w_BKR[:, k], self.group_BK[:, k]
            scale_BR = self.scales_BGR[each, group_B].astype(np.float64)
            offset, low, high = self._levels(each, group_B)
            code_BR = np.clip(np.rint(weight_BR / scale_BR) + offset, low, high)
            self.codes_BKR[:, k] = code_BR
            weight_BR -= (code_BR - offset) * scale_BR
            weight_BR /= self.upper_BKK[:, k, k, None]
            self.w_BKR[:, k + 1 : stop] -= self.upper_BKK[:, k, k + 1 : stop, None] * weight_BR[:, None]

    def _levels(self, each: np.ndarray, group_B: np.ndarray) -> tuple[np.ndarray | float, int, int]:
        """The code of zero, the least and the greatest."""
        if self.fmt.kind == "int8":
            return 0.0, -127, 127
        return 8.0 if self.zeros_BGR is None else self.zeros_BGR[each, group_B].astype(np.float64), 0, 15

    def _cost(self) -> np.ndarray:
        """1 / U_kk for each column in the order of rounding, up to a factor."""
        diagonal_BK = np.diagonal(self.upper_BKK, axis1=1, axis2=2)
        return diagonal_BK.min(1, keepdims=True) / diagonal_BK

    def _scale(self, group: int, w_BKR: np.ndarray, cost_BK: np.ndarray) -> None:
        """Choose the scales of a group of these weights."""
        scales_BR, zeros_BR = clipped_grid(w_BKR.astype(np.float32), cost_BK, self.fmt, self.clippings)
        self.scales_BGR[:, group] = scales_BR
        if self.zeros_BGR is not None and zeros_BR is not None:
            self.zeros_BGR[:, group] = zeros_BR
