"""Batches of packed rows from token shards, by index.

Which samples a batch holds depends on (folder, split, T, packing, seed, position) alone: not on hosts, devices,
prefetching or how often the run was stopped. The position is the number of samples used so far; the sample at
position p is row `permute(p mod rows)` of epoch `p div rows`, so a resumed run jumps there at once. What a batch is:
dsv3_jax/training/rows.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.training.packing import make_packing, permute
from dsv3_jax.training.rows import Batch, Dataset, RowWriter, empty_batch
from dsv3_jax.training.shards import Shard, read_index
from dsv3_jax.training.verified import Verified

Verify = Literal["cached", "full", "never"]


class TokenDataset:
    """The rows of one split of a data folder.

    n_rows, n_inputs: rows an epoch and the tokens they hold; fingerprint: identifies data, split, T and packing.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        seq_len: int,
        split: str = "train",
        packing: str = "best_fit",
        vocab_size: int | None = None,
        verify: Verify = "full",
    ) -> None:
        """`vocab_size`: the model's (default: the data's).

        `verify` compares checksums and ids: of all files ("full"), of those that have changed since they were last
        read whole ("cached", see verified.py), or only the ids of each batch as it is made ("never").

        Raises DataError for missing, truncated or altered files, ids outside the vocabulary, or an empty split.
        """
        self.folder, self.seq_len, self.split = Path(folder), seq_len, split
        self.origin = str(folder)
        self.index = read_index(folder)
        self.vocab_size = self.index["vocab_size"] if vocab_size is None else vocab_size
        entries = [entry for entry in self.index["shards"] if entry["split"] == split]
        self._shards = [Shard(self.folder, entry, self.index["dtype"]) for entry in entries]
        self.notes: list[str] = []
        if verify != "never":
            self._verify(Verified(self.folder) if verify == "cached" else None)
        self._first_document = np.cumsum([0] + [entry["documents"] for entry in entries])
        lengths = [np.diff(shard.offsets.astype(np.int64)) for shard in self._shards]
        self._packing = make_packing(packing, np.concatenate(lengths or [np.zeros(0, np.int64)]), seq_len)
        self.n_rows, self.n_inputs = self._packing.n_rows, self._packing.n_inputs
        if not self.n_rows:
            have = sorted({entry["split"] for entry in self.index["shards"]}) or ["nothing"]
            raise DataError(f"{self.folder}: nothing to read in split {split!r} (it holds {', '.join(have)})")
        hashes = [(entry["sha256"], entry["index_sha256"]) for entry in entries]
        identity = json.dumps([hashes, split, seq_len, packing])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]

    def _verify(self, known: Verified | None) -> None:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing leaves the interpreter's lock
            list(pool.map(lambda shard: shard.verify(self.vocab_size, known), self._shards))
        problem = None if known is None else known.save()
        if problem:
            self.notes.append(problem)

    def rows(self, indices: np.ndarray) -> Batch:
        """A batch of these rows; an index of -1 gives a row of padding."""
        batch = empty_batch(len(indices), self.seq_len)
        for at, index in enumerate(indices):
            if index < 0:
                continue
            row = RowWriter(batch, at)
            for piece in self._packing.row(int(index)):
                which = int(np.searchsorted(self._first_document, piece.document, side="right")) - 1
                shard = self._shards[which]
                start = int(shard.offsets[piece.document - self._first_document[which]]) + piece.start
                stop = start + piece.length + 1
                shard.check_ids(start, stop, self.vocab_size)
                row.add(shard.tokens[start:stop])
        return batch

    def sample(self, position: int, count: int, seed: int) -> Batch:
        """`count` samples from `position` on, in the shuffled order of `seed`."""
        samples = np.arange(position, position + count)
        epochs, places = samples // self.n_rows, samples % self.n_rows
        rows = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = permute(places[here], self.n_rows, seed=seed, epoch=int(epoch))
        return self.rows(rows)

    def in_order(self, batch_size: int, max_batches: int | None = None) -> Iterator[Batch]:
        """Every row once, in a fixed spread order, for evaluation; the last batch is filled with padding rows."""
        order = permute(np.arange(self.n_rows), self.n_rows, seed=0, epoch=0)
        for start in list(range(0, self.n_rows, batch_size))[:max_batches]:
            rows = np.full(batch_size, -1, np.int64)
            chosen = order[start : start + batch_size]
            rows[: len(chosen)] = chosen
            yield self.rows(rows)

    def progress(self, position: int, seed: int) -> dict[str, Any]:
        """See `Dataset`."""
        return {"epoch": position / self.n_rows}

    def cursor(self, position: int, seed: int) -> None:
        """Any position is reached at once."""

    def seek(self, cursor: Any, seed: int) -> None:
        """See `cursor`."""

    def describe(self) -> str:
        """See `Dataset`."""
        fill = self.n_inputs / (self.n_rows * self.seq_len)
        return f"{self.n_inputs:,} tokens an epoch (rows {fill:.1%} full)"

    def close(self) -> None:
        """Nothing is open."""


class Batches:
    """Endless training batches of one host, with a state of a few numbers.

    Each host gets its share of every global batch: host h of H rows [h·B/H, (h+1)·B/H). The next `prefetch` batches
    are built in a thread; `state` counts only those handed out.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int,
        host: int = 0,
        n_hosts: int = 1,
        prefetch: int = 2,
        size_at: Callable[[int], int] | None = None,
    ) -> None:
        """`batch_size`: global; `size_at`: a global batch by the samples used before it, where it is not always that.

        Raises ConfigError if a batch does not divide among the hosts.
        """
        if batch_size < 1 or batch_size % n_hosts:
            raise ConfigError(
                f"training.batch_size {batch_size} is not a positive multiple of {n_hosts} hosts"
            )
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self._size_at = size_at or (lambda _: batch_size)
        self._host, self._n_hosts = host, n_hosts
        self._position = self._next = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if prefetch else None
        self._depth = prefetch
        self._ahead: deque[Future[Batch]] = deque()

    def progress(self) -> dict[str, Any]:
        """How far the batches handed out are: `Dataset.progress`."""
        return self.dataset.progress(self._position, self.seed)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON values."""
        state = {"position": self._position, "seed": self.seed, "data": self.dataset.fingerprint}
        cursor = self.dataset.cursor(self._position, self.seed)
        return state if cursor is None else state | {"cursor": cursor}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises ConfigError if it was made with other data, T, packing or seed."""
        if state.get("seed") != self.seed:
            raise ConfigError(
                f"the data position was made with seed {state.get('seed')}, this run has {self.seed}"
            )
        if state.get("data") != self.dataset.fingerprint:
            raise ConfigError(
                f"the data position was made with other data, row length or packing than {self.dataset.origin} "
                f"with rows of {self.dataset.seq_len} ({state.get('data')} is not {self.dataset.fingerprint})"
            )
        self._position = int(state["position"])
        self._drop()
        self.dataset.seek(state.get("cursor"), self.seed)

    def _build(self, position: int) -> Batch:
        size = self._size_at(position)
        if size % self._n_hosts:
            raise ConfigError(f"a global batch of {size} rows does not divide among {self._n_hosts} hosts")
        share = size // self._n_hosts
        return self.dataset.sample(position + self._host * share, share, self.seed)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._pool is None:
            batch = self._build(self._position)
        else:
            while len(self._ahead) <= self._depth:
                self._ahead.append(self._pool.submit(self._build, self._next))
                self._next += self._size_at(self._next)
            batch = self._ahead.popleft().result()
        self._position += self._size_at(self._position)
        return batch

    def _drop(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._next = self._position

    def close(self) -> None:
        """End the thread and what the dataset runs."""
        self._drop()
        if self._pool is not None:
            self._pool.shutdown()
        self.dataset.close()
