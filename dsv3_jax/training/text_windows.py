"""Windows of text: some blocks from all over the data, tokenised and packed into rows.

Window k is a pure function of (files, tokenizer, T, seed, k), so any process can make it and nothing is carried from
one to the next. An epoch lines the segments of all files up in a random order, cuts the line into equal stretches and
takes one block of each stretch a window: neighbours in a file are apart, and each stretch reads its files in order.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.text import Tokenizer
from dsv3_jax.training.packing import BestFit, permute
from dsv3_jax.training.prepare import encode_documents, hash_fraction
from dsv3_jax.training.rows import ROW_KEYS, Batch, RowWriter, empty_batch
from dsv3_jax.training.sources import Document
from dsv3_jax.training.text_files import BlockReader, TextFile

STRETCHES = 16  # blocks a window
_ROWS = 64  # that a window is to fill, at BYTES_PER_TOKEN
_BYTES_PER_TOKEN = 4


def block_bytes(seq_len: int) -> int:
    """Size of a block that makes a window of about 64 rows: the last row, half empty, is then under 1 % of it."""
    return max(_ROWS * seq_len * _BYTES_PER_TOKEN // STRETCHES, 1)


class Windows:
    """The windows of some files; picklable, for worker processes. `per_epoch`: how many an epoch has."""

    def __init__(
        self,
        files: Sequence[TextFile],
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        vocab_size: int,
        text_key: str,
        val_fraction: float,
    ) -> None:
        """`val_fraction` of the documents, chosen by the hash of their text, is left out."""
        self._files, self._seq_len, self._vocab_size = list(files), seq_len, vocab_size
        self._text_key, self._val_fraction = text_key, val_fraction
        self._tokenizer_files, self._origin = tokenizer.files, tokenizer.origin
        self._tokenizer: Tokenizer | None = tokenizer
        self._reader: BlockReader | None = None
        counts = [(number, size) for number, file in enumerate(files) for size in file.segments.tolist()]
        self._segment_file = np.asarray([number for number, _ in counts], np.int64)
        self._segment_size = np.asarray([size for _, size in counts], np.int64)
        first = [np.cumsum(file.segments) - file.segments for file in files]
        self._segment_first = np.concatenate(first) if first else np.zeros(0, np.int64)
        self._blocks = int(self._segment_size.sum())
        self.per_epoch = -(-self._blocks // STRETCHES)
        self._line: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokenizer": None, "_reader": None, "_line": None}

    def _line_of(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Segments in the order of an epoch, and where each ends in the line of blocks."""
        if self._line is None or self._line[0] != (seed, epoch):
            size = len(self._segment_size)
            order = np.argsort(permute(np.arange(size), size, seed=seed, epoch=epoch))
            self._line = (seed, epoch), order, np.cumsum(self._segment_size[order])
        return self._line[1:]

    def documents(self, number: int, seed: int) -> list[Document]:
        """All documents of window `number`."""
        if self._reader is None:
            self._reader = BlockReader(self._text_key)
        epoch, at = divmod(number, self.per_epoch)
        order, ends = self._line_of(seed, epoch)
        found: list[Document] = []
        for place in range(at, self._blocks, self.per_epoch):
            index = int(np.searchsorted(ends, place, side="right"))
            segment = int(order[index])
            block = int(self._segment_first[segment] + place - (ends[index] - self._segment_size[segment]))
            found += self._reader.read(self._files[self._segment_file[segment]], block)
        return found

    def close(self) -> None:
        """Close the files."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def encode(self, documents: Sequence[Document], *, held_out: bool) -> list[np.ndarray]:
        """Ids of those documents that are held out, or of the others. DataError for an id outside the vocabulary."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self._tokenizer_files, origin=self._origin)
        chosen = [
            document for document in documents if (hash_fraction(document) < self._val_fraction) == held_out
        ]
        encoded = []
        for ids, document in encode_documents(chosen, self._tokenizer):
            if int(ids.max()) >= self._vocab_size:
                raise DataError(
                    f"{document.origin}: token {int(np.argmax(ids >= self._vocab_size))} is {int(ids.max())}, "
                    f"not below the vocabulary size {self._vocab_size}"
                )
            encoded.append(ids)
        return encoded

    def rows(self, number: int, seed: int) -> Batch:
        """The rows of window `number` in a random order."""
        encoded = self.encode(self.documents(number, seed), held_out=False)
        return pack(encoded, self._seq_len, seed=seed, number=number)


class MakeRows:
    """What a worker maps over window numbers: rows, or the message of what is wrong with the data, as bytes.

    An exception would lose its type on its way out of a worker, and arrays would go through shared memory, of which a
    container often has 64 MB.
    """

    def __init__(self, windows: Windows, seed: int) -> None:
        self._windows, self._seed = windows, seed

    def __call__(self, number: int) -> bytes:
        """A letter for the kind and the content; see `unpack`."""
        try:
            rows = self._windows.rows(int(number), self._seed)
        except (DataError, ConfigError) as error:
            return (b"D" if isinstance(error, DataError) else b"C") + str(error).encode()
        return b"R" + np.stack([rows[name] for name in ROW_KEYS]).tobytes()


def unpack(message: bytes, seq_len: int) -> Batch:
    """The rows that a worker made, or its error raised here."""
    kind, content = message[:1], memoryview(message)[1:]
    if kind == b"R":
        arrays = np.frombuffer(content, np.int32).reshape(len(ROW_KEYS), -1, seq_len)
        return dict(zip(ROW_KEYS, arrays, strict=True))
    raise (DataError if kind == b"D" else ConfigError)(bytes(content).decode())


def pack(documents: Sequence[np.ndarray], seq_len: int, *, seed: int, number: int) -> Batch:
    """Rows of documents by best fit, in an order that follows from (seed, number)."""
    plan = BestFit(np.asarray([len(ids) for ids in documents], np.int64), seq_len)
    batch = empty_batch(plan.n_rows, seq_len)
    places = permute(np.arange(plan.n_rows), plan.n_rows, seed=seed, epoch=number) if plan.n_rows else []
    for row, place in enumerate(places):
        RowWriter(batch, int(place)).add_pieces(documents, plan.row(row))
    return batch


def prepare_worker(index: int, count: int) -> None:
    """Set up a worker process: it leaves signals to its parent and ends with it, and tokenises on one core.

    A batch system signals every process of a job: the parent still needs batches up to the step that it saves.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
