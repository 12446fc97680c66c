"""Serve a DeepSeek-family checkpoint over HTTP: OpenAI's routes, /generate and a chat page.

python -m dsv3_jax.serving --checkpoint runs/demo
python -m dsv3_jax.serving --checkpoint ~/models/DeepSeek-V2-Lite --port 0 --api-key "$KEY" --rows 32
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Literal

import tyro

from dsv3_jax.errors import ConfigError, DataError, run_main


@dataclasses.dataclass(frozen=True)
class Flags:
    """Serve a checkpoint: --checkpoint DIR. Prints `ready http://HOST:PORT` when requests are taken."""

    checkpoint: Path | None = None
    """Native checkpoint, run folder (its newest step), or Hugging Face folder; required."""
    adapter: Path | None = None
    """LoRA pairs for every request: a LoRA run (its newest step), an adapter of ours, or a PEFT folder."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = 8000
    """Port to listen on; 0 picks a free one."""
    model_id: str | None = None
    """Name that requests give as `model`; the folder's name by default."""
    api_key: str | None = None
    """Key that requests to /v1 and /generate must carry; by default DSV3_API_KEY, which other users cannot see."""
    rows: int = 16
    """Sequences decoded together."""
    context: int | None = None
    """Prompt and answer tokens of a sequence at most; the model's by default."""
    page_size: int = 64
    """Tokens of a page of the cache."""
    pages: int | None = None
    """Pages of the cache; by default what all rows need, as far as memory allows."""
    prefill_tiles: int = 0
    """Tiles of prompts that one step computes; 0: by platform."""
    tile: int = 0
    """Tokens of a tile; 0: by platform."""
    prefix_cache: bool = True
    """Keep prompts' pages for later prompts that begin alike."""
    speculative: int = 0
    """Tokens that the multi-token module drafts at a time; 0: none. The text is the same, sooner."""
    mesh: str | None = None
    """Devices to decode on, all that JAX sees: expert=8, or data=2,expert=4; rows and pages, if given, must be
    multiples of their number. By default one device."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute type; float32 on the CPU, bfloat16 on a GPU."""
    quantize: str | None = None
    """Round attention and feed-forward weights while loading: int8, int8:GROUP, int4:GROUP, int4a:GROUP or fp8."""
    cache_dtype: Literal["float32", "bfloat16", "int8", "fp8"] | None = None
    """Storage of the cache; by default the compute type, on the CPU float32. int8 and fp8: codes, with scales."""
    keep_kv_b_codes: bool = False
    """Dequantise a quantised kv_b in every call, not once when it is loaded: fewer bytes between calls."""
    kernels: str = "auto"
    """Implementation of attention and the experts' products: auto, reference or mosaic, with exceptions such as
    mosaic,grouped_matmul=reference."""
    chat_format: str = "auto"
    """Format of conversations: auto (the checkpoint's template), or a name such as deepseek-v3.1."""
    content_filter: str | None = None
    """A YAML file of rules, or module:attribute; none by default."""
    max_queue: int = 64
    """Sequences that may wait beyond the rows; further requests get a 429."""
    max_reserved_tokens: int | None = None
    """Prompt and answer tokens of all accepted sequences; by default by the size of the cache."""
    default_max_tokens: int = 4096
    """Longest answer to a chat request that names no length."""
    request_timeout: float = 30.0
    """Seconds for a whole request."""
    read_timeout: float = 10.0
    """Seconds for a request's header, and again for its body."""
    write_timeout: float = 30.0
    """Seconds after which a client that takes nothing is cut off."""
    max_connections: int = 1024
    """Open connections; further ones get a 503."""
    stuck_after: float = 120.0
    """Seconds of one engine step after which /livez reports a dead process."""


def main() -> int:
    """Parse, open, serve; returns the exit code."""
    flags = tyro.cli(Flags, prog="python -m dsv3_jax.serving", config=(tyro.conf.FlagCreatePairsOff,))
    if flags.checkpoint is None:
        raise ConfigError("--checkpoint DIR is missing")
    if not 0 <= flags.port < 65536:
        raise ConfigError(f"--port is {flags.port}; expected 0 to 65535")
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the server needs the `serve` extra ({error.name} is missing): ./run setup --extras serve"
        ) from None

    from dsv3_jax.serving.settings import Settings

    common = {field.name for field in dataclasses.fields(Settings)} & {
        field.name for field in dataclasses.fields(Flags)
    }
    settings = Settings(
        **{name: getattr(flags, name) for name in common}
        | {
            "model_id": flags.model_id or flags.checkpoint.absolute().name,
            "api_key": flags.api_key if flags.api_key is not None else os.environ.get("DSV3_API_KEY"),
        }
    )
    from dsv3_jax.config import parse_kernels
    from dsv3_jax.inference.engine import Engine  # after the flags: imports take seconds
    from dsv3_jax.inference.guides import Guides
    from dsv3_jax.inference.load import open_model
    from dsv3_jax.inference.settings import EngineOptions
    from dsv3_jax.parallel.mesh import make_mesh, parse_mesh
    from dsv3_jax.serving.chat import ChatTemplate
    from dsv3_jax.serving.command import serve
    from dsv3_jax.serving.filter import load_filter
    from dsv3_jax.serving.guides import GuideMaker
    from dsv3_jax.serving.service import ServedModel

    sizes = {field.name for field in dataclasses.fields(EngineOptions)} & {
        f.name for f in dataclasses.fields(Flags)
    }
    options = EngineOptions(
        **{name: getattr(flags, name) for name in sizes if name != "kernels"},
        kernels=parse_kernels(flags.kernels),
    )
    mesh = None if flags.mesh is None else make_mesh(parse_mesh(flags.mesh))
    content_filter = None if flags.content_filter is None else load_filter(flags.content_filter)
    opened = open_model(
        flags.checkpoint,
        flags.dtype,
        flags.quantize,
        multi_token=flags.speculative > 0,
        adapter=flags.adapter,
    )
    for note in opened.notes:
        print(f"note: {note}", file=sys.stderr)
    template = None
    try:
        template = ChatTemplate(opened.tokenizer, flags.chat_format)
    except DataError as error:
        if flags.chat_format != "auto":
            raise
        print(f"note: no chat: {error}", file=sys.stderr)
    model = ServedModel(opened.tokenizer, opened.cfg.vocab_size, opened.cfg.bos_token_id, template)

    def make_engine() -> Engine:
        return Engine(
            opened.cfg,
            opened.load(host=mesh is not None),
            options=options,
            eos_ids=opened.eos_ids,
            vocab_limit=opened.vocab_limit,
            mesh=mesh,
        )

    context = min(flags.context or opened.cfg.max_position_embeddings, opened.cfg.max_position_embeddings)
    return serve(
        model,
        settings,
        make_engine,
        host=flags.host,
        port=flags.port,
        context=context,
        content_filter=content_filter,
        guides=GuideMaker(lambda: Guides(opened.tokenizer, opened.cfg.vocab_size, opened.eos_ids)),
    )


if __name__ == "__main__":
    run_main(main)
