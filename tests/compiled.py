"""Compiled programs of the tests: entries on disk are whole or absent, and what a process keeps mapped is bounded.

JAX writes an entry of its compilation cache in place and never replaces one. A reader beside the writer sees part of
it, and a killed process (tests kill theirs) leaves part of it for good; each later read then warns, and here a warning
is an error.
"""

from __future__ import annotations

import gc
import os
import sys
import zlib
from pathlib import Path
from typing import Any

MAPPINGS = 20_000
"""Memory mappings of a process from which its programs are dropped when a test file ends.

Linux allows 65,530 (vm.max_map_count). A program on a CPU has about nine; the whole suite in one process came to 53,770
by 74 %. Where they run out LLVM cannot allocate and the process dies, mostly while it reads the compilation cache.
"""


def whole_entries() -> None:
    """Make this process write entries by one rename and take one that it cannot unpack for absent."""
    from jax._src import compilation_cache, lru_cache

    cache = lru_cache.LRUCache
    if cache.get.__module__ == __name__:
        return
    read, write = cache.get, cache.put
    zstd = compilation_cache.zstd or compilation_cache.zstandard  # else JAX packs by zlib
    unpacking = (zlib.error,) if zstd is None else (zlib.error, zstd.ZstdError)

    def get(self: Any, key: str) -> bytes | None:
        value = read(self, key)
        if value is None:
            return None
        try:
            compilation_cache.decompress_executable(value)
        except unpacking as error:
            print(f"compilation cache: {key} is not whole ({error}); compiled again", file=sys.stderr)
            Path(_file(self, key)).unlink(missing_ok=True)
            return None
        return value

    def put(self: Any, key: str, value: bytes) -> None:
        if self.eviction_enabled:  # under a file lock, with a time beside each entry
            return write(self, key, value)
        if os.path.exists(_file(self, key)):
            return None
        part = f"{_file(self, key)}.{os.getpid()}.part"
        Path(part).write_bytes(value)
        os.replace(part, _file(self, key))
        return None

    cache.get, cache.put = get, put


def _file(cache: Any, key: str) -> str:
    from jax._src import lru_cache

    return os.path.join(str(cache.path), key + lru_cache._CACHE_SUFFIX)


def mappings() -> int:
    """Memory mappings of this process; 0 where the system has no /proc."""
    try:
        with open("/proc/self/maps", "rb") as file:
            return sum(1 for _ in file)
    except FileNotFoundError:
        return 0


def drop_programs(above: int = MAPPINGS) -> bool:
    """Drop every compiled program of this process if it has more mappings than `above`; whether it did."""
    if "jax" not in sys.modules or mappings() <= above:
        return False
    sys.modules["jax"].clear_caches()
    gc.collect()
    return True
