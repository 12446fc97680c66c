"""Sizes of an engine: what its programs are compiled for and how much memory its pages take."""

from __future__ import annotations

import dataclasses
import functools
import os

import jax

from dsv3_jax.config import AUTO_KERNELS, Kernels, ModelConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.inference.options import MAX_LOGPROBS
from dsv3_jax.kernels.mla_decode.coded_pages import KINDS
from dsv3_jax.model import make_pages

GPU_SHARE = 0.85
"""Of the memory that is free once the weights are loaded; the rest is for what programs compute in."""

MOST_DRAFTS = 8
"""Largest `EngineOptions.speculative`."""

CACHE_DTYPES = ("float32", "bfloat16", *KINDS)
"""Values of `EngineOptions.cache_dtype`."""

TILES = {"cpu": (4, 32)}
MANY_TILES = (16, 128)
"""Tiles and tokens of each by platform: few tokens on the CPU, where a call's time is their number; elsewhere enough
that reading the weights does not dominate (GPU not measured)."""

CPU_BYTES = 1 << 30
"""Pages take no more of a CPU's memory, nor more than a quarter of it."""


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """What an engine is compiled for. Two engines of equal options give a request the same bits."""

    rows: int = 16
    """Requests that decode together."""
    page_size: int = 64
    """Tokens of a page."""
    pages: int | None = None
    """Pages of the cache, one of them kept empty; by default what all rows need at full context, as far as memory
    allows."""
    context: int | None = None
    """Tokens of a request, prompt and new ones, at most; by default the model's."""
    prefill_tiles: int = 0
    """Tiles of one prefill call; 0: by platform (`TILES`). A call computes all of them, however short its prompts."""
    tile: int = 0
    """Tokens of a tile, all of one prompt; 0: by platform."""
    prefix_cache: bool = True
    """Keep pages of prompts for later prompts that begin alike, of the same tenant."""
    steps_per_call: int = 16
    """Tokens that a row may get between two looks of the host, where no prompt waits and no token is streamed."""
    max_logprobs: int | None = 20
    """Largest K of logprobs and prompt_logprobs; None: there are none, which saves compiling for them."""
    cache_dtype: str | None = None
    """Storage of the cache, of `CACHE_DTYPES`; by default the compute type, on the CPU float32 (a 16-bit cache is
    converted as a whole in every layer there). int8 and fp8 hold latents and index keys as codes."""
    keep_kv_b_codes: bool = False
    """Dequantise a quantised kv_b in every call, not once: fewer bytes between calls (`weights.with_whole_kv_b`)."""
    kernels: Kernels = AUTO_KERNELS
    """Which implementation computes each kernel."""
    speculative: int = 0
    """Tokens that the multi-token module drafts at a time, checked together; 0: none. The text is the same."""

    def __post_init__(self) -> None:
        if self.cache_dtype is not None and self.cache_dtype not in CACHE_DTYPES:
            raise ConfigError(
                f"cache-dtype is {self.cache_dtype!r}; expected one of {', '.join(CACHE_DTYPES)}"
            )
        for name, low, high in (
            ("rows", 1, 4096),
            ("page_size", 1, 65536),
            ("pages", 2, 2**31 - 1),
            ("context", 1, 2**31 - 1),
            ("prefill_tiles", 0, 65536),
            ("tile", 0, 65536),
            ("steps_per_call", 1, 1024),
            ("max_logprobs", 0, MAX_LOGPROBS),
            ("speculative", 0, MOST_DRAFTS),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name.replace('_', '-')} is {value}; expected {low} to {high}")

    def layers(self, cfg: ModelConfig) -> int:
        """Layers that the pages are for: the main model's, and the multi-token module's if it drafts."""
        return cfg.num_hidden_layers + (1 if self.speculative else 0)


def resolve(options: EngineOptions, cfg: ModelConfig, shards: int = 1) -> EngineOptions:
    """`options` with every default filled in for this model and the memory that is free now.

    Args: shards: devices that rows, tiles and pages are cut over.
    Raises ConfigError when not even one page fits, when something does not divide by the devices, or nothing can draft.
    """
    tiles, tile = TILES.get(jax.default_backend(), MANY_TILES)
    options = dataclasses.replace(
        options,
        prefill_tiles=options.prefill_tiles or -(-tiles // shards) * shards,
        tile=options.tile or tile,
    )
    for name in ("rows", "prefill_tiles"):
        value = getattr(options, name)
        if value % shards:
            raise ConfigError(
                f"{name.replace('_', '-')} is {value}; expected a multiple of {shards}, the devices"
            )
    if options.speculative and not cfg.num_nextn_predict_layers:
        raise ConfigError(
            f"speculative is {options.speculative}, and the model has no multi-token module that could draft "
            "(num_nextn_predict_layers is 0)"
        )
    context = min(options.context or cfg.max_position_embeddings, cfg.max_position_embeddings)
    dtype = options.cache_dtype or exact_dtype(cfg)
    pages = options.pages
    if pages is None:
        wanted = options.rows // shards * pages_of(context, options.page_size) + 1  # of a device
        page_bytes = token_bytes(cfg, dtype, options.layers(cfg)) * options.page_size
        pages = min(wanted, free_bytes() // page_bytes, (2**31 - 1) // options.layers(cfg))
        if pages < 2:
            raise ConfigError(
                f"no memory for the cache: a page of {options.page_size} tokens takes {page_bytes:,} bytes and "
                f"{free_bytes():,} may be used; two are needed at least"
            )
        pages *= shards
    if pages % shards or pages < 2 * shards:
        raise ConfigError(f"pages is {pages}; expected a multiple of {shards}, the devices, and two for each")
    return dataclasses.replace(options, context=context, cache_dtype=dtype, pages=pages)


def context_of(longest: int, cfg: ModelConfig) -> int:
    """Context for requests of up to `longest` tokens: 256, 512, 1024, ..., so that programs are few, or the model's."""
    return min(max(256, 1 << (longest - 1).bit_length()), cfg.max_position_embeddings)


def pages_of(tokens: int, page_size: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // page_size)


def exact_dtype(cfg: ModelConfig) -> str:
    """Type of what the cache holds as it is: the compute type, on the CPU float32."""
    return "float32" if jax.default_backend() == "cpu" else cfg.dtype


def token_bytes(cfg: ModelConfig, dtype: str, layers: int | None = None) -> int:
    """Bytes of the cache for a token in so many layers, by default those of the main model; scales included."""
    make = functools.partial(make_pages, cfg, 1, 1, layers=layers, dtype=dtype, exact_dtype=exact_dtype(cfg))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make)))


def free_bytes() -> int:
    """Bytes that pages may take on the default device."""
    if jax.default_backend() == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return min(CPU_BYTES, memory // 4)
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(GPU_SHARE * (stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)))
