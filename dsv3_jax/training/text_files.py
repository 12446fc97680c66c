"""Text files cut into blocks of neighbouring documents, and any block read on its own.

.jsonl, .jsonl.gz, .jsonl.zst: an object a line with a string under the text key. .parquet: a string column of that
name. A block is some whole lines or rows, about as many bytes as asked for. In a plain file a block is one seek; in
parquet it is part of a row group (the last few read are kept); in a compressed file a reader goes forward from the
last block it gave, so blocks that are asked for in rising order cost one pass.
"""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.training.prepare import cache_folder
from dsv3_jax.training.sources import Document, json_text, utf8
from dsv3_jax.training.text_streams import SUFFIXES, kind_of, open_stream, read_some
from dsv3_jax.training.verified import stamp

_PIECE = 1 << 23  # bytes scanned at once
_KEPT_GROUPS = 4
_KEPT_STREAMS = 32


@dataclass(frozen=True)
class TextFile:
    """A file and its blocks: block b holds the lines (rows) lines[b] to lines[b + 1], counted from 0.

    starts: where the blocks begin in the (decompressed) text, in bytes; of parquet the row group of each.
    segments: how many following blocks are best read in order: 1 in a plain file, the blocks of a row group, all of a
    compressed file.
    nbytes: of text.
    """

    path: Path
    lines: np.ndarray = field(repr=False)
    starts: np.ndarray = field(repr=False)
    segments: np.ndarray = field(repr=False)
    nbytes: int

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self.lines) - 1

    def identity(self) -> str:
        """A digest of the name and of where the blocks lie."""
        digest = hashlib.sha256(self.path.name.encode())
        digest.update(self.lines.tobytes() + self.starts.tobytes())
        return digest.hexdigest()


def find_text(source: str) -> list[Path]:
    """The files that a path or pattern names, sorted; of a folder all below it, hidden names left out."""
    path = Path(source)
    if path.is_dir():
        found = [child for child in path.rglob("*") if kind_of(child) and child.is_file()]
        found = [c for c in found if not any(part.startswith(".") for part in c.relative_to(path).parts)]
    elif path.is_file():
        if kind_of(path) is None:
            raise ConfigError(f"{path}: unknown kind of file, expected one of {', '.join(SUFFIXES)}")
        found = [path]
    else:
        anchor = Path(path.anchor) if path.anchor else Path()
        pattern = str(path.relative_to(anchor)) if path.anchor else source
        found = [child for child in anchor.glob(pattern) if kind_of(child) and child.is_file()]
    return sorted(found)


def open_text(path: Path, text_key: str, block_bytes: int) -> TextFile:
    """A file with its blocks. What a scan of a file found is kept in the cache folder until the file changes.

    Raises DataError for a file that cannot be read or has no such column, ConfigError for a missing package.
    """
    if kind_of(path) == ".parquet":
        return _open_parquet(path, text_key, block_bytes)
    identity = hashlib.sha256(f"{path.absolute()} {stamp(path)} {block_bytes} 1".encode()).hexdigest()[:32]
    kept = cache_folder() / "text-blocks" / f"{identity}.npz"
    try:
        with np.load(kept) as found:
            lines, starts = found["lines"], found["starts"]
    except (OSError, ValueError, KeyError, EOFError, zlib.error):
        lines, starts = _scan(path, block_bytes)
        _keep(kept, lines, starts)
    blocks = len(lines) - 1
    whole = kind_of(path) != ".jsonl"
    segments = np.asarray([blocks] if whole and blocks else [1] * blocks, np.int64)
    return TextFile(path, lines, starts, segments, int(starts[-1]))


def _keep(path: Path, lines: np.ndarray, starts: np.ndarray) -> None:
    data = io.BytesIO()
    np.savez(data, lines=lines, starts=starts)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data.getvalue())
        os.replace(temporary, path)
    except OSError:  # a cache that cannot be written only costs the scan of the next start
        return


def _scan(path: Path, block_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """First line and byte of each block, and the ends. A block ends with the line that fills it."""
    lines, starts = [0], [0]
    line = at = 0
    last = b"\n"
    with open_stream(path) as stream:
        while piece := read_some(path, stream, _PIECE, line):
            ends = np.flatnonzero(np.frombuffer(piece, np.uint8) == 10) + 1
            index = 0
            while True:
                index = int(np.searchsorted(ends, starts[-1] + block_bytes - at))
                if index >= len(ends):
                    break
                lines.append(line + index + 1)
                starts.append(at + int(ends[index]))
            line, at, last = line + len(ends), at + len(piece), piece[-1:]
    if last != b"\n":
        line += 1
    if at > starts[-1]:
        lines.append(line)
        starts.append(at)
    return np.asarray(lines, np.int64), np.asarray(starts, np.int64)


def _parquet(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ConfigError(f"{path}: parquet needs the package pyarrow: ./run setup --extras data") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from None


def _open_parquet(path: Path, text_key: str, block_bytes: int) -> TextFile:
    with _parquet(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
        if text_key not in schema.names or str(schema.field(text_key).type) not in ("string", "large_string"):
            columns = ", ".join(f"{name} ({schema.field(name).type})" for name in schema.names)
            raise DataError(f"{path}: no column {text_key!r} of strings; it has {columns}")
        column = file.schema.names.index(text_key) if text_key in file.schema.names else 0
        lines, groups, segments, nbytes = [0], [], [], 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            size = metadata.row_group(group).column(column).total_uncompressed_size
            blocks = min(max(1, round(size / block_bytes)), max(rows, 1))
            cuts = np.linspace(0, rows, blocks + 1).astype(np.int64)[1:] + lines[-1]
            lines += cuts.tolist()
            groups += [group] * blocks
            segments.append(blocks)
            nbytes += size
    return TextFile(path, np.asarray(lines), np.asarray(groups), np.asarray(segments), nbytes)


class BlockReader:
    """Reads blocks of files; keeps what the next block may need."""

    def __init__(self, text_key: str) -> None:
        self._text_key = text_key
        self._groups: dict[tuple[Path, int], Any] = {}
        self._streams: list[tuple[Path, int, IO[bytes]]] = []  # file, bytes read, stream; last used last

    def read(self, file: TextFile, block: int) -> list[Document]:
        """The documents of a block. Raises DataError naming file and line (row)."""
        if kind_of(file.path) == ".parquet":
            return list(self._rows(file, block))
        start, stop = int(file.starts[block]), int(file.starts[block + 1])
        first = int(file.lines[block])
        data = self._bytes(file, start, stop, first)
        if len(data) != stop - start:
            raise DataError(f"{file.path}:{first + 1}: ends early; the file has changed since it was opened")
        documents = []
        for number, line in enumerate(data.split(b"\n"), first + 1):
            if line.strip():
                origin = f"{file.path}:{number}"
                text = json_text(utf8(line, file.path, number), origin, self._text_key)
                documents.append(Document(origin, text))
        return documents

    def _bytes(self, file: TextFile, start: int, stop: int, line: int) -> bytes:
        if kind_of(file.path) == ".jsonl":
            with open(file.path, "rb") as plain:
                plain.seek(start)
                return plain.read(stop - start)
        before = [entry for entry in self._streams if entry[0] == file.path and entry[1] <= start]
        if before:
            entry = max(before, key=lambda entry: entry[1])
            self._streams.remove(entry)
        else:
            entry = (file.path, 0, open_stream(file.path))
        _, at, stream = entry
        while at < start:  # other processes read what is skipped here
            skipped = read_some(file.path, stream, min(_PIECE, start - at), line)
            if not skipped:
                return b""
            at += len(skipped)
        data = bytearray()
        while len(data) < stop - start:
            piece = read_some(file.path, stream, stop - start - len(data), line)
            if not piece:
                break
            data += piece
        self._streams.append((file.path, stop, stream))
        if len(self._streams) > _KEPT_STREAMS:
            self._streams.pop(0)[2].close()
        return bytes(data)

    def _rows(self, file: TextFile, block: int) -> Iterator[Document]:
        group = int(file.starts[block])
        key = (file.path, group)
        if key not in self._groups:
            with _parquet(file.path) as opened:
                try:
                    table = opened.read_row_group(group, columns=[self._text_key])
                except (
                    OSError
                ) as error:  # pyarrow's own errors of reading are OSErrors or ArrowInvalid (ValueError)
                    raise DataError(f"{file.path}: row group {group}: {error}") from None
                except ValueError as error:
                    raise DataError(f"{file.path}: row group {group}: {error}") from None
            if len(self._groups) >= _KEPT_GROUPS:
                self._groups.pop(next(iter(self._groups)))
            first = int(file.lines[int(np.argmax(file.starts == group))])
            self._groups[key] = first, table.column(0)
        first, column = self._groups[key]
        start, stop = int(file.lines[block]), int(file.lines[block + 1])
        for number, value in enumerate(column.slice(start - first, stop - start).to_pylist(), start + 1):
            origin = f"{file.path}: row {number}"
            if not isinstance(value, str):
                raise DataError(f"{origin}: expected a string in column {self._text_key!r}, found {value!r}")
            yield Document(origin, value)

    def close(self) -> None:
        """Close all files."""
        while self._streams:
            self._streams.pop()[2].close()
        self._groups.clear()


def identity_of(files: Sequence[TextFile]) -> list[str]:
    """What the fingerprint of a dataset rests on."""
    return [file.identity() for file in files]
