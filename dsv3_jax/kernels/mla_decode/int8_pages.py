"""Pages of 8-bit integers with one scale a slot: a quarter of float32's bytes, half of bfloat16's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

LARGEST = 127


@struct.dataclass
class Int8Pages:
    """Stands where an array of pages does in `paged`; slot s of page n holds `codes[n, s] * scales[n, s]`.

    Attributes:
      codes_NPJ: int8, -127 to 127.
      scales_NP: float32, the largest magnitude of the slot's vector divided by 127.
    """

    codes_NPJ: jax.Array
    scales_NP: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes_NPJ.shape

    @property
    def ndim(self) -> int:
        return self.codes_NPJ.ndim

    @property
    def dtype(self) -> jnp.dtype:
        return self.codes_NPJ.dtype


def make_int8_pages(pages: int, page: int, columns: int) -> Int8Pages:
    """Empty pages [N, P, J]."""
    return Int8Pages(jnp.zeros((pages, page, columns), jnp.int8), jnp.zeros((pages, page), jnp.float32))


def quantize(x_BTJ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes and scale of each vector; the error is at most half a scale, a vector of zeros has scale zero."""
    x_BTJ = x_BTJ.astype(jnp.float32)
    scale_BT = jnp.abs(x_BTJ).max(-1) / LARGEST
    codes_BTJ = jnp.round(x_BTJ / jnp.where(scale_BT == 0, 1.0, scale_BT)[..., None])
    return codes_BTJ.astype(jnp.int8), scale_BT


def read_page(pages: jax.Array | Int8Pages, page: jax.Array) -> jax.Array:
    """One page [P, J] in its own type, or in float32."""
    _, P, J = pages.shape
    if not isinstance(pages, Int8Pages):
        return lax.dynamic_slice(pages, (page, 0, 0), (1, P, J))[0]
    codes_PJ = lax.dynamic_slice(pages.codes_NPJ, (page, 0, 0), (1, P, J))[0]
    scales_P = lax.dynamic_slice(pages.scales_NP, (page, 0), (1, P))[0]
    return codes_PJ.astype(jnp.float32) * scales_P[:, None]
