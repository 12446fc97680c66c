"""XLA implementation of the grouped matrix product.

A loop visits the experts that have rows, copies (a slice of) that expert's weight once, and runs
over its rows in tiles taken where they lie: nothing is padded, gathered or masked in [N, ...] size,
and every loop has a dynamic trip count, so the work follows the rows. A tile that reaches past its
group keeps what the output already holds there.

Two regimes, chosen from the static shapes:
  - up to ROWS_BY_VECTOR rows per expert (decode): one matrix-vector product per row, over slices of
    the weight small enough to stay in a core's cache. Weight bytes decide here.
  - more (prefill, training): matrix products over big tiles, then small ones for the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv3_jax.kernels.registry import full_precision

# Measured on x86 (jax 0.10): at 8 rows per expert the products by row take 0.7x of the tiled ones, at
# 16 the two are equal.
ROWS_BY_VECTOR = 8
# Weight bytes read per matrix-vector product: 64 rows of 512 floats; half and double are slower.
SLICE_BYTES = 128 * 1024

Carry = Any


def _tiles(N: int, E: int) -> tuple[int, int]:
    """(big, small) rows per tile. Small tiles waste fewer rows at group ends, big ones run faster."""
    average = N / E
    big, small = (64, 16) if average <= 32 else (128, 32) if average <= 128 else (256, 64)
    return min(big, N), min(small, N)


def _live(group_sizes_E: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(number of experts that have rows, their indices first, first row of each expert)."""
    live_E = group_sizes_E > 0
    order_E = jnp.nonzero(live_E, size=live_E.shape[0], fill_value=0)[0].astype(jnp.int32)
    return live_E.sum(), order_E, jnp.cumsum(group_sizes_E) - group_sizes_E


def _rows(x: jax.Array, first: jax.Array, count: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, first, count, 0)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    precision = full_precision(a.dtype)
    return lax.dot_general(a, b, dimensions, precision, preferred_element_type=jnp.float32)


def _for_tiles(
    first: jax.Array,
    size: jax.Array,
    tiles: tuple[int, int],
    visit_big: Callable[[jax.Array, Carry], Carry],
    visit_small: Callable[[jax.Array, jax.Array, Carry], Carry],
    carry: Carry,
) -> Carry:
    """Rows [first, first + size): whole big tiles, then small ones of which the last may reach past the end.

    `visit_big(row, carry)`; `visit_small(row, end, carry)`, rows from `end` on are not the group's.
    """
    big, small = tiles
    wholes = size // big
    carry = lax.fori_loop(0, wholes, lambda t, c: visit_big(first + t * big, c), carry)
    row, rest = first + wholes * big, size - wholes * big
    visit = lambda t, c: visit_small(row + t * small, first + size, c)  # noqa: E731
    return lax.fori_loop(0, (rest + small - 1) // small, visit, carry)


def _window(row: jax.Array, end: jax.Array, count: int, N: int) -> tuple[jax.Array, jax.Array]:
    """A window of `count` rows that covers row .. min(row + count, end): (its start, which rows are meant)."""
    start = jnp.minimum(row, N - count)
    index = start + jnp.arange(count, dtype=jnp.int32)
    return start, ((index >= row) & (index < end))[:, None]


def _by_tile(x_ND: jax.Array, w_EFD: jax.Array, group_sizes_E: jax.Array, contract: int) -> jax.Array:
    """Rows of x times their expert's weight, over the weight's axis `contract` (2: forward, 1: dX)."""
    N = x_ND.shape[0]
    big, small = _tiles(N, w_EFD.shape[0])
    live, order_E, first_E = _live(group_sizes_E)

    def expert(i, y_NF):
        e = order_E[i]
        w_FD = lax.dynamic_index_in_dim(w_EFD, e, 0, keepdims=False)

        def product(row, count):
            return _dot(_rows(x_ND, row, count), w_FD, (1, contract - 1)).astype(x_ND.dtype)

        def visit_big(row, y_NF):
            return lax.dynamic_update_slice(y_NF, product(row, big), (row, 0))

        def visit_small(row, end, y_NF):
            start, own_N1 = _window(row, end, small, N)
            tile = jnp.where(own_N1, product(start, small), _rows(y_NF, start, small))
            return lax.dynamic_update_slice(y_NF, tile, (start, 0))

        return _for_tiles(first_E[e], group_sizes_E[e], (big, small), visit_big, visit_small, y_NF)

    zeros_NF = jnp.zeros((N, w_EFD.shape[3 - contract]), x_ND.dtype)
    return lax.fori_loop(0, live, expert, zeros_NF)


def _by_vector(x_ND: jax.Array, w_EFD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """The forward product one row at a time, each weight slice copied once for all of its rows."""
    N, D = x_ND.shape
    E, F, _ = w_EFD.shape
    fits = [f for f in range(1, F + 1) if F % f == 0 and f * D * w_EFD.dtype.itemsize <= SLICE_BYTES]
    f = max(fits, default=1)
    parts = F // f
    slices_ZfD = w_EFD.reshape(E * parts, f, D)
    live, order_E, first_E = _live(group_sizes_E)

    def weight_slice(i, y_NF):
        e, part = order_E[i // parts], i % parts
        w_fD = lax.dynamic_index_in_dim(slices_ZfD, e * parts + part, 0, keepdims=False)

        def row(n, y_NF):
            y_1f = _dot(_rows(x_ND, n, 1), w_fD, (1, 1)).astype(x_ND.dtype)
            return lax.dynamic_update_slice(y_NF, y_1f, (n, part * f))

        return lax.fori_loop(first_E[e], first_E[e] + group_sizes_E[e], row, y_NF)

    return lax.fori_loop(0, live * parts, weight_slice, jnp.zeros((N, F), x_ND.dtype))


def _weight_gradient(x_ND: jax.Array, dy_NF: jax.Array, group_sizes_E: jax.Array, dtype: Any) -> jax.Array:
    """dW, accumulated in float32 one expert at a time: no [N, F, D], no dense product over experts."""
    N = x_ND.shape[0]
    big, small = _tiles(N, group_sizes_E.shape[0])
    first_E = jnp.cumsum(group_sizes_E) - group_sizes_E

    def product(dy_MF, row):
        return _dot(dy_MF, _rows(x_ND, row, dy_MF.shape[0]), (0, 0))

    def whole(row):
        return product(_rows(dy_NF, row, big), row)

    def rest(count, first, end):
        start, own_N1 = _window(first, end, count, N)
        return product(jnp.where(own_N1, _rows(dy_NF, start, count), 0), start)

    counts = [min(units * small, N) for units in range(1, (big + small - 1) // small + 1)]

    def expert(group):
        first, size = group
        # What is not whole big tiles comes first, in one product: every further one is a pass over [F, D].
        wholes = jnp.maximum(size - 1, 0) // big
        left = size - wholes * big
        dw_FD = lax.switch(
            (left + small - 1) // small,
            [
                lambda first, end: jnp.zeros((dy_NF.shape[1], x_ND.shape[1]), jnp.float32),
                *(functools.partial(rest, count) for count in counts),
            ],
            first,
            first + left,
        )
        first = first + left
        return lax.fori_loop(0, wholes, lambda t, dw_FD: dw_FD + whole(first + t * big), dw_FD).astype(dtype)

    return lax.map(expert, (first_E, group_sizes_E))


@jax.custom_vjp
def grouped_matmul(x_ND: jax.Array, w_EFD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`.

    A row's result is bitwise independent of the other rows, of its place in its group and, within a
    regime (N up to or beyond ROWS_BY_VECTOR * E), of N; XLA:CPU sums a matrix-vector product in
    another order than a matrix product.
    """
    N, E = x_ND.shape[0], w_EFD.shape[0]
    if N == 0:
        return jnp.zeros((0, w_EFD.shape[1]), x_ND.dtype)
    if ROWS_BY_VECTOR * E >= N:
        return _by_vector(x_ND, w_EFD, group_sizes_E)
    return _by_tile(x_ND, w_EFD, group_sizes_E, contract=2)


def _vjp_forward(x_ND, w_EFD, group_sizes_E):
    return grouped_matmul(x_ND, w_EFD, group_sizes_E), (x_ND, w_EFD, group_sizes_E)


def _vjp_backward(saved, dy_NF):
    x_ND, w_EFD, group_sizes_E = saved
    no_gradient = np.zeros(group_sizes_E.shape, jax.dtypes.float0)
    if x_ND.shape[0] == 0:
        return x_ND, jnp.zeros_like(w_EFD), no_gradient
    dx_ND = _by_tile(dy_NF, w_EFD, group_sizes_E, contract=1)
    dw_EFD = _weight_gradient(x_ND, dy_NF, group_sizes_E, w_EFD.dtype)
    return dx_ND, dw_EFD, no_gradient


grouped_matmul.defvjp(_vjp_forward, _vjp_backward)


def grouped_swiglu(x_ND: jax.Array, w_EPFD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """See `api.grouped_swiglu`."""
    E, P, F, D = w_EPFD.shape
    hidden_NX = grouped_matmul(x_ND, w_EPFD.reshape(E, P * F, D), group_sizes_E)
    gate_NF, up_NF = jnp.split(hidden_NX, P, axis=-1)
    return jax.nn.silu(gate_NF) * up_NF
