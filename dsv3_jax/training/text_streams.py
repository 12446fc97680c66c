"""The bytes of text files, decompressed, front to back."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import IO, Any

from dsv3_jax.errors import ConfigError, DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


def kind_of(path: Path) -> str | None:
    """The suffix among SUFFIXES, or None."""
    return next((suffix for suffix in sorted(SUFFIXES, key=len) if path.name.endswith(suffix)), None)


def open_stream(path: Path) -> IO[bytes]:
    """The decompressed bytes of a jsonl file."""
    kind = kind_of(path)
    if kind == ".jsonl.gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if kind == ".jsonl.zst":
        try:
            import zstandard
        except ModuleNotFoundError:
            raise ConfigError(
                f"{path}: .zst needs the package zstandard: ./run setup --extras data"
            ) from None
        return _ZstdStream(path, zstandard)  # type: ignore[return-value]
    return open(path, "rb")


class _ZstdStream:
    """The text of a .zst file of one or several frames.

    The package's own stream takes a file that ends inside a frame for one that is complete.
    """

    def __init__(self, path: Path, zstandard: Any) -> None:
        self._file = open(path, "rb")  # noqa: SIM115  closed by close()
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._ready, self._at, self._rest = b"", 0, b""

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, none at the end. EOFError where the file ends inside a frame."""
        while self._at >= len(self._ready):
            data = self._rest or self._file.read(1 << 17)
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return b""
            self._frame = self._frame or self._new_frame()
            self._ready, self._at, self._rest = self._frame.decompress(data), 0, b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        found = self._ready[self._at : self._at + size]
        self._at += len(found)
        return found

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> _ZstdStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_some(path: Path, stream: IO[bytes], size: int, line: int) -> bytes:
    """Up to `size` bytes; damage of a compressed file is a DataError that names the file and about where."""
    try:
        return stream.read(size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged after line {line} of its text ({error})") from None
    except Exception as error:
        if type(error).__name__ == "ZstdError":  # the package is optional, so its type may not exist
            raise DataError(f"{path}: damaged after line {line} of its text ({error})") from None
        raise
