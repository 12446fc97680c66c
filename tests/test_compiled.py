"""The compiled programs of the tests: what is on disk is whole, what a process keeps is bounded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache
from jax._src.lru_cache import LRUCache

from tests.compiled import drop_programs, mappings


def entry(text: bytes) -> bytes:
    return compilation_cache.compress_executable(text)


@pytest.mark.parametrize("left", [0, 1, 10], ids=["nothing", "a byte", "half"])
def test_an_entry_that_a_killed_process_left_is_replaced(tmp_path: Path, left: int) -> None:
    cache = LRUCache(str(tmp_path), max_size=-1)
    value = entry(b"a program " * 50)
    assert len(value) > 2 * left
    (tmp_path / "key-cache").write_bytes(value[:left])
    assert cache.get("key") is None
    cache.put("key", value)
    assert cache.get("key") == value
    assert [file.name for file in tmp_path.iterdir()] == ["key-cache"]


WRITER = """
import sys
from tests.compiled import whole_entries
whole_entries()
from jax._src import compilation_cache
from jax._src.lru_cache import LRUCache
import os
cache = LRUCache(sys.argv[1], max_size=-1)
value = compilation_cache.compress_executable(os.urandom(2_000_000))
print("ready", flush=True)
for at in range(200):
    cache.put(f"key{at}", value)
"""


def test_a_reader_beside_a_writer_sees_whole_entries(tmp_path: Path) -> None:
    """Two hundred entries of 2 MB, read as soon as their names are there."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        sizes = set()
        while writer.poll() is None:
            for file in tmp_path.glob("*-cache"):
                sizes.add(file.stat().st_size)
        assert writer.returncode == 0
    sizes |= {file.stat().st_size for file in tmp_path.glob("*-cache")}
    assert len(sizes) == 1 and len(list(tmp_path.iterdir())) == 200


@pytest.mark.skipif(not mappings(), reason="NOT RUN: no /proc here, so no count of mappings")
def test_dropped_programs_give_their_mappings_back() -> None:
    x = jnp.ones((8, 8))
    before = mappings()
    programs = [jax.jit(lambda x, i=i: jnp.sort(x @ x * i).sum()) for i in range(10)]
    wanted = [float(program(x)) for program in programs]
    full = mappings()
    assert full > before + 40
    assert not drop_programs(above=full + 1000)
    assert drop_programs(above=0)
    assert mappings() < full - 40
    assert [float(program(x)) for program in programs] == wanted, (
        "they compile again where they are used again"
    )
