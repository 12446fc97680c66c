"""Several datasets as one, by weight: `data.mixture`.

Which source a position belongs to, and which row of that source, follows from (weights, seed, position) in
O(log sources): no table, no state beyond the position. The weights are shares of rows; rows are nearly full
(best-fit packing), so they are shares of tokens too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from dsv3_jax.training.rows import Batch, Dataset, Evaluation, empty_batch


class Schedule:
    """An exact, evenly spread sequence of sources.

    A balanced binary tree of the sources; at each node the first p of its positions hold
    floor((p·left + phase) / total) of the left side, in whole numbers (weights are read as decimal fractions). So any
    run of n positions holds n·weight rows of a source, up to 2·ceil(log2 of the number of sources).
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        """`weights`: positive, of any sum. `seed` shifts the sequence."""
        exact = [Fraction(repr(float(weight))) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * scale) for weight in exact]
        self._nodes: dict[tuple[int, int], tuple[int, int, int]] = {}
        self._plan(0, len(weights), seed)
        self.shares = [weight / sum(self._weights) for weight in self._weights]

    def _plan(self, start: int, stop: int, seed: int) -> None:
        """Weight of the left side, of both, and the phase of each node below (start, stop)."""
        if stop - start < 2:
            return
        middle = (start + stop) // 2
        left, total = sum(self._weights[start:middle]), sum(self._weights[start:stop])
        digest = hashlib.sha256(f"{seed}/{start}/{stop}".encode()).digest()
        self._nodes[start, stop] = left, total, int.from_bytes(digest, "big") % total
        self._plan(start, middle, seed)
        self._plan(middle, stop, seed)

    def counts(self, position: int) -> list[int]:
        """How many of the first `position` rows each source has."""
        found = [0] * len(self._weights)

        def visit(start: int, stop: int, count: int) -> None:
            if stop - start == 1:
                found[start] = count
                return
            left, total, phase = self._nodes[start, stop]
            on_left, middle = (count * left + phase) // total, (start + stop) // 2
            visit(start, middle, on_left)
            visit(middle, stop, count - on_left)

        visit(0, len(self._weights), position)
        return found

    def at(self, position: int) -> tuple[int, int]:
        """The source of a position and how many rows of it come before."""
        start, stop = 0, len(self._weights)
        while stop - start > 1:
            left, total, phase = self._nodes[start, stop]
            before, middle = (position * left + phase) // total, (start + stop) // 2
            if ((position + 1) * left + phase) // total > before:
                position, stop = before, middle
            else:
                position, start = position - before, middle
        return start, position


class Mixture:
    """See the module's docstring. Each source has its own order; a small one is repeated, epoch by epoch."""

    def __init__(self, names: Sequence[str], parts: Sequence[Dataset], weights: Sequence[float]) -> None:
        """Datasets of one row length, with their names and weights."""
        self.names, self.parts, self.weights = list(names), list(parts), list(weights)
        self.seq_len = parts[0].seq_len
        self.origin = f"the mixture of {', '.join(names)}"
        identity = json.dumps([[part.fingerprint for part in parts], self.weights])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._schedules: dict[int, Schedule] = {}

    def schedule(self, seed: int) -> Schedule:
        """The sequence of sources of a seed."""
        if seed not in self._schedules:
            self._schedules[seed] = Schedule(self.weights, seed)
        return self._schedules[seed]

    def sample(self, position: int, count: int, seed: int) -> Batch:
        """See `Dataset`."""
        schedule = self.schedule(seed)
        places = [schedule.at(at) for at in range(position, position + count)]
        batch = empty_batch(count, self.seq_len)
        for source, part in enumerate(self.parts):
            rows = [row for row, place in enumerate(places) if place[0] == source]
            if not rows:
                continue
            # Rows of one source at following positions follow each other in that source.
            got = part.sample(places[rows[0]][1], len(rows), source_seed(seed, source))
            for name, array in got.items():
                batch[name][rows] = array
        return batch

    def progress(self, position: int, seed: int) -> dict[str, Any]:
        """Rows of each source so far over all rows."""
        counts = self.schedule(seed).counts(position)
        total = max(position, 1)
        shares = {name: count / total for name, count in zip(self.names, counts, strict=True)}
        epochs = {
            name: part.progress(count, source_seed(seed, source)).get("epoch")
            for source, (name, part, count) in enumerate(zip(self.names, self.parts, counts, strict=True))
        }
        return {"shares": shares, "epochs": epochs}

    def cursor(self, position: int, seed: int) -> Any:
        """The sources' own."""
        counts = self.schedule(seed).counts(position)
        cursors = [
            part.cursor(count, source_seed(seed, source))
            for source, (part, count) in enumerate(zip(self.parts, counts, strict=True))
        ]
        return None if all(cursor is None for cursor in cursors) else cursors

    def seek(self, cursor: Any, seed: int) -> None:
        """See `cursor`."""
        for source, (part, own) in enumerate(zip(self.parts, cursor or [], strict=False)):
            part.seek(own, source_seed(seed, source))

    def describe(self) -> str:
        """See `Dataset`."""
        shares = self.schedule(0).shares
        return "mixture: " + "; ".join(
            f"{share:.1%} {name}, {part.describe()}"
            for name, share, part in zip(self.names, shares, self.parts, strict=True)
        )

    def close(self) -> None:
        """Close the sources."""
        for part in self.parts:
            part.close()


class MixedEvaluation:
    """The held-out rows of the sources of a mixture."""

    def __init__(self, parts: Sequence[Evaluation], weights: Sequence[float], seq_len: int) -> None:
        self._parts, self._weights, self._seq_len = list(parts), list(weights), seq_len

    def in_order(self, batch_size: int, max_batches: int | None = None) -> Iterator[Batch]:
        """Every row of every source once, by weight as long as there are rows of each."""
        rows = (
            None if max_batches is None else max_batches * batch_size
        )  # text is tokenised only as far as asked for
        left = {source: part.in_order(1, rows) for source, part in enumerate(self._parts)}
        schedule, position, done = Schedule(self._weights, 0), 0, 0
        while left and done != max_batches:
            batch, row = empty_batch(batch_size, self._seq_len), 0
            while left and row < batch_size:
                source, _ = schedule.at(position)
                position += 1
                if source not in left:
                    continue
                got = next(left[source], None)
                if got is None:
                    del left[source]
                    continue
                for name, array in got.items():
                    batch[name][row] = array[0]
                row += 1
            if row:
                yield batch
                done += 1


def source_seed(seed: int, source: int) -> int:
    """Sources of the same length must not be in the same order."""
    digest = hashlib.sha256(f"{seed}/source/{source}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
