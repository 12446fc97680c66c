from dsv3_jax.kernels.mla_decode.api import latent_attention, write_cache
from dsv3_jax.kernels.mla_decode.int8_pages import Int8Pages, make_int8_pages
from dsv3_jax.kernels.mla_decode.paged import paged_index_scores, paged_latent_attention, write_pages

__all__ = [
    "Int8Pages",
    "latent_attention",
    "make_int8_pages",
    "paged_index_scores",
    "paged_latent_attention",
    "write_cache",
    "write_pages",
]
