"""Native checkpoint, training run or Hugging Face folder -> Hugging Face safetensors, tensor by tensor.

    python -m convert.to_hf SRC_DIR DST_DIR [--dtype keep|bfloat16|float32|fp8] [--max-shard-size 5GB] [--force]

`keep` gives every tensor the dtype it came in (recorded by `convert.from_hf`), or the stored one for weights that
were trained here; FP8 weights come back as the same codes and scales. `fp8` rounds attention projections and
feed-forward weights the way DeepSeek releases them (e4m3, a float32 scale per 128 x 128 block). config.json is
written in the released dialect, with the unknown keys it came with.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from convert.common import (
    SAFETENSORS_NAMES,
    TORCH_NAMES,
    ExportDtype,
    command,
    fingerprint,
    summary,
    tell,
    text_digest,
)
from dsv3_jax.checkpoint import layout
from dsv3_jax.checkpoint.atomic import check_apart
from dsv3_jax.checkpoint.jobs import Conversion, Job, check_early
from dsv3_jax.checkpoint.native import copy_files
from dsv3_jax.checkpoint.source import Source, open_source
from dsv3_jax.errors import ConfigError
from dsv3_jax.hf.config import to_hf_config
from dsv3_jax.hf.fp8 import QUANTIZATION_CONFIG, SCALE_SUFFIX
from dsv3_jax.hf.plan import is_router
from dsv3_jax.hf.tensors import FP8, StoredTensor
from dsv3_jax.hf.writer import ShardLayout, natural_key, parse_size, plan_shards, write_headers
from dsv3_jax.quantization.choose import chosen_leaves
from dsv3_jax.quantization.formats import FP8_BLOCK, Format, parse_format
from dsv3_jax.quantization.streamed import quantized_pieces


def convert(
    src: Path,
    dst: Path,
    dtype: ExportDtype = "keep",
    max_shard_size: str = "5GB",
    force: bool = False,
    *,
    quiet: bool = True,
) -> ShardLayout:
    """Export weights to a Hugging Face folder.

    Raises:
      ConfigError: flags, no checkpoint at `src`, or an existing `dst` without `force`.
      DataError: the checkpoint is not whole.
      StorageError, OSError: disk full or failing; nothing is left behind.
    """
    from dsv3_jax.model import abstract_variables

    limit = parse_size(max_shard_size)
    check_early(dst, force)
    started = time.monotonic()
    source = open_source(src, abstract_variables)
    check_apart(source.folder, dst)
    if not quiet:
        tell(source.notes)
    tensors = exported(source, dtype)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    origin = {**{name: name for name in tensors}, **source.aliases}
    names = sorted(origin, key=natural_key)
    shards = plan_shards([(n, dtypes[origin[n]], tensors[origin[n]].shape) for n in names], limit)
    config = hf_config(source, tensors)
    jobs = [
        Job(place.name, place.file, place.offset, place.nbytes, tensors[origin[place.name]].pieces)
        for place in shards.places.values()
    ]
    plan = {
        "command": "to_hf",
        "headers": {file: text_digest(header.decode("latin-1")) for file, header in shards.headers.items()},
        "config": config,
        "files": fingerprint(tensor.file for tensor in source.tensors.values()),
    }
    with Conversion(dst, plan, force=force, nbytes=shards.nbytes) as conversion:
        if conversion.already_done:
            return shards
        write_headers(conversion.out, shards)
        conversion.run(jobs, quiet=quiet)
        (conversion.out / "config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        copy_files([*tokenizer_files(source), *source.files], conversion.out)
        conversion.finish()
    if not quiet:
        print(summary(dst, len(jobs), shards.nbytes, started))
    return shards


@dataclasses.dataclass(frozen=True)
class Exported:
    """A tensor of the export: how it is stored, and what makes its flat pieces."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[np.ndarray]]


def exported(source: Source, dtype: str) -> dict[str, Exported]:
    """Every tensor of the export by name, aliases excluded. A router bias keeps its recorded dtype under every cast.

    Raises ConfigError for codes that have no Hugging Face form here (int8, int4).
    """
    fp8 = Format("fp8")
    rounded = set(chosen_leaves({entry.path: 0 for entry in source.entries})) if dtype == "fp8" else set()
    result: dict[str, Exported] = {}
    for entry in source.entries:
        tensor = source.tensors[entry.name]
        coded = entry.path in source.formats and tensor.dtype == FP8
        if coded and (dtype == "keep" or (dtype == "fp8" and entry.path in rounded)):
            result |= _as_stored(tensor)
        elif entry.path in source.formats and dtype == "keep":
            raise ConfigError(
                f"{source.folder}: {entry.path} is {source.formats[entry.path]}, which a Hugging Face folder cannot "
                "hold here: --dtype bfloat16, float32 or fp8 expected"
            )
        elif entry.path in rounded:
            result[entry.name] = Exported(
                FP8, entry.hf_shape, partial(quantized_pieces, tensor, fp8, "codes")
            )
            shape = fp8.part_shapes(entry.hf_shape)["scales"][0]
            scales = partial(quantized_pieces, tensor, fp8, "scales")
            result[entry.name + SCALE_SUFFIX] = Exported("F32", shape, scales)
        else:
            kept = dtype in ("keep", "fp8") or is_router(entry.path)
            stored = source.export_dtypes[entry.name] if kept else SAFETENSORS_NAMES[dtype]
            if stored == FP8:  # quantised in the source, and not in what the export rounds
                stored = tensor.keep_dtype
            result[entry.name] = Exported(stored, entry.hf_shape, partial(tensor.pieces, stored))
    return result


def _as_stored(tensor: StoredTensor) -> dict[str, Exported]:
    names = {"codes": tensor.name, "scales": tensor.name + SCALE_SUFFIX}
    return {
        names[part]: Exported(info.dtype, info.shape, partial(tensor.part_pieces, part))
        for part, info in tensor.parts.items()
    }


def hf_config(source: Source, tensors: dict[str, Exported]) -> dict[str, Any]:
    """config.json of the export: `torch_dtype` is what most of its other weights are, FP8 has its own entry.

    Raises ConfigError for FP8 weights with scales of different blocks: the entry names one size.
    """
    sizes: collections.Counter[str] = collections.Counter()
    for name, tensor in tensors.items():
        if tensor.dtype in TORCH_NAMES and not name.endswith(SCALE_SUFFIX):
            sizes[tensor.dtype] += math.prod(tensor.shape)
    raw = None if source.hf_config is None else dict(source.hf_config)
    coded = [entry for entry in source.entries if tensors[entry.name].dtype == FP8]
    quantization = None
    if coded:
        coded_as = {source.formats.get(entry.path, "fp8") for entry in coded}
        blocks = {_block(fmt) for fmt in coded_as}
        if len(blocks) > 1:
            raise ConfigError(
                f"{source.folder}: FP8 weights with scales of blocks {sorted(blocks)}, of which a Hugging Face folder "
                "names one: --dtype bfloat16 or float32 expected"
            )
        size = list(next(iter(blocks)))
        recorded = (raw or {}).get("quantization_config") or {}
        as_recorded = recorded.get("weight_block_size") == size
        quantization = recorded if as_recorded else {**QUANTIZATION_CONFIG, "weight_block_size": size}
    if raw is not None:
        raw.pop("quantization_config", None)
    config = to_hf_config(source.cfg, raw, dtype=TORCH_NAMES[sizes.most_common(1)[0][0]])
    return config if quantization is None else {**config, "quantization_config": quantization}


def _block(text: str) -> tuple[int, int]:
    """Rows and columns that share a scale in the export of a leaf; what is no FP8 yet is rounded to it."""
    fmt = parse_format(text)
    if fmt.kind != "fp8":
        fmt = Format("fp8")
    return fmt.rows or FP8_BLOCK, fmt.group or FP8_BLOCK


def tokenizer_files(source: Source) -> list[Path]:
    """The tokenizer's files of a source."""
    if source.tokenizer_dir is None:
        return []
    files = sorted(path for path in source.tokenizer_dir.iterdir() if path.is_file())
    return [path for path in files if source.kind == "native" or path.name in layout.TOKENIZER_FILES]


def main(
    src: Positional[Path],
    dst: Positional[Path],
    dtype: ExportDtype = "keep",
    max_shard_size: str = "5GB",
    force: bool = False,
) -> None:
    """Export weights to a Hugging Face folder.

    Args:
      src: native checkpoint, training run folder (its newest valid step), or Hugging Face folder.
      dst: folder to make.
      dtype: of the exported weights; keep restores the dtype each tensor came in; fp8 rounds attention and feed-forward
        weights as DeepSeek releases them. Router biases are never cast.
      max_shard_size: largest size of one safetensors file, such as 5GB or 500MiB.
      force: replace DST if it is empty or a checkpoint.
    """
    convert(src, dst, dtype, max_shard_size, force, quiet=False)


if __name__ == "__main__":
    command("to_hf", main)
