"""Text tokenised as it is read: every document once an epoch, the same rows whoever makes them, errors by line."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

grain = pytest.importorskip("grain", reason="needs the extra `data`")
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import zstandard  # noqa: E402

from dsv3_jax.config import RunConfig  # noqa: E402
from dsv3_jax.errors import ConfigError, DataError  # noqa: E402
from dsv3_jax.text import Tokenizer  # noqa: E402
from dsv3_jax.training.data import Batches  # noqa: E402
from dsv3_jax.training.open_data import open_data  # noqa: E402
from dsv3_jax.training.prepare import hash_fraction  # noqa: E402
from dsv3_jax.training.rows import Batch  # noqa: E402
from dsv3_jax.training.sources import Document  # noqa: E402
from dsv3_jax.training.text_dataset import HeldOut, TextDataset  # noqa: E402
from dsv3_jax.training.text_files import BlockReader, find_text, open_text  # noqa: E402
from tests.training import tiny  # noqa: E402

T = 64
BYTES = Tokenizer.bytes()


def _texts(tag: str, count: int = 90) -> list[str]:
    rng = random.Random(tag)
    return [f"{tag}{number}:" + "é" * rng.randrange(40) + "." * rng.randrange(40) for number in range(count)]


def _lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in texts).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 documents in each kind of file; compressed text in several members and frames."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.jsonl").write_bytes(_lines(_texts("a"))[:-1] + b"\n\n")  # an empty line at the end
    data = _lines(_texts("b"))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(data[:3000]) + gzip.compress(data[3000:]))
    data = _lines(_texts("c"))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(data[:3000]) + zstandard.compress(data[3000:]))
    table = pa.table({"n": list(range(90)), "text": _texts("d")})
    pq.write_table(table, folder / "d.parquet", row_group_size=40)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DSV3_CACHE", str(tmp_path / "cache"))
    yield


def _open(folder: Path, *, workers: int = 0, val_fraction: float = 0.1) -> TextDataset:
    return TextDataset(
        str(folder),
        find_text(str(folder)),
        BYTES,
        seq_len=T,
        vocab_size=258,
        val_fraction=val_fraction,
        workers=workers,
    )


def _documents(batch: Batch) -> list[str]:
    """The texts in a batch, put together from their pieces where they were cut."""
    found = []
    for tokens, targets, segments in zip(
        batch["tokens_BT"], batch["targets_BT"], batch["segments_BT"], strict=True
    ):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            assert (targets[here][:-1] == tokens[here][1:]).all()
            found.append(BYTES.decode([*tokens[here].tolist(), int(targets[here][-1])]))
    return found


def _equal(a: list[Batch], b: list[Batch]) -> bool:
    return all(np.array_equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x)


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"])
def test_blocks_hold_every_document_once_in_order_and_any_can_be_read_first(folder: Path, name: str) -> None:
    file = open_text(folder / name, "text", block_bytes=500)
    assert file.blocks > 5 and int(file.segments.sum()) == file.blocks
    reader = BlockReader("text")
    texts = [[d.text for d in reader.read(file, block)] for block in range(file.blocks)]
    assert list(itertools.chain(*texts)) == _texts(name[0])
    for block in (4, 1, 3):
        assert [d.text for d in reader.read(file, block)] == texts[block]
    reader.close()
    again = open_text(folder / name, "text", block_bytes=500)  # from the cache
    assert again.identity() == file.identity()


def test_an_epoch_holds_every_document_that_is_not_held_out_once(folder: Path) -> None:
    texts = [text for tag in "abcd" for text in _texts(tag)]
    kept = sorted(text for text in texts if hash_fraction(Document("", text)) >= 0.1)
    assert 300 < len(kept) < 350
    dataset = _open(folder)
    orders = []
    for epoch in range(2):
        seen: list[np.ndarray] = []
        for number in range(dataset.windows.per_epoch):
            documents = dataset.windows.documents(number + epoch * dataset.windows.per_epoch, seed=3)
            seen += dataset.windows.encode(documents, held_out=False)
        decoded = [BYTES.decode(ids.tolist()) for ids in seen]
        assert sorted(decoded) == kept
        orders.append(decoded)
    assert orders[0] != orders[1]
    out = list(HeldOut(dataset).in_order(2))
    held = [text for text in texts if hash_fraction(Document("", text)) < 0.1]
    targets = sum(int((batch["targets_BT"] >= 0).sum()) for batch in out)
    assert targets == sum(len(text.encode()) + 1 for text in held) > 1000
    assert len(list(HeldOut(dataset).in_order(2, 3))) == 3
    dataset.close()


def test_rows_are_full_and_hold_whole_documents(folder: Path) -> None:
    dataset = _open(folder)
    batch = dataset.sample(0, 128, seed=3)
    dataset.close()
    assert batch["tokens_BT"].shape == (128, T) and (batch["segments_BT"] > 0).mean() > 0.95
    texts = {text for tag in "abcd" for text in _texts(tag) if len(text.encode()) < T}
    assert len(texts.intersection(_documents(batch))) > 50


def test_workers_and_hosts_change_nothing_and_a_resume_goes_on(folder: Path) -> None:
    plain = Batches(_open(folder), 8, seed=3)
    want = [next(plain) for _ in range(30)]
    plain.close()
    with_workers = Batches(_open(folder, workers=2), 8, seed=3)
    have = [next(with_workers)]
    for worker in multiprocessing.active_children():  # a batch system signals every process of a job
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGTERM)
    assert _equal([*have, *(next(with_workers) for _ in range(19))], want[:20])
    state = json.loads(json.dumps(with_workers.state()))
    assert state["position"] == 160 and state["cursor"][0] > 0, "past the first window"
    epoch = with_workers.progress()["epoch"]
    assert epoch > 0
    assert len(multiprocessing.active_children()) == 2
    with_workers.close()
    deadline = time.monotonic() + 30
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not multiprocessing.active_children()
    hosts = [Batches(_open(folder), 8, seed=3, host=host, n_hosts=2) for host in range(2)]
    for host in hosts:
        host.restore(state)
        assert host.state() == state
    halves = [[next(host) for _ in range(10)] for host in hosts]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*halves, strict=True)]
    assert _equal(joined, want[20:])
    assert hosts[0].state() == hosts[1].state()
    for host in hosts:
        host.close()
    with pytest.raises(ConfigError, match="other data"):
        Batches(_open(folder, val_fraction=0.2), 8, seed=3).restore(state)


def test_a_cursor_needs_no_row_that_the_thread_ahead_has_dropped(folder: Path) -> None:
    # Three hosts take 400 rows each of a batch: the second one saves after the first batch.
    alone, middle = _open(folder), _open(folder)
    alone.sample(0, 1200, seed=3)
    middle.sample(400, 400, seed=3)

    class Late:
        """The lock, which the thread that reads ahead gets first."""

        def __init__(self, lock: Any) -> None:
            self.lock, self.late = lock, False

        def __enter__(self) -> None:
            if not self.late:
                self.late = True
                middle.sample(1200 + 400, 400, seed=3)
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()

    middle._lock = Late(middle._lock)  # type: ignore[assignment]
    assert middle._end < 1200
    assert middle.cursor(1200, seed=3) == alone.cursor(1200, seed=3)
    assert middle._end >= 2000, "it went back to the start of the text"
    assert middle.progress(1200, seed=3) == alone.progress(1200, seed=3)
    alone.close()
    middle.close()


def test_damage_is_named_by_file_and_line(folder: Path, tmp_path: Path) -> None:
    def read(name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        dataset = TextDataset(
            name, [tmp_path / name], BYTES, seq_len=T, vocab_size=250 if name == "v.jsonl" else 258, workers=0
        )
        with contextlib.closing(dataset):
            dataset.sample(0, 4, seed=0)

    good = _lines(_texts("a"))
    with pytest.raises(DataError, match=r"x\.jsonl:91: not valid JSON"):
        read("x.jsonl", good + b'{"text": \n')
    with pytest.raises(DataError, match=r'y\.jsonl:91: expected an object with a string "text"'):
        read("y.jsonl", good + b'{"texts": "a"}\n')
    with pytest.raises(DataError, match=r"z\.jsonl:91: not UTF-8"):
        read("z.jsonl", good + b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"s\.jsonl:91: lone surrogate"):
        read("s.jsonl", good + b'{"text": "\\ud800"}\n')
    with pytest.raises(DataError, match=r"v\.jsonl:\d+: token 0 is 25\d, not below the vocabulary size 250"):
        read("v.jsonl", good)
    with pytest.raises(DataError, match=r"b\.jsonl\.gz: damaged after line \d+"):
        read("b.jsonl.gz", gzip.compress(good)[:-20])
    with pytest.raises(DataError, match=r"c\.jsonl\.zst: damaged after line \d+"):
        read("c.jsonl.zst", zstandard.compress(good)[:-20])
    with pytest.raises(DataError, match=r"c2\.jsonl\.zst: damaged after line \d+"):
        read("c2.jsonl.zst", zstandard.compress(good) + b"no frame")
    with pytest.raises(DataError, match=r"d\.parquet: not a readable parquet file"):
        read("d.parquet", good)
    with pytest.raises(DataError, match="no text in it"):
        read("e.jsonl", b"")
    with pytest.raises(DataError, match="no document in it that is not empty"):
        read("f.jsonl", b'{"text": ""}\n' * 9)
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "n.parquet")
    with pytest.raises(DataError, match=r"n\.parquet: row 2: expected a string in column 'text', found None"):
        read("n.parquet", (tmp_path / "n.parquet").read_bytes())
    with pytest.raises(DataError, match=r"no column 'body' of strings; it has n \(int64\), text \(string\)"):
        open_text(folder / "d.parquet", "body", 500)


def test_an_error_in_a_worker_keeps_its_kind(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"[1]\n")
    dataset = TextDataset("x", [tmp_path / "x.jsonl"], BYTES, seq_len=T, vocab_size=258, workers=1)
    with pytest.raises(DataError, match=r"x\.jsonl:1: expected an object"):
        dataset.sample(0, 1, seed=0)
    dataset.close()


def _config(**data: object) -> RunConfig:
    cfg = tiny.replace(tiny.RUN, "model", vocab_size=258)
    return tiny.replace(cfg, "data", **data)


def test_what_a_source_may_be(folder: Path) -> None:
    opened = open_data(_config(source=str(folder / "*.jsonl*"), workers=0), None)
    assert isinstance(opened.train, TextDataset) and len(opened.train.files) == 3
    assert opened.tokenizer is not None and isinstance(opened.validation, HeldOut)
    assert open_data(_config(source=str(folder / "d.parquet"), val_fraction=0.0), None).validation is None
    with pytest.raises(ConfigError, match=r"did you mean '.*/a\.jsonl'"):
        open_data(_config(source=str(folder / "a.jsonk")), None)
    with pytest.raises(ConfigError, match=r"learned from all of the text"):
        open_data(_config(source=str(folder), tokenizer="bpe:300"), None)
    with pytest.raises(DataError, match="no token shards here"):
        open_data(_config(source=str(folder), loader="shards"), None)
    with pytest.raises(ConfigError, match="did you mean 'python-docs'"):
        open_data(_config(source="python-doc"), None)
