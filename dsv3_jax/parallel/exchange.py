"""Tokens to the devices that hold their experts and results back, inside a `shard_map` with manual axes.

Letters as in `pairs.py`; N is this device's tokens, e its experts. Every device holds the same number of experts,
contiguous ones. Choices are distinct; -1 is none. Cotangents are per device (`check_vma=False`): the loss is the sum of
the devices' own losses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.parallel.pairs import Pairs, add_up, blocks, sort_pairs, spread, window
from dsv3_jax.parallel.repeat import int32, sum_over
from dsv3_jax.parallel.swap import Swap

Array = jax.Array
Compute = Callable[[Array, Array], Array]
"""(rows [R, D] sorted by local expert, int32 group sizes [e]) -> [R, D]; rows after the last group do not matter.

It is called as often as this device's tokens need: collectives in it may only go over axes along which the tokens are
the same (tensor).
"""

# Rows of the experts' buffer over the mean, and of a peer's block over the most that even routing fills.
EXPERT_HEADROOM = 2.0
PEER_HEADROOM = 1.5


def rounded(rows: float) -> int:
    """Buffers are multiples of 8 rows."""
    return max(8, 8 * int(-(-rows // 8)))


def local_experts(
    x_MD: Array, local_MK: Array, weights_MK: Array, compute: Compute, *, experts: int, rows: int
) -> Array:
    """float32 [M, D]: the weighted sum over each token's experts that are here.

    Args:
      local_MK: int32 experts counted from this device's first, distinct in a token; -1: not here.
      experts: how many are here.
      rows: pairs computed at once. More pairs than that are further visits, never dropped.
    """
    M, K = local_MK.shape
    worst = M * min(K, experts)
    rows = min(rows, worst)
    pairs = sort_pairs(local_MK, experts)

    def visit(r: Array, x_MD: Array, weights_MK: Array, *pairs: Array) -> Array:
        at, sizes_e = window(Pairs(*pairs), r * rows, rows)
        return add_up(compute(spread(x_MD, at), sizes_e), weights_MK, at)

    count = -(-jnp.sum(pairs.sizes_G) // rows)
    return sum_over(visit, count, -(-worst // rows), x_MD, weights_MK, *pairs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x_ND: Array, axis: str) -> Array:
    """All devices' tokens; the gradient is summed in float32."""
    return lax.all_gather(x_ND, axis, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _scatter(y_MD: Array, axis: str, dtype: jnp.dtype) -> Array:
    """float32 sums of this device's tokens, cast to `dtype`; the gradient is gathered in that type."""
    return lax.psum_scatter(y_MD, axis, scatter_dimension=0, tiled=True).astype(dtype)


def _gather_forward(x_ND: Array, axis: str) -> tuple[Array, None]:
    return _gather(x_ND, axis), None


def _gather_backward(axis: str, _: None, g_MD: Array) -> tuple[Array]:
    return (_scatter(g_MD.astype(jnp.float32), axis, g_MD.dtype),)


def _scatter_forward(y_MD: Array, axis: str, dtype: jnp.dtype) -> tuple[Array, None]:
    return _scatter(y_MD, axis, dtype), None


def _scatter_backward(axis: str, dtype: jnp.dtype, _: None, g_ND: Array) -> tuple[Array]:
    return (_gather(g_ND, axis).astype(jnp.float32),)


_gather.defvjp(_gather_forward, _gather_backward)
_scatter.defvjp(_scatter_forward, _scatter_backward)


def _pack(numbers_MK: Array, weights_MK: Array) -> Array:
    """One float32 array, so one collective, of choices and weights; numbers below 2^24 are exact."""
    return jnp.concatenate([numbers_MK.astype(jnp.float32), weights_MK], axis=1)


def _unpack(packed: Array) -> tuple[Array, Array]:
    numbers_MK, weights_MK = jnp.split(packed, 2, axis=1)
    return numbers_MK.astype(jnp.int32), weights_MK


def gathered(
    x_ND: Array, experts_NK: Array, weights_NK: Array, compute: Compute, *, axis: str, size: int, experts: int
) -> Array:
    """[N, D]: every device sees every token, computes its own experts, and the results are summed.

    Args:
      experts: on one device.
    """
    N, K = experts_NK.shape
    experts_MK, weights_MK = _unpack(_gather(_pack(experts_NK, weights_NK), axis))
    local_MK = experts_MK - lax.axis_index(axis) * experts
    local_MK = jnp.where((local_MK >= 0) & (local_MK < experts), local_MK, -1)
    rows = rounded(EXPERT_HEADROOM * N * K)
    y_MD = local_experts(_gather(x_ND, axis), local_MK, weights_MK, compute, experts=experts, rows=rows)
    return _scatter(y_MD, axis, x_ND.dtype)


def first_of_peer(peer_NK: Array) -> Array:
    """The peers of each token once: peer_NK with -1 where an earlier choice of the token names the same peer."""
    same_NKK = peer_NK[:, :, None] == peer_NK[:, None, :]
    earlier_KK = jnp.tril(jnp.ones(same_NKK.shape[1:], bool), -1)
    return jnp.where(jnp.any(same_NKK & earlier_KK[None], axis=2), -1, peer_NK)


def exchanged(
    x_ND: Array,
    experts_NK: Array,
    weights_NK: Array,
    compute: Compute,
    *,
    axis: str,
    size: int,
    experts: int,
    fan_out: int,
    capacity_factor: float,
    swap: Swap,
) -> tuple[Array, Array]:
    """[N, D] and this device's dropped pairs (float32): a token goes once to each peer that holds any of its experts.

    With it go its local expert numbers and weights; one row comes back, the weighted sum over that peer's experts in
    x's type. The sender adds its peers' rows in float32. A block of C rows a peer is swapped at a time; a peer that
    needs more than C rows costs every device of the axis another swap (counted, dropless), unless `capacity_factor`
    fixes C and drops what is beyond.

    Args:
      experts: on one device.
      fan_out: the most peers that a token can have.
      capacity_factor: 0, or C in multiples of N * fan_out / size.
      swap: `swap_padded` or `swap_ragged`.
    """
    N, K = experts_NK.shape
    peer_NK = jnp.where(experts_NK < 0, -1, experts_NK // experts)
    group_NK = first_of_peer(peer_NK)
    pairs = sort_pairs(group_NK, size)
    even = N * min(K, fan_out, size) / size
    capacity = min(N, rounded((capacity_factor or PEER_HEADROOM) * even))
    rows_here = rounded(EXPERT_HEADROOM * N * K)

    def visit(
        r: Array, x_ND: Array, weights_NK: Array, experts_NK: Array, group_NK: Array, *pairs: Array
    ) -> Array:
        at, filled = blocks(Pairs(*pairs), group_NK, r * capacity, capacity)
        token_R = at.pair_R // K
        offset_R = jnp.arange(size * capacity, dtype=jnp.int32) // capacity * experts
        local_RK = experts_NK.at[token_R].get(mode="fill", fill_value=-1) - offset_R[:, None]
        # Shifted by one, so that the zeros of rows without a token mean "not there".
        shifted_RK = jnp.where((local_RK >= 0) & (local_RK < experts), local_RK + 1, 0)
        received = lax.all_to_all(filled, axis, 0, 0, tiled=True)
        there = functools.partial(swap, sent=filled, received=received, axis=axis)
        back = functools.partial(swap, sent=received, received=filled, axis=axis)
        came_RK, weights_RK = _unpack(there(_pack(shifted_RK, spread(weights_NK, at))))
        y_RD = local_experts(
            there(spread(x_ND, at)), came_RK - 1, weights_RK, compute, experts=experts, rows=rows_here
        )
        return add_up(back(y_RD.astype(x_ND.dtype)), jnp.ones((N, K), jnp.float32), at)

    operands = (x_ND, weights_NK, experts_NK, group_NK, *pairs)
    if capacity_factor:
        y_ND = visit(int32(0), *operands)
        at, _ = blocks(pairs, group_NK, int32(0), capacity)
        sent_NK = at.place_MK < size * capacity
        reached_NK = jnp.any(
            (peer_NK[:, :, None] == peer_NK[:, None, :]) & sent_NK[:, None, :], axis=2
        )  # this pair's peer was sent the token
        dropped = jnp.sum((experts_NK >= 0) & ~reached_NK, dtype=jnp.float32)
    else:
        most = -(-N // capacity)
        count = int32(1)
        if most > 1:
            count = -(-lax.pmax(jnp.max(pairs.sizes_G), axis) // capacity)
        y_ND, dropped = sum_over(visit, count, most, *operands), jnp.zeros((), jnp.float32)
    return y_ND.astype(x_ND.dtype), dropped
