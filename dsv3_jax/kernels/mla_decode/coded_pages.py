"""Pages of 8-bit codes: half of bfloat16's bytes, about a quarter of float32's.

A slot's latent is codes with a float32 scale for each 128 columns, as in the FP8 cache of FlashMLA
(github.com/deepseek-ai/FlashMLA: 512 e4m3 codes, 4 scales, 64 rotated values); its rotated key, which few bits more
would not make much smaller and which positions are told apart by, stays as it is. An index key is all codes.
A slot's codes follow from its own vector alone, so they do not depend on who is written beside it.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from dsv3_jax.kernels.fp8_matmul.quantize import quantize_lines
from dsv3_jax.kernels.quantized_matmul.coding import e4m3_values

Kind = Literal["int8", "fp8"]

KINDS: tuple[Kind, ...] = ("int8", "fp8")
BLOCK = 128
"""Columns that share a scale; the last block may be partial."""
LARGEST = 127


@struct.dataclass
class CodedPages:
    """Stands where an array of pages does in `paged`: column c of slot s of page n is `codes * scales[.., c // 128]`.

    Attributes:
      codes_NPC: int8, -127 to 127; or e4m3 as bytes (uint8, `coding.e4m3_values`).
      scales_NPG: float32, largest magnitude of the block over 127 or 448; not finite where the vector was not.
      exact_NPR: the columns after C, as they are; None: there are none.
    """

    codes_NPC: jax.Array
    scales_NPG: jax.Array
    exact_NPR: jax.Array | None = None

    @property
    def kind(self) -> Kind:
        """What the codes are."""
        return "int8" if self.codes_NPC.dtype == jnp.int8 else "fp8"

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, P, J], J = C + R: that of the array it stands for."""
        *slots, C = self.codes_NPC.shape
        return (*slots, C + (0 if self.exact_NPR is None else self.exact_NPR.shape[-1]))

    @property
    def ndim(self) -> int:
        return self.codes_NPC.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """Of the columns that are no codes, and so of products with pages; float32 where all are codes."""
        return jnp.dtype(jnp.float32) if self.exact_NPR is None else self.exact_NPR.dtype


def make_coded_pages(
    pages: int,
    page: int,
    columns: int,
    kind: Kind,
    *,
    exact: int = 0,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> CodedPages:
    """Empty pages: `columns` C in codes of a kind, then `exact` R in `dtype`."""
    codes = jnp.zeros((pages, page, columns), jnp.int8 if kind == "int8" else jnp.uint8)
    scales = jnp.zeros((pages, page, -(-columns // BLOCK)), jnp.float32)
    return CodedPages(codes, scales, jnp.zeros((pages, page, exact), dtype) if exact else None)


def quantize(x_BTC: jax.Array, kind: Kind) -> tuple[jax.Array, jax.Array]:
    """Codes [B, T, C] and scales [B, T, G]: to nearest, so int8 is off by at most half a scale.

    A block of zeros has codes of zero. One that holds a NaN or an infinity stands for no finite number.
    """
    if kind == "fp8":
        codes, scales_BTG = quantize_lines(x_BTC, BLOCK)
        return lax.bitcast_convert_type(codes, jnp.uint8), scales_BTG
    *lead, C = x_BTC.shape
    G = -(-C // BLOCK)
    blocks = jnp.pad(x_BTC.astype(jnp.float32), ((0, 0), (0, 0), (0, G * BLOCK - C)))
    blocks = blocks.reshape(*lead, G, BLOCK)
    scales_BTG = jnp.maximum(jnp.abs(blocks).max(-1) / LARGEST, jnp.finfo(jnp.float32).tiny)
    codes = jnp.round(blocks / scales_BTG[..., None]).astype(jnp.int8)
    return codes.reshape(*lead, G * BLOCK)[..., :C], scales_BTG


def write_slots(pages: CodedPages, new_BTJ: jax.Array, at: tuple[jax.Array, jax.Array]) -> CodedPages:
    """The pages with vectors written `at` (page, slot) [B, T]; pages that are out of bounds are not."""
    C = pages.codes_NPC.shape[-1]
    codes_BTC, scales_BTG = quantize(new_BTJ[..., :C], pages.kind)
    exact_NPR = pages.exact_NPR
    if exact_NPR is not None:
        exact_NPR = exact_NPR.at[at].set(new_BTJ[..., C:].astype(exact_NPR.dtype), mode="drop")
    return CodedPages(
        pages.codes_NPC.at[at].set(codes_BTC, mode="drop"),
        pages.scales_NPG.at[at].set(scales_BTG, mode="drop"),
        exact_NPR,
    )


def read_page(pages: jax.Array | CodedPages, page: jax.Array) -> jax.Array:
    """One page [P, J]: in its own type, or in float32 where it holds codes."""

    def one(array_NPJ: jax.Array) -> jax.Array:
        _, P, J = array_NPJ.shape
        return lax.dynamic_slice(array_NPJ, (page, 0, 0), (1, P, J))[0]

    if not isinstance(pages, CodedPages):
        return one(pages)
    values_PC = dequantize(one(pages.codes_NPC), one(pages.scales_NPG))
    if pages.exact_NPR is None:
        return values_PC
    return jnp.concatenate([values_PC, one(pages.exact_NPR).astype(jnp.float32)], axis=-1)


def dequantize(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """float32 [..., C]: what codes [..., C] with scales [..., G] stand for."""
    values = codes.astype(jnp.float32) if codes.dtype == jnp.int8 else e4m3_values(codes)
    if scales.shape[-1] > 1:
        scales = jnp.repeat(scales, BLOCK, axis=-1)[..., : codes.shape[-1]]
    return values * scales
