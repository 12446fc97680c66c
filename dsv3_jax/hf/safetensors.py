"""Reading safetensors files and sharded folders: checked headers, `pread`, one tensor (or some rows) at a time.

Format: 8 bytes little-endian header length, a JSON header, then the data
(https://github.com/huggingface/safetensors#format). The library of that name accepts duplicate keys and
path-like names, and without torch it cannot open a file that holds one FP8 tensor, so the reader is our own.
Nothing is ever mapped into memory: the resident size of a conversion must not grow with its source.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from dsv3_jax.errors import ConfigError, DataError

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library
# How much of a tensor is in memory at once when it is streamed: enough for the disk, and it stays in the
# processor's cache between being read, hashed and written.
PIECE_BYTES = 1 << 18
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16,
        "U32": np.uint32, "I32": np.int32, "U64": np.uint64, "I64": np.int64,
        "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu, "C64": np.complex64,
    }.items()
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Idle buffers of all threads: at most one for every range that was ever being read at once. A new one for every
# tensor would cost a page fault for every 4 KiB.
_BUFFERS: list[memoryview] = []


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `offset` is absolute in `file`, `dtype` a safetensors name such as "BF16".

    `sha256` of its bytes, where somebody recorded it; else "".
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    sha256: str = ""


def _fill(fd: int, out: memoryview, file: Path, offset: int, what: str) -> None:
    """Reads `out` full. Raises DataError when the file ends early."""
    filled = 0
    while filled < len(out):
        count = os.preadv(fd, [out[filled:]], offset + filled)
        if count == 0:
            raise DataError(
                f"{file}: {what + ' ' if what else ''}ends {len(out) - filled} bytes early: "
                f"{len(out)} bytes at offset {offset} expected (truncated file?)"
            )
        filled += count


def read_range(file: Path, offset: int, nbytes: int, *, what: str = "") -> Iterator[memoryview]:
    """Yields the bytes `[offset, offset + nbytes)` of a file in pieces of at most `PIECE_BYTES`.

    Every piece is a view of one reused buffer and is valid until the next one is asked for.
    Raises DataError when the file ends early.
    """
    if nbytes == 0:
        return
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    buffer = _BUFFERS.pop() if _BUFFERS else memoryview(bytearray(PIECE_BYTES))
    try:
        done = 0
        while done < nbytes:
            piece = buffer[: min(PIECE_BYTES, nbytes - done)]
            _fill(fd, piece, file, offset + done, what)
            yield piece
            done += len(piece)
    finally:
        os.close(fd)
        _BUFFERS.append(buffer)


def read_array(
    file: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...], *, what: str = ""
) -> np.ndarray:
    """The array of `dtype` and `shape` at `offset` of a file. Raises DataError when the file ends early."""
    out = np.empty(math.prod(shape), dtype)
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _fill(fd, out.view(np.uint8).data, file, offset, what)
    finally:
        os.close(fd)
    return out.reshape(shape)


def parse_json(text: bytes, what: str) -> Any:
    """JSON with duplicate keys refused at every level. Raises DataError naming `what`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise DataError(f"{what}: key {key!r} occurs twice")
            found[key] = value
        return found

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, absurd numbers or nesting
        raise DataError(f"{what}: not valid JSON ({error})") from error


def _check_name(name: str, file: Path) -> None:
    if not name or any(c in "/\\" or ord(c) < 32 for c in name) or name in (".", ".."):
        raise DataError(f"{file}: tensor name {name!r} is empty, path-like or holds control characters")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(file: Path, name: str, entry: object, data_start: int, data_bytes: int) -> TensorInfo:
    def bad(problem: str) -> NoReturn:
        raise DataError(f"{file}: tensor {name!r}: {problem}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        bad(f"its header entry must hold dtype, shape and data_offsets, not {str(entry)[:200]}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        bad(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(_is_count(n) for n in shape):
        bad(f"shape {str(shape)[:200]} is not a list of at most 16 sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        bad(f"data_offsets {str(offsets)[:200]} are not [begin, end]")
    begin, end = offsets
    itemsize = DTYPES[dtype].itemsize
    if not begin <= end <= data_bytes:
        bad(f"data_offsets {offsets} lie outside the {data_bytes} data bytes of the file (truncated file?)")
    if end - begin != math.prod(shape) * itemsize:
        bad(f"{end - begin} bytes, but {dtype} of shape {shape} takes {math.prod(shape) * itemsize}")
    if begin % itemsize:
        bad(f"begins at data offset {begin}, not a multiple of its item size {itemsize}")
    return TensorInfo(name, file, dtype, tuple(shape), data_start + begin, end - begin)


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """All tensors of one file, and its `__metadata__`.

    Raises DataError for a truncated file, a header over 100 MB, bad JSON, duplicate keys, unknown dtypes,
    path-like names, and offsets that overlap, leave holes, or do not fit shape, dtype or file.
    """
    file = Path(file)
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    size = file.stat().st_size
    if size < 8:
        raise DataError(f"{file}: {size} bytes is too short for a safetensors file")
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise DataError(f"{file}: header of {length} bytes is over the limit of {MAX_HEADER_BYTES}")
        if 8 + length > size:
            raise DataError(
                f"{file}: header of {length} bytes expected, but the file has {size} (truncated file?)"
            )
        text = stream.read(length)
    header = parse_json(text, f"{file}: header")
    if not isinstance(header, dict):
        raise DataError(f"{file}: the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DataError(f"{file}: __metadata__ must map strings to strings")
    data_start = 8 + length
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        _check_name(name, file)
        tensors[name] = _entry(file, name, entry, data_start, size - data_start)
    expected, previous = data_start, "the header"
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != expected:
            problem = "overlaps" if tensor.offset < expected else "leaves a hole after"
            raise DataError(f"{file}: tensor {tensor.name!r} {problem} {previous}")
        expected, previous = tensor.offset + tensor.nbytes, repr(tensor.name)
    if expected != size:
        raise DataError(f"{file}: {size - expected} bytes after the last tensor belong to none")
    return tensors, metadata


def check_plain_name(name: object, where: str) -> str:
    """`name` if it is a plain file name. Raises DataError for anything that could leave its folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in "/\\" or ord(c) < 32 for c in name):
        raise DataError(f"{where}: {name!r} is not a plain file name inside the folder")
    return name


class SafetensorsFolder:
    """The tensors of a folder with `model.safetensors.index.json` and its shards, or with a single file.

    `tensors` maps names to TensorInfo. Whatever is wrong with headers or index is collected in `problems`
    (a list of messages) so that a caller can report everything at once; `check()` raises them.
    Raises ConfigError when the folder holds no safetensors at all.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.problems: list[str] = []
        self.tensors: dict[str, TensorInfo] = {}
        if not self.folder.is_dir():
            raise ConfigError(f"{self.folder}: no such folder")
        index = self.folder / INDEX_NAME
        weight_map: dict[str, str] | None = None
        if index.is_file():
            weight_map = self._read_index(index)
            files = sorted(set(weight_map.values()))
            if (self.folder / SINGLE_NAME).is_file() and SINGLE_NAME not in files:
                self.problems.append(f"{self.folder}: holds both {INDEX_NAME} and an unlisted {SINGLE_NAME}")
        else:
            files = sorted(path.name for path in self.folder.glob("*.safetensors"))
            files = [SINGLE_NAME] if SINGLE_NAME in files else files
            if not files:
                raise ConfigError(f"{self.folder}: holds no {INDEX_NAME} and no *.safetensors file")
            if len(files) > 1:
                self.problems.append(f"{self.folder}: {len(files)} safetensors files but no {INDEX_NAME}")
        self.files = tuple(self.folder / name for name in files)
        unread = self._read_headers()
        if weight_map is not None:
            self._compare(weight_map, unread)

    def _read_index(self, index: Path) -> dict[str, str]:
        if index.stat().st_size > MAX_HEADER_BYTES:
            raise DataError(f"{index}: {index.stat().st_size} bytes is over the limit of {MAX_HEADER_BYTES}")
        document = parse_json(index.read_bytes(), str(index))
        weight_map = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise DataError(f"{index}: has no weight_map")
        for name, file in weight_map.items():
            if not check_plain_name(file, f"{index}: weight_map[{name!r}]").endswith(".safetensors"):
                raise DataError(f"{index}: weight_map[{name!r}]: {file!r} is not a .safetensors file")
        return weight_map

    def _read_headers(self) -> set[str]:
        unread = set()
        for file in self.files:
            try:
                found, _ = read_header(file)
            except DataError as error:
                self.problems.append(str(error))
                unread.add(file.name)
                continue
            for name, tensor in found.items():
                if name in self.tensors:
                    self.problems.append(f"{file}: tensor {name!r} is also in {self.tensors[name].file.name}")
                self.tensors[name] = tensor
        return unread

    def _compare(self, weight_map: dict[str, str], unread: set[str]) -> None:
        for name, file in weight_map.items():
            tensor = self.tensors.get(name)
            if tensor is None:
                if file not in unread:  # its file's own problem is reported already
                    self.problems.append(f"{INDEX_NAME} lists {name!r} in {file}, which does not hold it")
            elif tensor.file.name != file:
                self.problems.append(
                    f"{INDEX_NAME} lists {name!r} in {file}, but it is in {tensor.file.name}"
                )
        for name, tensor in self.tensors.items():
            if name not in weight_map:
                self.problems.append(f"{tensor.file.name}: tensor {name!r} is not in {INDEX_NAME}")

    def check(self) -> SafetensorsFolder:
        """Self; raises one DataError with every problem found in headers and index."""
        if self.problems:
            raise DataError(
                "\n  ".join([f"{self.folder}: {len(self.problems)} problem(s)", *self.problems[:50]])
            )
        return self

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or a contiguous range of its rows, as a new array. Raises DataError if it is not there."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise DataError(f"{self.folder}: no tensor {name!r}")
        dtype = DTYPES[tensor.dtype]
        if rows is None:
            return read_array(tensor.file, tensor.offset, dtype, tensor.shape, what=f"tensor {name!r}")
        start, stop, step = rows.indices(tensor.shape[0])
        assert step == 1, rows
        row_bytes = math.prod(tensor.shape[1:]) * dtype.itemsize
        shape = (max(stop - start, 0), *tensor.shape[1:])
        return read_array(
            tensor.file, tensor.offset + start * row_bytes, dtype, shape, what=f"tensor {name!r}"
        )
