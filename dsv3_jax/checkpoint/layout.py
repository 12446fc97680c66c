"""Names and formats of files on disk: native checkpoint folders, and the zarr 3 arrays inside them.

    manifest.json     files with sizes and SHA-256, tree, dtypes; without a valid one there is no checkpoint
    model.yaml        the resolved ModelConfig
    weights/          one Orbax checkpoint of {"params", "router"}
    optimizer/        one Orbax checkpoint (training only)
    train_state.json  step, data position, RNG (training only)
    lora.json         of an adapter alone, whose weights/ holds pairs (a_OA, b_HQO) instead of weights
    tokenizer/  hf/   files that travel: tokenizer; config.json as it came, generation_config.json, ...

Leaves are zarr 3 arrays without compression, a chunk being one Hugging Face tensor. Such a chunk is a file of
the tensor's bytes, so writing and reading one is plain file I/O, and Orbax opens the whole all the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dsv3_jax.errors import DataError
from dsv3_jax.hf.safetensors import parse_json

MANIFEST = "manifest.json"
MODEL = "model.yaml"
WEIGHTS = "weights"
OPTIMIZER = "optimizer"
TRAIN_STATE = "train_state.json"
TOKENIZER = "tokenizer"
HF = "hf"
LORA = "lora.json"  # of an adapter: its rank, scale and leaves, and which base it belongs to
CHECKPOINTS = "checkpoints"
RUN_CONFIG = "config.yaml"
ORBAX_ITEM = "state"  # the folder that Orbax's v1 API gives a pytree

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "tiktoken.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip

_ZARR_TYPES = {
    "float8_e4m3fn": "float8_e4m3fn", "float8_e5m2": "float8_e5m2", "bfloat16": "bfloat16", "float16": "float16",
    "float32": "float32", "float64": "float64", "bool": "bool", "int8": "int8", "int16": "int16", "int32": "int32",
    "int64": "int64", "uint8": "uint8", "uint16": "uint16", "uint32": "uint32", "uint64": "uint64",
}  # fmt: skip

_CHUNK_KEYS = {"name": "default", "configuration": {"separator": "."}}

Kind = Literal["native", "run", "hf"]


def kind_of(folder: Path | str) -> Kind | None:
    """What a folder is: a native checkpoint, a training run, a Hugging Face checkpoint, or None."""
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return "native"
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors*")):
        return "hf"
    if (folder / CHECKPOINTS).is_dir() or (folder / RUN_CONFIG).is_file():
        return "run"
    return None


def leaf_folder(item: Path, path: str) -> Path:
    """Where Orbax keeps the leaf "params/moe/x" of the item saved at `item`."""
    return item / ORBAX_ITEM / path.replace("/", ".")


def chunk_name(index: tuple[int, ...]) -> str:
    """File of one chunk, relative to its leaf's folder: "c.0.1" (with "/" every chunk would cost folders)."""
    return ".".join(["c", *map(str, index)])


def chunk_file(path: str, index: tuple[int, ...], rest: int) -> str:
    """The file of one chunk in a checkpoint folder: leading indices, then `rest` axes that are whole."""
    return str(leaf_folder(Path(WEIGHTS), path) / chunk_name((*index, *(0,) * rest)))


def zarr_metadata(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype) -> str:
    """zarr.json of an uncompressed little-endian array. The chunk divides the shape."""
    assert len(shape) == len(chunk) and all(s % c == 0 for s, c in zip(shape, chunk, strict=True)), (
        shape,
        chunk,
    )
    return json.dumps(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": _ZARR_TYPES[np.dtype(dtype).name],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "chunk_key_encoding": _CHUNK_KEYS,
            "fill_value": False
            if np.dtype(dtype) == np.bool_
            else 0
            if np.dtype(dtype).kind in "iu"
            else 0.0,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        }
    )


def read_zarr_metadata(folder: Path) -> tuple[tuple[int, ...], tuple[int, ...], np.dtype]:
    """Shape, chunk shape and dtype of a leaf as written here. Raises DataError for any other layout."""
    import ml_dtypes  # noqa: F401  registers bfloat16 and the float8 types with numpy's names

    file = folder / "zarr.json"
    if not file.is_file():
        raise DataError(f"{folder}: no zarr.json: the leaf is missing")
    document = parse_json(file.read_bytes(), str(file))
    try:
        codecs = [codec["name"] for codec in document["codecs"]]
        shape = tuple(document["shape"])
        chunk = tuple(document["chunk_grid"]["configuration"]["chunk_shape"])
        dtype = np.dtype(document["data_type"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: not the description of an array ({error!r})") from error
    if codecs != ["bytes"] or document.get("chunk_key_encoding") != _CHUNK_KEYS:
        raise DataError(f"{file}: codecs {codecs}; an uncompressed array in plain chunks expected")
    return shape, chunk, dtype


def chunk_grid(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Indices of all chunks, in row-major order."""
    yield from np.ndindex(*(s // c for s, c in zip(shape, chunk, strict=True)))


def default_chunk(shape: tuple[int, ...], itemsize: int, limit: int = 64 << 20) -> tuple[int, ...]:
    """A chunk of at most `limit` bytes that splits leading axes only, for leaves without a Hugging Face name."""
    chunk = list(shape)
    for axis, size in enumerate(shape):
        rest = math.prod(chunk) // max(size, 1) * itemsize
        if rest * size <= limit:
            break
        chunk[axis] = next((n for n in range(limit // rest, 1, -1) if size % n == 0), 1)
    return tuple(chunk)


def describe(folder: Path | str) -> dict[str, Any]:
    """Counts of a folder for messages: files and bytes."""
    sizes = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
    return {"files": len(sizes), "bytes": sum(sizes)}
