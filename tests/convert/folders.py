"""Hugging Face folders for tests, written byte by byte without the code under test."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import abstract_variables as _abstract_variables
from tests.golden import cases

abstract_variables = functools.cache(_abstract_variables)  # tracing is most of a small test's time

BF16, F8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(BF16): "BF16",
    np.dtype(F8): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
    np.dtype(np.int64): "I64",
}


def safetensors_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    """One safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape)}
        header[name]["data_offsets"] = [len(data), len(data) + array.nbytes]
        data += array.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def write(folder: Path, raw: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """A folder with config.json, `shards` files and, for more than one, their index; neighbours are spread."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return folder
    groups = [dict(list(tensors.items())[i::shards]) for i in range(shards)]
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        (folder / file).write_bytes(safetensors_bytes(group))
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@functools.cache
def _float32(name: str, mtp: int) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    case = cases.CASES[name]
    cfg = cases.with_mtp(case, mtp) if mtp else case.config
    return cfg, cases.hf_tensors(case, cfg)


def tensors_of(
    name: str, *, mtp: int = 0, dtype: Any = np.float32
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and tensors of a case: weights in `dtype`, router biases float32.

    With a multi-token module it carries copies of embedding and head, as released checkpoints do.
    """
    case, cfg, tensors = cases.CASES[name], *_float32(name, mtp)
    tensors = dict(tensors)
    raw = {**case.raw, "num_nextn_predict_layers": mtp, "own_key": {"kept": [1, "two", None]}}
    for depth in range(mtp):
        layer = f"model.layers.{cfg.num_hidden_layers + depth}"
        tensors[f"{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        if not cfg.tie_word_embeddings:
            tensors[f"{layer}.shared_head.head.weight"] = tensors["lm_head.weight"]
    return raw, {n: a if n.endswith("correction_bias") else a.astype(dtype) for n, a in tensors.items()}


def quantized(tensors: dict[str, np.ndarray], block: tuple[int, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Attention and feed-forward matrices as FP8 codes with block scales, the rest as bfloat16, as released."""
    rng = np.random.default_rng(seed)
    result: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        if array.ndim == 2 and "_proj" in name and "eh_proj" not in name:
            rows, columns = array.shape
            codes = rng.integers(0, 256, array.shape, dtype=np.uint8)
            codes[(codes & 0x7F) == 0x7F] = 0  # not NaN
            result[name] = codes.view(F8)
            shape = (-(-rows // block[0]), -(-columns // block[1]))
            result[f"{name}_scale_inv"] = rng.uniform(1e-4, 1e-2, shape).astype(np.float32)
        else:
            result[name] = array if name.endswith("correction_bias") else array.astype(BF16)
    return result


def dequantized(
    tensors: dict[str, np.ndarray], block: tuple[int, int], dtype: Any = BF16
) -> dict[str, np.ndarray]:
    """The formula, element by element."""
    result = {}
    for name, array in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        if array.dtype == F8:
            scale = tensors[f"{name}_scale_inv"]
            rows, columns = np.arange(array.shape[0]) // block[0], np.arange(array.shape[1]) // block[1]
            array = (array.astype(np.float32) * scale[rows][:, columns]).astype(dtype)
        result[name] = array
    return result


def read(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, through nothing but json and numpy."""
    types = {name: dtype for dtype, name in NAMES.items()}
    result = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                flat = np.frombuffer(data[start + begin : start + end], types[entry["dtype"]])
                result[name] = flat.reshape(entry["shape"])
    return result


def assert_same_tensors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Names, dtypes, shapes and bytes agree."""
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name
