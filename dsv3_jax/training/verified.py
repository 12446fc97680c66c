"""Which data files were read whole and found good, so that a start need not read terabytes again.

`.verified.json` stands beside the shards: for each file its size, time of change and inode when it was read, its
SHA-256 and its highest id. A file is read again once any of the three differs; the time of change is the inode's
(ctime), which also a program that sets the time of writing back cannot set. What this cannot see is a disk that
gives other bytes for a file nobody wrote to; `data.verify: full` reads everything.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

NAME = ".verified.json"
_FORMAT = "dsv3_jax/verified/1"
# A file written this shortly before it was read might be written again within one tick of the clock.
_SETTLED_NS = 2_000_000_000


class Verified:
    """The record of one data folder. `get` and `put` are thread-safe."""

    def __init__(self, folder: Path) -> None:
        """What an earlier start left; nothing if it cannot be read, for it only saves work."""
        self._path = folder / NAME
        self._entries: dict[str, dict[str, Any]] = {}
        self._changed = False
        try:
            found = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return
        if (
            isinstance(found, dict)
            and found.get("format") == _FORMAT
            and isinstance(found.get("files"), dict)
        ):
            self._entries = found["files"]

    def get(self, file: Path) -> tuple[str, int] | None:
        """SHA-256 and highest id (-1: none) of a file that has not changed since it was read, or None."""
        entry = self._entries.get(file.name)
        if not isinstance(entry, dict) or entry.get("stat") != stamp(file):
            return None
        sha, highest = entry.get("sha256"), entry.get("highest")
        return (sha, highest) if isinstance(sha, str) and isinstance(highest, int) else None

    def put(self, file: Path, before: list[int], sha256: str, highest: int) -> None:
        """Remember a file that was read whole; `before`: its stamp from before it was read."""
        settled = time.time_ns() - before[1] > _SETTLED_NS
        if settled and stamp(file) == before:
            self._entries[file.name] = {"stat": before, "sha256": sha256, "highest": highest}
            self._changed = True

    def save(self) -> str | None:
        """Write the record; why it could not be (a folder that may only be read), or None."""
        if not self._changed:
            return None
        temporary = self._path.with_name(f"{NAME}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps({"format": _FORMAT, "files": self._entries}, indent=1) + "\n")
            os.replace(temporary, self._path)
        except OSError as error:
            return (
                f"{self._path} cannot be written ({error.strerror}): every start reads all of this data again"
            )
        self._changed = False
        return None


def stamp(file: Path) -> list[int]:
    """Size, time of change in nanoseconds, inode."""
    stat = file.stat()
    return [stat.st_size, stat.st_ctime_ns, stat.st_ino]
