"""A checkpoint of any kind, opened for decoding."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from dsv3_jax.checkpoint.source import Source, open_source
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.finetune import attach
from dsv3_jax.finetune.files import Adapter, open_adapter
from dsv3_jax.inference.weights import Weights, unstack_layers
from dsv3_jax.model import abstract_variables
from dsv3_jax.quantization.choose import choose_formats
from dsv3_jax.quantization.formats import parse_format
from dsv3_jax.text import Tokenizer


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """What a decoding job needs to know before it loads any weights.

    Attributes:
      cfg: the main model, without the multi-token module unless asked for; `dtype` the compute type.
      tokenizer: the folder's, or the byte tokenizer where it has none.
      eos_ids: from generation_config.json, else config.json, else the tokenizer.
      vocab_limit: ids from here on are never chosen; None without a tokenizer.json.
      identity: what changes when the weights, the config or the tokenizer change.
      load: reads the weights onto the device; with `host=True` onto the host, for a mesh.
      notes: one line each for the user.
    """

    cfg: ModelConfig
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    vocab_limit: int | None
    identity: list[Any]
    load: Callable[..., Weights]
    notes: list[str]


_WITHOUT_MODULE: Any = {
    "num_nextn_predict_layers": 0,
    "mtp_own_embedding": False,
    "mtp_own_head": False,
}


def default_dtype() -> str:
    """float32 on the CPU, bfloat16 elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def open_model(
    folder: str | Path,
    dtype: str | None = None,
    quantize: str | None = None,
    *,
    multi_token: bool = False,
    adapter: str | Path | None = None,
) -> OpenedModel:
    """Open a native checkpoint, a run folder (its newest step) or a Hugging Face folder.

    Weights that are stored quantised stay so in memory.

    Args:
      dtype: compute type; by default `default_dtype()`.
      quantize: format, such as "int8" or "int4:64", that attention and feed-forward weights are rounded to when they
        are loaded.
      multi_token: with the multi-token module, for speculative decoding.
      adapter: LoRA pairs to decode with: a LoRA run, an adapter of ours, or a PEFT folder.
    Raises:
      ConfigError: no checkpoint, or one of another architecture, or an unknown format, or an adapter of another model.
      DataError: a checkpoint that is not whole, or a tokenizer that cannot be read.
    """
    source = open_source(folder, abstract_variables)
    cfg = dataclasses.replace(
        source.cfg,
        dtype=dtype or default_dtype(),
        **({} if multi_token else _WITHOUT_MODULE),
    )
    if multi_token and not cfg.num_nextn_predict_layers:
        raise ConfigError(
            f"{folder}: the checkpoint has no multi-token module, which --speculative drafts with"
        )
    tokenizer = None if source.tokenizer_dir is None else Tokenizer.load(source.tokenizer_dir)
    notes, formats = list(source.notes), source.formats
    if quantize is not None:
        columns = {entry.path: entry.hf_shape[-1] for entry in source.entries}
        formats, more = choose_formats(columns, formats, parse_format(quantize))
        notes += more
    pairs: Adapter | None = None
    if adapter is not None:
        pairs = open_adapter(adapter, source.cfg, source.abstract)
        notes += pairs.notes
        pairs, left_out = pairs.for_decoding(source.abstract, source.folder)
        notes += [*left_out, *pairs.check_model(source.abstract, source.folder, quantize)]
        pairs = pairs if multi_token else pairs.without_module()

    def load(host: bool = False) -> Weights:
        variables = source.load(formats=formats)
        if pairs is not None:
            variables["params"] = attach(variables["params"], pairs.pairs["params"], pairs.lora)
        return unstack_layers(cfg, variables, host=host)

    if tokenizer is None:
        tokenizer = Tokenizer.bytes()
        notes.append("the checkpoint has no tokenizer: text is read and written as bytes")
    real = tokenizer.is_real and tokenizer.can_encode
    return OpenedModel(
        cfg=cfg,
        tokenizer=tokenizer,
        eos_ids=_eos_ids(source, tokenizer),
        vocab_limit=min(tokenizer.vocab_size, cfg.vocab_size) if real else None,
        identity=[*_identity(source, tokenizer), quantize, *([] if pairs is None else [pairs.sha256])],
        load=load,
        notes=notes,
    )


def _eos_ids(source: Source, tokenizer: Tokenizer) -> tuple[int, ...]:
    where, value = "generation_config.json", (source.generation_config or {}).get("eos_token_id")
    if value is None:
        where, value = "the model's config", list(source.cfg.eos_token_id) or list(tokenizer.eos_ids)
    ids = value if isinstance(value, list) else [value]
    for index in ids:
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise DataError(
                f"{source.folder}: eos_token_id in {where} is {value!r}; expected ids of 0 or more"
            )
    return tuple(ids)


def _identity(source: Source, tokenizer: Tokenizer) -> list[Any]:
    """Small files by content, weights by name, size and time of change."""
    folder = source.folder
    parts: list[Any] = [source.kind, str(folder.resolve()), tokenizer.sha256]
    small = [folder / name for name in ("manifest.json", "config.json", "generation_config.json")]
    small += sorted(folder.glob("*.safetensors.index.json"))
    for file in small:
        if file.is_file():
            parts.append([file.name, hashlib.sha256(file.read_bytes()).hexdigest()])
    for file in sorted(folder.glob("*.safetensors")):
        parts.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])
    return parts
