"""Copying many tensors: several threads, bounded memory, and a journal so that a killed copy goes on.

A job writes one tensor to a range of one file. When it is done a line with its size and SHA-256 goes to the
journal; a rerun with the same plan reads those ranges back, keeps what has the right checksum and does the rest.
So nothing needs flushing in between, and even a power failure costs no more than what it lost.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dsv3_jax.checkpoint.atomic import check_free, check_target, commit, fsync_tree, make_parent
from dsv3_jax.checkpoint.store import Record, write_file
from dsv3_jax.errors import ConfigError, DataError, StorageError, storage_error
from dsv3_jax.hf.safetensors import read_range

JOURNAL = "journal.jsonl"
_VERSION = 1
_AHEAD = 64  # jobs handed to the threads at once: the queue stays short


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor to write.

    Attributes:
      key: unique name in the journal.
      file: path relative to the output folder.
      offset, nbytes: the range it fills.
      pieces: makes the flat arrays to write.
    """

    key: str
    file: str
    offset: int
    nbytes: int
    pieces: Callable[[], Iterator[np.ndarray]]


def work_folder(dst: Path) -> Path:
    """Where a conversion to `dst` works."""
    return dst.with_name(dst.name + ".converting")


def check_early(dst: Path | str, force: bool) -> None:
    """`check_target` before any planning; a journal beside `dst` may yet show that this very conversion made it."""
    dst = Path(os.path.abspath(dst))
    if force or not (work_folder(dst) / JOURNAL).is_file():
        check_target(dst, force)


class Conversion:
    """A folder being built at `DST.converting/out` next to `DST`, with a journal; a context manager.

    Leaving the block normally does nothing but release the lock: `finish` is what puts the folder in place.
    Leaving it with an error keeps everything for a rerun, except on a full disk, when the space is given back.

    `already_done` says that an earlier run with the same plan was killed after its last rename: nothing is left to do.

    Raises ConfigError when `dst` exists and may not be replaced, or another process is at it.
    """

    def __init__(self, dst: Path | str, plan: dict[str, Any], *, force: bool, nbytes: int):
        self.dst = Path(os.path.abspath(dst))
        check_early(self.dst, force)
        self.force = force
        self.work = work_folder(self.dst)
        self.out = self.work / "out"
        self.already_done = False
        self.records: dict[str, Record] = {}
        digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
        self._header = {"version": _VERSION, "plan": digest}
        make_parent(self.dst)
        self._open()
        self.resumed = bool(self.records)
        try:
            if self.already_done:
                self._remove()
                return
            check_target(self.dst, force)
            if not self.resumed:
                self.restart()
            done = sum(record["size"] for record in self.records.values())
            check_free(self.dst.parent, max(nbytes - done, 0), f"the conversion to {self.dst.name}")
        except BaseException:
            if self._is_new:
                self._remove()
            self._journal.close()
            raise

    def _open(self) -> None:
        journal = self.work / JOURNAL
        if os.path.lexists(self.work) and not journal.is_file() and any(self.work.iterdir()):
            raise ConfigError(f"{self.work} is in the way and no unfinished conversion: remove or rename it")
        self.work.mkdir(exist_ok=True)
        self._is_new = not journal.is_file()
        self._journal = journal.open("a+b")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._journal.close()
            raise ConfigError(f"{self.work}: another conversion is writing there") from None
        self._journal.seek(0)
        *lines, torn = self._journal.read().split(b"\n")  # a torn last line never happened
        self._journal.truncate(self._journal.tell() - len(torn))
        entries = [entry for entry in map(_parse, lines[1:]) if entry is not None]
        finished = any("finished" in entry for entry in entries)
        same = bool(lines) and _parse(lines[0]) == self._header
        if same and finished and os.path.lexists(self.dst) and not self.out.exists() and not self.force:
            self.already_done = True  # killed while it cleaned up
        elif same and self.out.is_dir() and not (finished and os.path.lexists(self.dst)):
            # (Otherwise killed while names were exchanged: `out` may by now be the folder that was replaced.)
            self.records = {entry["key"]: entry for entry in entries if "key" in entry}

    def restart(self) -> None:
        """Throw away what an earlier run did."""
        self.records, self.resumed = {}, False
        shutil.rmtree(self.out, ignore_errors=True)
        self._journal.truncate(0)
        self._append(self._header)
        self.out.mkdir()

    def _append(self, entry: dict[str, Any]) -> None:
        self._journal.write(json.dumps(entry).encode() + b"\n")
        self._journal.flush()

    def run(
        self, jobs: Sequence[Job], *, threads: int | None = None, quiet: bool = False
    ) -> dict[str, Record]:
        """Do the jobs that the journal does not have; returns size and SHA-256 by key.

        Raises:
          DataError: a source file is truncated.
          OSError: the disk is full or failing.
        """
        progress = _Progress(sum(job.nbytes for job in jobs), len(jobs), quiet)
        results: dict[str, Record] = {}

        def work(job: Job) -> tuple[Job, Record, bool]:
            known = self.records.get(job.key)
            if known is not None and _intact(self.out / job.file, job, known):
                return job, {"size": job.nbytes, "sha256": known["sha256"]}, False
            record = write_file(self.out / job.file, job.pieces(), job.offset)
            assert record["size"] == job.nbytes, (job.key, record, job.nbytes)
            return job, record, True

        with ThreadPoolExecutor(threads or max(2, min(8, os.cpu_count() or 1))) as pool:
            waiting: set[Future[tuple[Job, Record, bool]]] = set()
            queue = iter(jobs)
            try:
                while True:
                    while len(waiting) < _AHEAD and (job := next(queue, None)) is not None:
                        waiting.add(pool.submit(work, job))
                    if not waiting:
                        break
                    ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    # Those that failed last: what was done before a failure is in the journal.
                    for future in sorted(ready, key=lambda done: done.exception() is not None):
                        job, record, new = future.result()
                        results[job.key] = record
                        if new:
                            self._append({"key": job.key, **record})
                        progress.add(job.nbytes)
            finally:
                for future in waiting:
                    future.cancel()
        progress.end()
        return results

    def finish(self) -> None:
        """Flush the folder, give it its name in one step, remove the journal and what was replaced."""
        fsync_tree(self.out)
        check_target(self.dst, self.force)  # it may have appeared meanwhile
        self._append({"finished": True})
        replaced = self.work / "replaced"
        if os.path.lexists(self.dst):  # then an earlier run, killed while it cleaned up, had done its work
            shutil.rmtree(replaced, ignore_errors=True)
        commit(self.out, self.dst, replaced)
        self._remove()

    def _remove(self) -> None:
        for path in self.work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        (self.work / JOURNAL).unlink()
        self.work.rmdir()

    def __enter__(self) -> Conversion:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        full = error is not None and (isinstance(error, StorageError) or storage_error(error) is not None)
        if (full or isinstance(error, DataError)) and (self.work / JOURNAL).is_file():
            # A full disk must not stay full, and a source that cannot be read does not get better.
            self._remove()
        self._journal.close()


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _intact(file: Path, job: Job, record: Record) -> bool:
    """Whether the range of a journalled job holds what was written."""
    if (
        record.get("size") != job.nbytes
        or not file.is_file()
        or file.stat().st_size < job.offset + job.nbytes
    ):
        return False
    digest = hashlib.sha256()
    for piece in read_range(file, job.offset, job.nbytes):
        digest.update(piece)
    return digest.hexdigest() == record.get("sha256")


class _Progress:
    """A line on a terminal that is rewritten; on anything else one line every 30 seconds and none for short jobs."""

    def __init__(self, nbytes: int, count: int, quiet: bool):
        self.total, self.count, self.done, self.quiet = nbytes, count, 0, quiet
        self.started = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        now = time.monotonic()
        if not self.quiet and now - self.shown > (0.2 if self.terminal else 30):
            self.shown = now
            rate = self.done / (now - self.started)
            left = (self.total - self.done) / max(rate, 1)
            text = (
                f"{self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB ({100 * self.done / max(self.total, 1):.1f}%)"
                f" | {rate / 1e6:.0f} MB/s | {left / 60:.1f} min left"
            )
            if self.terminal:
                text = f"\r\x1b[K{text}"
            print(text, end="" if self.terminal else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.terminal and not self.quiet:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
