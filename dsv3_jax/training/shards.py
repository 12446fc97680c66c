"""Token shards on disk.

A folder holds `index.json`, a `tokenizer/` folder, and for each shard two raw little-endian files:

    train-00000.bin   token ids, uint16 (vocabulary of at most 65,536) or uint32
    train-00000.idx   uint64 offsets of its documents, one more than there are documents

    index.json  {"format": "dsv3_jax/tokens/1", "dtype": "uint16", "vocab_size": 258,
                 "tokenizer": {"name": "bytes", "sha256": …}, "source": …,
                 "shards": [{"split": "train", "file": "train-00000.bin", "tokens": …, "documents": …, "sha256": …,
                             "index_file": "train-00000.idx", "index_sha256": …}, …]}

A document is BOS, its text, EOS, and stays within one shard.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.errors import DataError
from dsv3_jax.training.verified import Verified, stamp

FORMAT = "dsv3_jax/tokens/1"
_DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_SHARD_KEYS = {
    "split": str,
    "file": str,
    "tokens": int,
    "documents": int,
    "sha256": str,
    "index_file": str,
    "index_sha256": str,
}
_BLOCK = 1 << 20  # tokens looked at together when a shard is verified: they stay in the processor's cache


class _HashedFile:
    def __init__(self, path: Path) -> None:
        self.path, self.sha = path, hashlib.sha256()
        self._file = open(path, "wb")  # noqa: SIM115  closed by close()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.sha.update(data)

    def close(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self.sha.hexdigest()


class ShardWriter:
    """Writes the shards of one split; `close` returns their entries for index.json."""

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_tokens: int) -> None:
        """A shard is closed once it has `shard_tokens` tokens."""
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._dtype = _DTYPES[dtype_name(vocab_size)]
        self._entries: list[dict[str, Any]] = []
        self._file: _HashedFile | None = None
        self._offsets: list[int] = [0]

    def add(self, ids: np.ndarray) -> None:
        """Append one document, all ids within the vocabulary."""
        if self._file is None:
            self._file = _HashedFile(self._folder / f"{self._split}-{len(self._entries):05d}.bin")
            self._offsets = [0]
        self._file.write(ids.astype(self._dtype).tobytes())
        self._offsets.append(self._offsets[-1] + len(ids))
        if self._offsets[-1] >= self._shard_tokens:
            self._finish()

    def _finish(self) -> None:
        if self._file is None:
            return
        sha, path = self._file.close(), self._file.path
        index = _HashedFile(path.with_suffix(".idx"))
        index.write(np.asarray(self._offsets, "<u8").tobytes())
        self._entries.append(
            {
                "split": self._split,
                "file": path.name,
                "tokens": self._offsets[-1],
                "documents": len(self._offsets) - 1,
                "sha256": sha,
                "index_file": index.path.name,
                "index_sha256": index.close(),
            }
        )
        self._file = None

    def close(self) -> list[dict[str, Any]]:
        """Finish the last shard; the entries of all of them."""
        self._finish()
        return self._entries


def dtype_name(vocab_size: int) -> str:
    """The narrower of the two that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_index(folder: str | Path) -> dict[str, Any]:
    """index.json of a data folder, checked, all files there with the size it gives.

    Raises DataError naming the folder, key or file.
    """
    folder = Path(folder)
    path = folder / "index.json"
    if not path.is_file():
        raise DataError(
            f"{folder}: no token shards here (no index.json); make them with python -m dsv3_jax.training.prepare"
        )
    try:
        index = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else index
        raise DataError(f"{path}: format is {found!r}, expected {FORMAT!r}")
    if index.get("dtype") not in _DTYPES:
        raise DataError(f"{path}: dtype is {index.get('dtype')!r}, expected uint16 or uint32")
    if not isinstance(index.get("vocab_size"), int) or not isinstance(index.get("shards"), list):
        raise DataError(f"{path}: vocab_size must be an integer and shards a list")
    for number, shard in enumerate(index["shards"]):
        for key, kind in _SHARD_KEYS.items():
            if not isinstance(shard, dict) or not isinstance(shard.get(key), kind):
                raise DataError(f"{path}: shards[{number}].{key} is missing or not of type {kind.__name__}")
        sizes = {
            "file": shard["tokens"] * _DTYPES[index["dtype"]].itemsize,
            "index_file": (shard["documents"] + 1) * 8,
        }
        for key, size in sizes.items():
            if Path(shard[key]).name != shard[key]:
                raise DataError(f"{path}: shards[{number}].{key} {shard[key]!r} is not a plain file name")
            file = folder / shard[key]
            have = file.stat().st_size if file.is_file() else None
            if have != size:
                state = "is missing" if have is None else f"has {have} bytes"
                raise DataError(f"{file}: {state}, index.json says {size} bytes")
    return index


class Shard:
    """One shard, memory-mapped. tokens: ids; offsets: of documents (documents + 1)."""

    def __init__(self, folder: Path, entry: dict[str, Any], dtype: str) -> None:
        """`entry`: its part of a checked index. Raises DataError for offsets that are none."""
        self.path, self._entry = folder / entry["file"], entry
        self._index_path = folder / entry["index_file"]
        self.tokens: np.ndarray = _map(self.path, _DTYPES[dtype])
        self.offsets: np.ndarray = _map(self._index_path, np.dtype("<u8"))
        offsets = self.offsets.astype(np.int64)
        if offsets[0] != 0 or offsets[-1] != len(self.tokens) or (np.diff(offsets) < 0).any():
            raise DataError(f"{self._index_path}: offsets do not rise from 0 to {len(self.tokens)}")

    def verify(self, vocab_size: int, known: Verified | None = None) -> None:
        """Compare the checksums and look at every id; DataError naming the file, and the offset of a bad id.

        `known`: files that an earlier start read whole and that have not changed since are not read again.
        """
        for path, array, key in (
            (self._index_path, self.offsets, "index_sha256"),
            (self.path, self.tokens, "sha256"),
        ):
            before, cached = stamp(path), known and known.get(path)
            sha256, highest = cached or _read_whole(array)
            if sha256 != self._entry[key]:
                raise DataError(f"{path}: its SHA-256 is not the one in index.json; the file has changed")
            if array is self.tokens and highest >= vocab_size:
                for start in range(0, len(array), _BLOCK):
                    self.check_ids(start, min(start + _BLOCK, len(array)), vocab_size)
            if known is not None and cached is None:
                known.put(path, before, sha256, highest)

    def check_ids(self, start: int, stop: int, vocab_size: int) -> None:
        """DataError naming file and offset for an id outside the vocabulary (on a device it would be clamped)."""
        block = self.tokens[start:stop]
        if len(block) and int(block.max()) >= vocab_size:
            offset = start + int(np.argmax(block >= vocab_size))
            raise DataError(
                f"{self.path}: token {offset} is {int(self.tokens[offset])}, not below the vocabulary size {vocab_size}"
            )


def _read_whole(array: np.ndarray) -> tuple[str, int]:
    """SHA-256 and highest value (-1: empty) of a mapped file."""
    sha, highest = hashlib.sha256(), -1
    for start in range(0, len(array), _BLOCK):
        block = np.ascontiguousarray(array[start : start + _BLOCK])
        sha.update(block.data)
        highest = max(highest, int(block.max()))
    return sha.hexdigest(), highest


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")
