"""A conversion that is killed goes on; whatever happens, the destination is whole or as it was."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import from_hf, to_hf
from dsv3_jax.checkpoint import atomic, read_manifest, validate_step
from dsv3_jax.checkpoint import jobs as copying
from dsv3_jax.checkpoint.jobs import JOURNAL, Conversion, Job
from dsv3_jax.errors import ConfigError, DataError, StorageError
from tests.convert import folders

WRITE = copying.write_file


class Killed(BaseException):
    """Stands for kill -9: nothing may be cleaned up, so the journal is left as it is."""


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """Let `count` tensors be written, then break off; returns the list of files written."""
    written: list[str] = []

    def write(file: Path, pieces: Iterator[np.ndarray], offset: int = 0) -> dict[str, Any]:
        if len(written) >= count:
            raise Killed
        written.append(f"{file.name}@{offset}")
        return WRITE(file, pieces, offset)

    monkeypatch.setattr(copying, "write_file", write)
    return written


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    raw, tensors = folders.tensors_of("v3-tied", dtype=folders.BF16)
    return folders.write(tmp_path / "hf", raw, tensors, shards=2)


@pytest.mark.parametrize("direction", ["from_hf", "to_hf"])
def test_a_rerun_does_only_what_is_left(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    total = len(folders.read(hf))
    convert, source = from_hf.convert, hf
    if direction == "to_hf":
        from_hf.convert(hf, tmp_path / "native")
        convert, source = to_hf.convert, tmp_path / "native"
    stop_after(monkeypatch, 40)
    with pytest.raises(Killed):
        convert(source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    journal = tmp_path / "dst.converting" / JOURNAL
    done = len(journal.read_bytes().splitlines()) - 1
    assert 0 < done <= 40
    journal.write_bytes(journal.read_bytes()[:-20])  # the last line is torn
    written = stop_after(monkeypatch, 10**6)
    convert(source, tmp_path / "dst")
    assert len(written) == total - (done - 1)
    if direction == "from_hf":
        assert validate_step(tmp_path / "dst", hashes=True) == []
        to_hf.convert(tmp_path / "dst", tmp_path / "back")
    last = tmp_path / ("back" if direction == "from_hf" else "dst")
    folders.assert_same_tensors(folders.read(last), folders.read(hf))
    assert not (tmp_path / "dst.converting").exists()


def test_what_was_damaged_meanwhile_is_written_again(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All that was done is in the journal however late the journalling thread gets to look.
    monkeypatch.setattr(copying, "wait", lambda jobs, return_when: wait(jobs))
    stop_after(monkeypatch, 40)
    with pytest.raises(Killed):
        from_hf.convert(hf, tmp_path / "dst")
    entries = [
        json.loads(line) for line in (tmp_path / "dst.converting" / JOURNAL).read_text().splitlines()[1:]
    ]
    file = tmp_path / "dst.converting" / "out" / entries[0]["key"]
    file.write_bytes(bytes(file.stat().st_size))
    written = stop_after(monkeypatch, 10**6)
    from_hf.convert(hf, tmp_path / "dst")
    assert f"{file.name}@0" in written
    assert validate_step(tmp_path / "dst", hashes=True) == []


def test_a_changed_source_or_flag_starts_over(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = len(folders.read(hf))
    stop_after(monkeypatch, 40)
    with pytest.raises(Killed):
        from_hf.convert(hf, tmp_path / "dst")
    written = stop_after(monkeypatch, 40)
    with pytest.raises(Killed):
        from_hf.convert(hf, tmp_path / "dst", dtype="float32")
    shard = hf / "model-00001-of-00002.safetensors"
    os.utime(shard, ns=(1, 1))
    written = stop_after(monkeypatch, 10**6)
    from_hf.convert(hf, tmp_path / "dst", dtype="float32")
    assert len(written) == total


def test_killed_between_the_two_names(tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_hf.convert(hf, tmp_path / "dst", dtype="float32")
    for moment in ("commit", "_remove"):
        with monkeypatch.context() as patch:

            def killed(*args: Any) -> None:
                raise Killed

            patch.setattr(*((copying, "commit") if moment == "commit" else (Conversion, "_remove")), killed)
            with pytest.raises(Killed):
                from_hf.convert(hf, tmp_path / "dst", force=True)
        assert validate_step(tmp_path / "dst", hashes=True) == []  # whole: the old one, then the new one
        dtype = read_manifest(tmp_path / "dst").tree["params/embed_VD"]["dtype"]
        assert dtype == ("float32" if moment == "commit" else "bfloat16")
        from_hf.convert(hf, tmp_path / "dst", force=True)
        assert validate_step(tmp_path / "dst", hashes=True) == []
        assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "hf"]
        from_hf.convert(hf, tmp_path / "dst", dtype="float32", force=True)


def test_killed_while_names_are_exchanged(tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that was replaced then lies where the new one was built; none of its files may be taken for new."""
    from_hf.convert(hf, tmp_path / "dst")
    (tmp_path / "dst" / "stray.txt").write_text("of the old one")

    exchange = atomic._exchange

    def killed(built: Path, dst: Path) -> None:
        if not exchange(built, dst):
            pytest.skip("this file system cannot exchange two names")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_exchange", killed)
        with pytest.raises(Killed):
            from_hf.convert(hf, tmp_path / "dst", force=True)
    assert (tmp_path / "dst.converting" / "out" / "stray.txt").exists()
    from_hf.convert(hf, tmp_path / "dst", force=True)
    assert validate_step(tmp_path / "dst", hashes=True) == []
    assert not (tmp_path / "dst" / "stray.txt").exists()


def test_a_torn_line_does_not_spoil_the_next(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any) -> None:
        raise Killed

    journal = tmp_path / "dst.converting" / JOURNAL
    with monkeypatch.context() as patch:
        patch.setattr(Conversion, "finish", killed)
        with pytest.raises(Killed):
            from_hf.convert(hf, tmp_path / "dst")
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(lines[:10]) + lines[10][:40])
        with pytest.raises(Killed):
            from_hf.convert(hf, tmp_path / "dst")
    again = [json.loads(line) for line in journal.read_bytes().splitlines()]
    assert len(again) == len(lines) == len(folders.read(hf)) + 1
    written = stop_after(monkeypatch, 0)
    from_hf.convert(hf, tmp_path / "dst")
    assert written == []


def test_killed_while_cleaning_up(tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Conversion, "_remove", killed)
        with pytest.raises(Killed):
            from_hf.convert(hf, tmp_path / "dst")
    with pytest.raises(ConfigError, match="exists"):  # another conversion than the one that made it
        from_hf.convert(hf, tmp_path / "dst", dtype="float32")
    written = stop_after(monkeypatch, 0)
    from_hf.convert(hf, tmp_path / "dst")
    assert written == [] and sorted(path.name for path in tmp_path.iterdir()) == ["dst", "hf"]


def test_force_keeps_the_old_one_until_the_new_one_is_whole(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_hf.convert(hf, tmp_path / "dst")
    with pytest.raises(ConfigError, match="--force"):
        from_hf.convert(hf, tmp_path / "dst")
    stop_after(monkeypatch, 30)
    with pytest.raises(Killed):
        from_hf.convert(hf, tmp_path / "dst", dtype="float32", force=True)
    assert validate_step(tmp_path / "dst", hashes=True) == []
    stop_after(monkeypatch, 10**6)
    from_hf.convert(hf, tmp_path / "dst", dtype="float32", force=True)
    assert read_manifest(tmp_path / "dst").tree["params/embed_VD"]["dtype"] == "float32"


def test_two_conversions_do_not_meet(tmp_path: Path) -> None:
    first = Conversion(tmp_path / "dst", {}, force=False, nbytes=0)
    with first, pytest.raises(ConfigError, match="another conversion"):
        Conversion(tmp_path / "dst", {}, force=False, nbytes=0)
    (tmp_path / "other.converting").mkdir()
    (tmp_path / "other.converting" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="in the way"):
        Conversion(tmp_path / "other", {}, force=False, nbytes=0)
    assert (tmp_path / "other.converting" / "thesis.txt").exists()


def test_a_disk_that_is_too_small_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="needs"):
        Conversion(tmp_path / "dst", {}, force=False, nbytes=1 << 60)
    assert list(tmp_path.iterdir()) == []


def test_a_source_cut_while_it_is_read_leaves_nothing(tmp_path: Path) -> None:
    def pieces() -> Iterator[np.ndarray]:
        yield np.zeros(4, np.float32)
        raise DataError("source ends early")

    with (
        pytest.raises(DataError, match="early"),
        Conversion(tmp_path / "dst", {}, force=False, nbytes=0) as conversion,
    ):
        conversion.run([Job("x", "x", 0, 32, pieces)])
    assert list(tmp_path.iterdir()) == []


def size(file: Path) -> int:
    return file.stat().st_size if file.exists() else -1


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    """Both directions, each killed until it once gets through; seeds and moments are printed on failure."""
    raw, tensors = folders.tensors_of("v3", mtp=1, dtype=folders.BF16)
    hf = folders.write(tmp_path / "hf", raw, tensors, shards=3)
    rng, kills = random.Random(0), 0
    for module, source, target in (("from_hf", hf, "native"), ("to_hf", tmp_path / "native", "back")):
        command = [sys.executable, "-m", f"convert.{module}", str(source), str(tmp_path / target)]
        # Every pause makes the copying slow enough for a kill to fall into it.
        slow = "import time, dsv3_jax.checkpoint.jobs as j; w = j.write_file\n"
        slow += "def write(*a):\n    time.sleep(0.02)\n    return w(*a)\nj.write_file = write\n"
        slow += f"import runpy, sys; sys.argv = {command[2:]!r}\n"
        slow += f"runpy.run_module('convert.{module}', run_name='__main__')"
        journal = tmp_path / f"{target}.converting" / JOURNAL
        while not ((tmp_path / target).exists() and not journal.parent.exists()):
            process = subprocess.Popen(
                [sys.executable, "-c", slow], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
            began = size(journal)
            while process.poll() is None and size(journal) == began:  # imports and planning
                time.sleep(0.01)
            try:
                _, text = process.communicate(timeout=rng.uniform(0, 0.8))
                assert process.returncode == 0, text
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
            assert (
                not (tmp_path / target).exists() or target == "back" or validate_step(tmp_path / target) == []
            )
    assert kills >= 2, kills
    folders.assert_same_tensors(folders.read(tmp_path / "back"), tensors)
