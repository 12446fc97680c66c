"""Products with quantised weights by the Mosaic GPU kernel: gradients, tiles, and what is refused."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import shim
from dsv3_jax.kernels.grouped_matmul.pipeline import LINE, SHARED_BYTES
from dsv3_jax.kernels.quantized_matmul.coding import Coding
from dsv3_jax.kernels.quantized_matmul.mosaic_codes import Slices, slices, why_not
from dsv3_jax.kernels.quantized_matmul.mosaic_product import Parts, Tile, product
from dsv3_jax.kernels.quantized_matmul.reference import backward, grouped_backward
from dsv3_jax.kernels.tables import tuned

# Tokens of a tile where one takes all of them.
TOKENS = (8, 16, 32, 64, 128)
MOST_STAGES, MOST_SPLITS = 8, 32


def _refuses(x: jax.Array, parts: Parts, coding: Coding) -> str | None:
    codes = parts[0]
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}; the tensor cores' operands are bfloat16 or float16"
    if x.shape[0] == 0:
        return "there are no rows"
    if codes.shape[-2] % LINE:
        return f"the output width {codes.shape[-2]} is not a multiple of {LINE}"
    if coding.block_rows != 1 and coding.block_rows % LINE:
        return f"blocks of {coding.block_rows} rows; 1 or multiples of {LINE} expected"
    return why_not(coding, x.shape[1])


def refuses(x_NK: jax.Array, parts: Parts, coding: Coding) -> str | None:
    """Why a dense product's arguments are not taken, or None."""
    return _refuses(x_NK, parts, coding)


def grouped_refuses(x_ND: jax.Array, parts: Parts, sizes_E: jax.Array, coding: Coding) -> str | None:
    """Why a grouped product's arguments are not taken, or None."""
    return _refuses(x_ND, parts, coding)


def _class(x: jax.Array, parts: Parts, coding: Coding, tokens: int) -> str:
    zeros = "" if parts[2] is None else "a"
    block = f"{coding.block_rows}x{coding.block_columns}" if coding.block_columns < x.shape[1] else "rows"
    return f"r{parts[0].shape[-2]}-k{x.shape[1]}-{coding.kind}{zeros}-{block}-tokens{tokens}-{x.dtype.name}"


def shape_class(x_NK: jax.Array, parts: Parts, coding: Coding) -> str:
    """Widths, coding, type, and the tokens of a tile."""
    return _class(x_NK, parts, coding, tokens_of(x_NK.shape[0], slices(coding, x_NK.shape[1])))


def grouped_shape_class(x_ND: jax.Array, parts: Parts, sizes_E: jax.Array, coding: Coding) -> str:
    """Widths, coding, type, and the tokens of a tile."""
    return _class(
        x_ND, parts, coding, grouped_tokens_of(x_ND.shape[0], sizes_E.shape[0], slices(coding, x_ND.shape[1]))
    )


def most_tokens(cut: Slices) -> int:
    """Of a tile: what registers hold beside two sets of sums, a slice's floats, and the scales of its groups."""
    return {1: 128, 2: 96 if cut.pieces == 4 else 128, 4: 64}.get(cut.groups, 32)


def tokens_of(N: int, cut: Slices) -> int:
    """Tokens of a tile of the dense product."""
    return min(next((n for n in TOKENS if n >= N), TOKENS[-1]), most_tokens(cut))


def grouped_tokens_of(N: int, E: int, cut: Slices) -> int:
    """Tokens of a tile for experts that have N / E on average, some twice as many."""
    return tokens_of(-(-2 * N // E), cut)


def deepest(tile: Tile, cut: Slices, steps: int) -> Tile:
    """With as many slices in flight as shared memory holds, a block's steps take and MOST_STAGES allows."""
    most = min(MOST_STAGES, max(2, steps))
    each = [tile._replace(stages=stages) for stages in range(1, most + 1)]
    return [one for one in each if one.shared_bytes(cut) <= SHARED_BYTES][-1]


def default_tile(N: int, R: int, K: int, coding: Coding) -> Tile:
    """The dense product's tile where the table has none."""
    cut = slices(coding, K)
    tokens, steps, cores = tokens_of(N, cut), K // cut.columns, shim.sm_count()
    down = -(-N // tokens)

    def slices_read(tile: Tile) -> int:
        """By the busiest block."""
        return -(-(-(-R // tile.rows) * down * tile.splits) // cores) * -(-steps // tile.splits)

    def cost(tile: Tile) -> float:
        """Bytes of codes for the busiest block, and of the parts of the sums, written and read again."""
        parts = 2 * 4 * tile.splits * R * down * tokens / cores if tile.splits > 1 else 0.0
        read = slices_read(tile) * tile.rows * 2 * cut.line + parts
        # Two warpgroups hide less of each other's waiting than four: a guess, not measured.
        return read if tile.warpgroups > 2 else 1.1 * read

    splits = [n for n in range(1, min(steps, MOST_SPLITS) + 1) if -(-steps // n) * (n - 1) < steps]
    best = min((Tile(tokens, w, 1, n) for w in _warpgroups(R, tokens, cut) for n in splits), key=cost)
    return deepest(best, cut, slices_read(best))


def _warpgroups(R: int, tokens: int, cut: Slices) -> tuple[int, ...]:
    """Four where their registers suffice (scales of many groups take some) and none is without rows; or two."""
    return (4, 2) if tokens <= 16 and cut.groups <= 2 and R % (4 * LINE) == 0 else (2,)


def default_grouped_tile(N: int, E: int, F: int, K: int, coding: Coding) -> Tile:
    """The grouped product's tile where the table has none."""
    cut = slices(coding, K)
    tokens = grouped_tokens_of(N, E, cut)
    return deepest(Tile(tokens, _warpgroups(F, tokens, cut)[0]), cut, MOST_STAGES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def quantized_matmul(x_NK: jax.Array, parts: Parts, coding: Coding) -> jax.Array:
    """See `api.quantized_matmul`. Codes are multiplied as they are and sums scaled: no value is rounded before."""
    default = default_tile(x_NK.shape[0], parts[0].shape[0], x_NK.shape[1], coding)
    tile = tuned("quantized_matmul", shape_class(x_NK, parts, coding), default)
    return product(x_NK, parts, coding, tile)


quantized_matmul.defvjp(
    lambda x_NK, parts, coding: (quantized_matmul(x_NK, parts, coding), (parts, x_NK.shape[1])),
    backward,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_quantized_matmul(x_ND: jax.Array, parts: Parts, sizes_E: jax.Array, coding: Coding) -> jax.Array:
    """See `api.grouped_quantized_matmul`. A row's result is bitwise independent of the other rows and of its place."""
    (N, D), (E, F) = x_ND.shape, parts[0].shape[:2]
    default = default_grouped_tile(N, E, F, D, coding)
    tile = tuned("grouped_quantized_matmul", grouped_shape_class(x_ND, parts, sizes_E, coding), default)
    return product(x_ND, parts, coding, tile, sizes_E)


grouped_quantized_matmul.defvjp(
    lambda x_ND, parts, sizes_E, coding: (
        grouped_quantized_matmul(x_ND, parts, sizes_E, coding),
        (parts, sizes_E, x_ND.shape[1]),
    ),
    grouped_backward,
)
