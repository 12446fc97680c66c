from dsv3_jax.kernels.mla_decode.api import latent_attention, write_cache
from dsv3_jax.kernels.mla_decode.coded_pages import CodedPages, make_coded_pages
from dsv3_jax.kernels.mla_decode.paged import paged_index_scores, paged_latent_attention, write_pages

__all__ = [
    "CodedPages",
    "latent_attention",
    "make_coded_pages",
    "paged_index_scores",
    "paged_latent_attention",
    "write_cache",
    "write_pages",
]
