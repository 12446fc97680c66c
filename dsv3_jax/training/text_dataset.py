"""Rows from text files, tokenised and packed as they are read, by worker processes (`grain`).

The order is that of windows (text_windows.py), one after the other: the row at a position follows from (data, seed,
position) alone, whatever the number of hosts and workers. Where a position is among the windows is known only once
the windows before it are made; a cursor [window, its first position] of what was read last makes a resume exact
without reading from the start. Every host makes all windows and takes its rows, so tokenising is not shared among
hosts: for many hosts prepare token shards.
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.parallel.helpers import helpers_keep_running
from dsv3_jax.text import Tokenizer
from dsv3_jax.training.rows import Batch, empty_batch
from dsv3_jax.training.text_files import TextFile, identity_of, open_text
from dsv3_jax.training.text_windows import MakeRows, Windows, block_bytes, pack, prepare_worker, unpack


class TextDataset:
    """See the module's docstring."""

    def __init__(
        self,
        source: str,
        paths: Sequence[Path],
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        vocab_size: int,
        text_key: str = "text",
        val_fraction: float = 0.0,
        workers: int = 2,
    ) -> None:
        """`source` names it in messages. Raises DataError for files that cannot be read, or with nothing in them."""
        self.origin, self.seq_len, self._workers = source, seq_len, workers
        self.files: list[TextFile] = [open_text(path, text_key, block_bytes(seq_len)) for path in paths]
        self.windows = Windows(
            self.files,
            tokenizer,
            seq_len=seq_len,
            vocab_size=vocab_size,
            text_key=text_key,
            val_fraction=val_fraction,
        )
        self.nbytes = sum(file.nbytes for file in self.files)
        if not self.windows.per_epoch:
            raise DataError(f"{source}: no text in it ({len(self.files)} files)")
        identity = json.dumps([identity_of(self.files), tokenizer.sha256, seq_len, text_key, val_fraction])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._lock = threading.Lock()
        self._iterator: Any = None
        self._reset(0, 0, 0)

    # --- rows by position -------------------------------------------------------------------------------------

    def _reset(self, seed: int, window: int, first: int) -> None:
        """Go on with `window`, whose first row has position `first`."""
        self._stop()
        self._seed, self._next, self._end = seed, window, first
        self._made: list[tuple[int, int]] = []  # first position and number of each window
        self._rows: list[tuple[int, Batch]] = []  # first position and rows of those still needed
        self._empty = 0

    def _start(self) -> Any:
        try:
            import grain
        except ModuleNotFoundError:
            raise ConfigError(
                f"{self.origin} is text, which is read with the package grain: ./run setup --extras data (or "
                "make token shards of it: python -m dsv3_jax.training.prepare)"
            ) from None
        numbers = grain.MapDataset.range(self._next, 2**60)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        dataset = numbers.map(MakeRows(self.windows, self._seed)).to_iter_dataset(options)
        if self._workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # grain reads its own flags, which are not on our command line
                flags.FLAGS.mark_as_parsed()
            pool = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
            dataset = dataset.mp_prefetch(pool, worker_init_fn=prepare_worker)
            resource_tracker.ensure_running()  # its start takes back what `helpers_keep_running` does
        with helpers_keep_running():
            return iter(dataset)

    def _stop(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _make(self) -> None:
        """The next window."""
        if self._iterator is None:
            self._iterator = self._start()
        with helpers_keep_running():  # the first call starts the workers
            message = next(self._iterator)
        rows = unpack(message, self.seq_len)
        count = len(rows["tokens_BT"])
        self._empty = 0 if count else self._empty + 1
        if self._empty > self.windows.per_epoch:
            raise DataError(f"{self.origin}: no document in it that is not empty and not held out")
        if count:
            self._rows.append((self._end, rows))
        self._made.append((self._end, self._next))
        self._next, self._end = self._next + 1, self._end + count

    def sample(self, position: int, count: int, seed: int) -> Batch:
        """See `Dataset`. Going back means reading again from the start."""
        with self._lock:
            lowest = self._rows[0][0] if self._rows else self._end
            if seed != self._seed or position < lowest:
                self._reset(seed, 0, 0)
            while self._end < position + count:
                self._make()
                self._drop(position)
            self._drop(position)
            batch = empty_batch(count, self.seq_len)
            for first, rows in self._rows:
                size = len(rows["tokens_BT"])
                start, stop = max(position, first), min(position + count, first + size)
                if start < stop:
                    for name, array in rows.items():
                        batch[name][start - position : stop - position] = array[start - first : stop - first]
            return batch

    def _drop(self, position: int) -> None:
        """Forget the rows of windows that end before `position`."""
        while self._rows and self._rows[0][0] + len(self._rows[0][1]["tokens_BT"]) <= position:
            self._rows.pop(0)

    def cursor(self, position: int, seed: int) -> list[int]:
        """[window, its first position] of the row before `position`.

        It needs only where the windows are: their rows may have been dropped, for `sample` may be ahead in another
        thread.
        """
        if position == 0:
            return [0, 0]
        with self._lock:
            if seed != self._seed:
                self._reset(seed, 0, 0)
            while self._end < position:  # rows that only other hosts have needed so far
                self._make()
            at = _window_before(self._made, position)
            assert at >= 0, (position, self._made[:1])
            first, number = self._made[at]
            del self._made[:at]
        return [number, first]

    def seek(self, cursor: Any, seed: int) -> None:
        """Take back a cursor."""
        with self._lock:
            self._reset(seed, *(cursor or (0, 0)))

    def progress(self, position: int, seed: int) -> dict[str, Any]:
        """See `Dataset`; in steps of a window."""
        made = (
            self._made
        )  # the lock would wait for rows; another thread only appends, or puts a new list in its place
        at = _window_before(made, position) if seed == self._seed else -1
        return {"epoch": made[at][1] / self.windows.per_epoch if at >= 0 else 0.0}

    def describe(self) -> str:
        """See `Dataset`."""
        documents = sum(int(file.lines[-1]) for file in self.files)
        return f"{documents:,} documents in {len(self.files)} files, {self.nbytes:,} bytes an epoch"

    def close(self) -> None:
        """End the worker processes, close the files."""
        with self._lock:
            self._stop()
            self.windows.close()


class HeldOut:
    """The held-out rows of a TextDataset, for evaluation only: as many as are asked for, found once."""

    def __init__(self, dataset: TextDataset) -> None:
        """Nothing is read before `in_order`."""
        self.seq_len = dataset.seq_len
        self._windows = copy.copy(dataset.windows)  # its own readers: training reads at the same time
        self._found: tuple[int | None, Batch] | None = None

    def in_order(self, batch_size: int, max_batches: int | None = None) -> Iterator[Batch]:
        """Rows of the first held-out documents in the order of seed 0, the last batch filled with padding."""
        wanted = None if max_batches is None else max_batches * batch_size
        if self._found is None or self._found[0] != wanted:
            self._found = wanted, self._read(wanted)
        rows = self._found[1]
        for start in list(range(0, len(rows["tokens_BT"]), batch_size))[:max_batches]:
            batch = empty_batch(batch_size, self.seq_len)
            for name, array in rows.items():
                chosen = array[start : start + batch_size]
                batch[name][: len(chosen)] = chosen
            yield batch

    def _read(self, wanted: int | None) -> Batch:
        """At least `wanted` rows, or all."""
        windows, encoded, inputs = self._windows, list[np.ndarray](), 0
        for number in range(windows.per_epoch):
            new = windows.encode(windows.documents(number, 0), held_out=True)
            encoded += new
            inputs += sum(len(ids) - 1 for ids in new)
            if wanted is not None and inputs >= wanted * self.seq_len:
                break
        windows.close()
        return pack(encoded, self.seq_len, seed=0, number=0)


def _window_before(made: Sequence[tuple[int, int]], position: int) -> int:
    """Place in `made` (see `TextDataset`) of the window with the row before `position`; -1: it was made earlier."""
    return bisect.bisect_left(made, position, key=lambda window: window[0]) - 1
