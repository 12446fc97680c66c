"""What the trainer reads: a dataset gives batches of packed rows by position alone.

A batch is a dict of int32 arrays [B, T]:
    tokens_BT      ids; 0 in padding
    targets_BT     the id that follows in the document, -1 where there is none to predict (padding)
    segments_BT    1, 2, … by document in the row, 0 in padding; attention stays within a segment
    positions_BT   0, 1, … from the start of each segment
The target of a segment's last token is the document's next token even if that stands in another row, so no target
is lost at a cut. The multi-token module's target at t is targets_BT at t+1 if that is in the same segment, else none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from dsv3_jax.training.packing import Piece

Batch = dict[str, np.ndarray]
_FILL = {"tokens_BT": 0, "targets_BT": -1, "segments_BT": 0, "positions_BT": 0}
ROW_KEYS = tuple(_FILL)


class Dataset(Protocol):
    """Rows of T tokens in an endless, shuffled order: the row at a position follows from (data, seed, position)."""

    seq_len: int
    fingerprint: str
    """Identifies data, split, T, packing and tokenizer."""
    origin: str
    """Where it is from, for messages."""

    def sample(self, position: int, count: int, seed: int) -> Batch:
        """`count` rows from `position` on, in the order of `seed`."""
        ...

    def progress(self, position: int, seed: int) -> dict[str, Any]:
        """How far `position` is, as JSON values for metrics.jsonl: `epoch`, or the `shares` of a mixture."""
        ...

    def cursor(self, position: int, seed: int) -> Any:
        """A JSON value that lets `seek` reach `position` at once; None where that needs no help."""
        ...

    def seek(self, cursor: Any, seed: int) -> None:
        """Take back a cursor."""
        ...

    def describe(self) -> str:
        """Its size in words."""
        ...

    def close(self) -> None:
        """End processes and threads."""
        ...


class Evaluation(Protocol):
    """Held-out rows."""

    def in_order(self, batch_size: int, max_batches: int | None = None) -> Iterator[Batch]:
        """Every row once, in a fixed spread order, for evaluation; the last batch is filled with padding rows."""
        ...


def empty_batch(rows: int, seq_len: int) -> Batch:
    """A batch of padding."""
    return {name: np.full((rows, seq_len), fill, np.int32) for name, fill in _FILL.items()}


class RowWriter:
    """Fills one row of a batch, segment after segment."""

    def __init__(self, batch: Batch, row: int) -> None:
        self._batch, self._row, self._column, self._segment = batch, row, 0, 0

    def add(self, ids: np.ndarray) -> None:
        """A segment: all of `ids` but the last are inputs, all but the first targets."""
        length = len(ids) - 1
        here = slice(self._column, self._column + length)
        self._segment += 1
        self._batch["tokens_BT"][self._row, here] = ids[:-1]
        self._batch["targets_BT"][self._row, here] = ids[1:]
        self._batch["segments_BT"][self._row, here] = self._segment
        self._batch["positions_BT"][self._row, here] = np.arange(length)
        self._column += length

    def add_pieces(self, documents: Sequence[np.ndarray], pieces: Sequence[Piece]) -> None:
        """The pieces of documents that a plan puts in this row."""
        for piece in pieces:
            self.add(documents[piece.document][piece.start : piece.start + piece.length + 1])
