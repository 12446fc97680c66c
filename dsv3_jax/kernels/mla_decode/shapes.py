"""Named shapes of latent attention over the cache, for tests, benchmarks and tuning."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.cases import Case, normal


class Shape(NamedTuple):
    """L B T S H C R."""

    layers: int
    batch: int
    tokens: int
    slots: int
    heads: int
    latent: int
    rope: int

    def arrays(self, dtype: jnp.dtype = jnp.float32) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Abstract q, cache, positions."""
        J = self.latent + self.rope
        return (
            jax.ShapeDtypeStruct((self.batch, self.tokens, self.heads, J), dtype),
            jax.ShapeDtypeStruct((self.layers, self.batch, self.slots, J), dtype),
            jax.ShapeDtypeStruct((self.batch, self.tokens), jnp.int32),
        )


SHAPES = {
    "decode": Shape(3, 4, 1, 96, 4, 16, 8),
    "draft": Shape(3, 4, 3, 96, 4, 16, 8),
    "chunk": Shape(3, 2, 50, 96, 8, 16, 8),  # several tiles of queries, the last one short
    "cpu_100m": Shape(8, 16, 1, 2048, 16, 128, 32),
    "v3_16_heads": Shape(61, 128, 1, 4096, 16, 512, 64),
    "v3": Shape(61, 128, 1, 4096, 128, 512, 64),
}


class PagedShape(NamedTuple):
    """N (layers times pages of a layer) P B M T H C R."""

    pages: int
    page: int
    batch: int
    table: int
    tokens: int
    heads: int
    latent: int
    rope: int

    def arrays(self, dtype: jnp.dtype = jnp.float32) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Abstract q, pages, tables, positions."""
        J = self.latent + self.rope
        return (
            jax.ShapeDtypeStruct((self.batch, self.tokens, self.heads, J), dtype),
            jax.ShapeDtypeStruct((self.pages, self.page, J), dtype),
            jax.ShapeDtypeStruct((self.batch, self.table), jnp.int32),
            jax.ShapeDtypeStruct((self.batch, self.tokens), jnp.int32),
        )

    def flops(self, slots: int) -> float:
        """Of the products with `slots` live slots a row: q k^T over J columns, weights times C columns."""
        return 2.0 * self.batch * self.tokens * self.heads * slots * (2 * self.latent + self.rope)

    def bytes(self, slots: int, itemsize: int = 2) -> float:
        """Live slots once, queries in, results out."""
        J, rows = self.latent + self.rope, self.batch * self.tokens * self.heads
        return float(itemsize * (self.batch * slots * J + rows * (J + self.latent)))


PAGED_SHAPES = {
    "decode": PagedShape(40, 16, 4, 6, 1, 4, 16, 8),
    "draft": PagedShape(40, 16, 4, 6, 3, 4, 16, 8),
    "chunk": PagedShape(40, 16, 2, 6, 50, 8, 16, 8),  # several tiles of queries, the last one short
    "cpu_100m": PagedShape(8 * 512, 64, 16, 32, 1, 16, 128, 32),
    "v3_16_heads": PagedShape(2 * 8192, 64, 128, 64, 1, 16, 512, 64),
    "v3": PagedShape(2 * 8192, 64, 128, 64, 1, 128, 512, 64),
    "v3_draft": PagedShape(2 * 8192, 64, 64, 64, 2, 16, 512, 64),
    "v3_batch_1": PagedShape(2 * 2048, 64, 1, 1024, 1, 128, 512, 64),
    "v3_page_16": PagedShape(2 * 8192, 16, 32, 256, 1, 16, 512, 64),
    "lite": PagedShape(2 * 2048, 64, 64, 16, 1, 16, 512, 64),  # V2-Lite, Moonlight: 16 heads, context 1024
    "small_16_heads": PagedShape(13, 64, 3, 4, 1, 16, 128, 64),
    "small_128_heads": PagedShape(9, 64, 2, 4, 1, 128, 128, 64),
    "small_draft": PagedShape(40, 16, 2, 18, 3, 16, 128, 64),
}
# Compiled for a GPU and timed there; the small ones are also interpreted.
FULL = ("v3_16_heads", "v3", "v3_draft", "v3_batch_1", "v3_page_16", "lite")
SMALL = ("small_16_heads", "small_128_heads", "small_draft")


def cases() -> list[Case]:
    """Every row full (timing); small ones with lengths around the ends of pages and blocks."""
    from dsv3_jax.kernels.mla_decode import paged  # it imports this package

    found = []
    for name in (*SMALL, *FULL):
        shape = PAGED_SHAPES[name]
        slots = shape.table * shape.page
        arguments = shape.arrays(jnp.bfloat16)
        found.append(
            Case(
                kernel="paged_latent_attention",
                program="forward",
                shape=name,
                size="small" if name in SMALL else "full",
                function=functools.partial(
                    paged.paged_latent_attention,
                    value_dim=shape.latent,
                    scale=(shape.latent + shape.rope) ** -0.5,
                ),
                arguments=arguments,
                flops=shape.flops(slots),
                bytes=shape.bytes(slots),
                bound=0.01,  # weights and results are bfloat16 (0.004)
                inputs=functools.partial(inputs, shape, full=name in FULL),
                tiles={"paged_latent_attention": TILES},
                implementations=("mosaic", "batched", "reference"),
            )
        )
    return found


TILES = [
    {"least": least, "most": most, "pieces_per_worker": pieces}
    for least in (2, 4)
    for most in (16, 32, 64)
    for pieces in (1, 2, 4)
]


def inputs(shape: PagedShape, key: jax.Array, *, full: bool) -> tuple[jax.Array, ...]:
    """Shuffled tables, no page in two of them; all rows full, or of lengths around the ends of pages."""
    q, pages, tables, positions = shape.arrays(jnp.bfloat16)
    keys = jax.random.split(key, 3)
    ids_BM = jax.random.permutation(keys[2], shape.pages)[: shape.batch * shape.table].reshape(tables.shape)
    slots = shape.table * shape.page
    lengths = [slots] if full else [1, 65, slots, 64, 17]
    length_B = jnp.asarray([lengths[b % len(lengths)] for b in range(shape.batch)])
    positions_BT = length_B[:, None] - shape.tokens + jnp.arange(shape.tokens)[None, :]
    return normal(keys[0], q), normal(keys[1], pages), ids_BM, jnp.maximum(positions_BT, -1)
