"""Named shapes of latent attention over the cache, for tests, benchmarks and tuning."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


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


PAGED_SHAPES = {
    "decode": PagedShape(40, 16, 4, 6, 1, 4, 16, 8),
    "draft": PagedShape(40, 16, 4, 6, 3, 4, 16, 8),
    "chunk": PagedShape(40, 16, 2, 6, 50, 8, 16, 8),  # several tiles of queries, the last one short
    "cpu_100m": PagedShape(8 * 512, 64, 16, 32, 1, 16, 128, 32),
    "v3_16_heads": PagedShape(2 * 8192, 64, 128, 64, 1, 16, 512, 64),
    "v3": PagedShape(2 * 8192, 64, 128, 64, 1, 128, 512, 64),
    "v3_draft": PagedShape(2 * 8192, 64, 64, 64, 2, 16, 512, 64),
    "v3_batch_1": PagedShape(2 * 2048, 64, 1, 1024, 1, 128, 512, 64),
}
