"""Batches: right contents, by position alone, and damaged data refused by name."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.training import shards, verified
from dsv3_jax.training.data import Batches, TokenDataset, Verify
from dsv3_jax.training.shards import FORMAT, ShardWriter

DOCUMENTS = [
    [9, 1, 2, 3, 8],
    [9, 4, 8],
    [9, 5, 6, 7, 1, 2, 3, 4, 5, 6, 8],
    [9],
    [9, 8],
    [9, 7, 7, 7, 8],
]


def write(
    folder: Path, documents: list[list[int]] = DOCUMENTS, *, vocab: int = 10, shard_tokens: int = 8
) -> Path:
    """A data folder with `documents` as split "train" and the first of them as "validation"."""
    folder.mkdir(exist_ok=True)
    shards = []
    for split, chosen in (("train", documents), ("validation", documents[:1])):
        writer = ShardWriter(folder, split, vocab, shard_tokens)
        for document in chosen:
            writer.add(np.asarray(document))
        shards += writer.close()
    index = {"format": FORMAT, "dtype": "uint16", "vocab_size": vocab, "shards": shards}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "data")


@pytest.mark.parametrize("packing", ["best_fit", "split"])
def test_every_token_but_bos_is_a_target_once_with_its_own_past(folder: Path, packing: str) -> None:
    dataset = TokenDataset(folder, seq_len=4, packing=packing)
    pairs = []
    for index in range(dataset.n_rows):
        row = {name: array[0] for name, array in dataset.rows(np.asarray([index])).items()}
        real = row["segments_BT"] > 0
        pairs += list(zip(row["tokens_BT"][real].tolist(), row["targets_BT"][real].tolist(), strict=True))
        assert (row["targets_BT"][~real] == -1).all() and (row["tokens_BT"][~real] == 0).all()
        for segment in range(1, row["segments_BT"].max() + 1):
            here = row["segments_BT"] == segment
            assert row["positions_BT"][here].tolist() == list(range(here.sum()))
            inside = row["tokens_BT"][here][1:], row["targets_BT"][here][:-1]
            assert np.array_equal(*inside), "inside a segment the target is the next token"
    assert sorted(pairs) == sorted((a, b) for doc in DOCUMENTS for a, b in itertools.pairwise(doc))


def test_a_row_in_full(tmp_path: Path) -> None:
    dataset = TokenDataset(write(tmp_path / "data", [[9, 1, 2, 8], [9, 3, 8]]), seq_len=6)
    batch = dataset.rows(np.asarray([0, -1]))
    assert {name: array.tolist() for name, array in batch.items()} == {
        "tokens_BT": [[9, 1, 2, 9, 3, 0], [0] * 6],
        "targets_BT": [[1, 2, 8, 3, 8, -1], [-1] * 6],
        "segments_BT": [[1, 1, 1, 2, 2, 0], [0] * 6],
        "positions_BT": [[0, 1, 2, 0, 1, 0], [0] * 6],
    }
    assert all(array.dtype == np.int32 for array in batch.values())


def test_a_document_cut_between_rows_keeps_the_target_at_the_cut(tmp_path: Path) -> None:
    dataset = TokenDataset(write(tmp_path / "data", [[9, 1, 2, 3, 8]]), seq_len=2)
    assert dataset.rows(np.arange(2))["targets_BT"].tolist() == [[1, 2], [3, 8]]
    assert dataset.rows(np.arange(2))["positions_BT"].tolist() == [[0, 1], [0, 1]]


def _take(batches: Batches, count: int) -> list[dict[str, np.ndarray]]:
    return [next(batches) for _ in range(count)]


def _equal(a: list[dict[str, np.ndarray]], b: list[dict[str, np.ndarray]]) -> bool:
    return all(np.array_equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x)


def test_each_epoch_holds_every_row_once_and_in_another_order(folder: Path) -> None:
    dataset = TokenDataset(folder, seq_len=4)
    everything = dataset.rows(np.arange(dataset.n_rows))
    epochs = [dataset.sample(epoch * dataset.n_rows, dataset.n_rows, seed=3) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(map(bytes, epoch["tokens_BT"])) == sorted(map(bytes, everything["tokens_BT"]))
    assert not _equal(epochs[:1], epochs[1:2])


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("done", [0, 1, 5])
def test_resuming_from_the_state_gives_the_same_batches(folder: Path, done: int, prefetch: int) -> None:
    dataset = TokenDataset(folder, seq_len=4)
    whole = Batches(dataset, 4, seed=1, prefetch=prefetch)
    _take(whole, done)
    state = json.loads(json.dumps(whole.state()))
    assert state["position"] == 4 * done, "batches built ahead do not count"
    resumed = Batches(TokenDataset(folder, seq_len=4), 4, seed=1, prefetch=prefetch)
    _take(resumed, 2)
    resumed.restore(state)
    assert _equal(_take(whole, 4), _take(resumed, 4))
    whole.close()
    resumed.close()


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_batch_that_grows_reads_the_same_samples_in_the_same_order(folder: Path, prefetch: int) -> None:
    def size_at(position: int) -> int:  # 2, 2, then 6
        return 2 if position < 4 else 6

    dataset = TokenDataset(folder, seq_len=4)
    constant, growing = (
        Batches(dataset, 6, seed=1, prefetch=prefetch, size_at=sizes) for sizes in (None, size_at)
    )
    batches = _take(growing, 3)
    assert [len(batch["tokens_BT"]) for batch in batches] == [2, 2, 6] and growing.state()["position"] == 10
    rows = [
        np.concatenate([batch["tokens_BT"] for batch in taken]) for taken in (batches, _take(constant, 2))
    ]
    assert np.array_equal(rows[0], rows[1][:10])
    resumed = Batches(dataset, 6, seed=1, prefetch=prefetch, size_at=size_at)
    resumed.restore({**growing.state(), "position": 2})
    assert _equal(_take(resumed, 2), batches[1:])
    half = [Batches(dataset, 6, seed=1, prefetch=0, size_at=size_at, host=h, n_hosts=2) for h in (0, 1)]
    for whole in batches:
        shares = [next(host)["tokens_BT"] for host in half]
        assert np.array_equal(whole["tokens_BT"], np.concatenate(shares))
    for opened in (constant, growing, resumed):
        opened.close()


@pytest.mark.parametrize("n_hosts", [1, 2, 4])
def test_the_shares_of_hosts_are_the_global_batch(folder: Path, n_hosts: int) -> None:
    dataset = TokenDataset(folder, seq_len=4)
    one = Batches(dataset, 4, seed=1, prefetch=0)
    hosts = [Batches(dataset, 4, seed=1, host=host, n_hosts=n_hosts, prefetch=0) for host in range(n_hosts)]
    for whole in _take(one, 3):
        shares = [next(host) for host in hosts]
        assert all(np.array_equal(whole[k], np.concatenate([share[k] for share in shares])) for k in whole)


def test_the_order_depends_on_the_seed(tmp_path: Path) -> None:
    dataset = TokenDataset(write(tmp_path / "data", [[9, n, 8] for n in range(8)] * 8), seq_len=2)
    a, b = (dataset.sample(0, 16, seed=seed) for seed in (0, 1))
    assert not _equal([a], [b])


def test_restore_refuses_another_seed_data_or_row_length(folder: Path) -> None:
    state = Batches(TokenDataset(folder, seq_len=4), 2, seed=1, prefetch=0).state()
    with pytest.raises(ConfigError, match="made with seed 1, this run has 2"):
        Batches(TokenDataset(folder, seq_len=4), 2, seed=2, prefetch=0).restore(state)
    with pytest.raises(ConfigError, match="made with other data, row length or packing"):
        Batches(TokenDataset(folder, seq_len=5), 2, seed=1, prefetch=0).restore(state)


def test_a_batch_that_hosts_cannot_share_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.batch_size 5 is not a positive multiple of 2 hosts"):
        Batches(TokenDataset(folder, seq_len=4), 5, seed=0, n_hosts=2)


def test_evaluation_sees_every_row_once_padded_at_the_end(folder: Path) -> None:
    dataset = TokenDataset(folder, seq_len=4)
    batches = list(dataset.in_order(4))
    assert {batch["tokens_BT"].shape for batch in batches} == {(4, 4)}
    assert sum(int((batch["targets_BT"] >= 0).sum()) for batch in batches) == dataset.n_inputs
    assert len(list(dataset.in_order(2, max_batches=1))) == 1


def test_splits_are_apart(folder: Path) -> None:
    assert TokenDataset(folder, seq_len=8, split="validation").n_inputs == len(DOCUMENTS[0]) - 1
    with pytest.raises(DataError, match=r"nothing to read in split 'test' \(it holds train, validation\)"):
        TokenDataset(folder, seq_len=8, split="test")


# --- damage ----------------------------------------------------------------------------------------------------


def test_a_missing_or_truncated_file_is_named(folder: Path) -> None:
    shard = folder / "train-00001.bin"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(
        DataError, match=rf"train-00001\.bin: has {len(data) - 1} bytes, index\.json says {len(data)}"
    ):
        TokenDataset(folder, seq_len=4)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00001\.bin: is missing"):
        TokenDataset(folder, seq_len=4)


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.idx"])
def test_a_flipped_bit_is_named(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[8] ^= 1  # in the index a document border: still rising
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"{name}: its SHA-256 is not the one"):
        TokenDataset(folder, seq_len=4)
    TokenDataset(folder, seq_len=4, verify="never")  # found by the checksum alone


# --- what need not be read again -------------------------------------------------------------------------------


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all files had been written some time ago."""
    monkeypatch.setattr(verified, "_SETTLED_NS", -1)


def _write_again(path: Path, data: bytes) -> None:
    """Same size, same inode, the time of writing set back: only the clock of changes, a tick later, tells."""
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        path.write_bytes(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert verified.stamp(path)[::2] == [before.st_size, before.st_ino]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    _write_again(path, data)


def test_a_file_is_read_again_only_when_it_has_changed(
    folder: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    whole = shards._read_whole
    monkeypatch.setattr(shards, "_read_whole", lambda array: read.append(len(array)) or whole(array))
    TokenDataset(folder, seq_len=4, verify="cached")
    files = len(read)
    assert files == 2 * 3
    TokenDataset(folder, seq_len=4, verify="cached")
    assert len(read) == files
    written = folder / "train-00001.bin"
    _write_again(written, written.read_bytes())
    TokenDataset(folder, seq_len=4, verify="cached")
    assert len(read) == files + 1
    TokenDataset(folder, seq_len=4, verify="full")
    assert len(read) == 2 * files + 1
    _flip(written)
    with pytest.raises(DataError, match=r"train-00001\.bin: its SHA-256"):
        TokenDataset(folder, seq_len=4, verify="cached")


def test_what_the_cache_cannot_see_is_found_by_a_full_reading(folder: Path, settled: None) -> None:
    TokenDataset(folder, seq_len=4, verify="cached")
    file, record = folder / "train-00001.bin", folder / ".verified.json"
    _flip(file)
    known = json.loads(record.read_text())  # as if the disk gave other bytes, of a file nobody wrote to
    known["files"][file.name]["stat"] = verified.stamp(file)
    record.write_text(json.dumps(known))
    TokenDataset(folder, seq_len=4, verify="cached")
    with pytest.raises(DataError, match=r"train-00001\.bin: its SHA-256"):
        TokenDataset(folder, seq_len=4, verify="full")


def test_the_cache_knows_ids_too_and_trusts_no_file_written_just_now(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TokenDataset(folder, seq_len=4, verify="cached")
    assert not (folder / ".verified.json").exists(), "a write within the same tick could not be told"
    monkeypatch.setattr(verified, "_SETTLED_NS", -1)
    TokenDataset(folder, seq_len=4, verify="cached")
    with pytest.raises(DataError, match=r"token 0 is 9, not below the vocabulary size 9"):
        TokenDataset(folder, seq_len=4, vocab_size=9, verify="cached")
    (folder / ".verified.json").write_text("{")  # half a file only costs time
    assert TokenDataset(folder, seq_len=4, verify="cached").notes == []


@pytest.mark.parametrize("offsets", [[8, 5, 0], [0, 9, 8], [0, 5, 7], [1, 5, 8]])
def test_offsets_that_do_not_rise_are_refused(folder: Path, offsets: list[int]) -> None:
    path = folder / "train-00000.idx"
    assert np.fromfile(path, "<u8").tolist() == [0, 5, 8]
    path.write_bytes(np.asarray(offsets, "<u8").tobytes())
    with pytest.raises(DataError, match=r"train-00000\.idx: offsets do not rise from 0 to 8"):
        TokenDataset(folder, seq_len=4, verify="never")


@pytest.mark.parametrize("verify", ["full", "never"])
def test_an_id_outside_the_vocabulary_names_file_and_offset(tmp_path: Path, verify: Verify) -> None:
    folder = write(tmp_path / "data", [[9, 1, 8], [9, 2, 8], [9, 1, 10, 8]], vocab=10, shard_tokens=6)
    with pytest.raises(DataError, match=r"train-00001\.bin: token 2 is 10, not below the vocabulary size 10"):
        for batch in TokenDataset(folder, seq_len=4, verify=verify).in_order(1):
            assert batch["tokens_BT"].max() < 10
    with pytest.raises(
        DataError, match=r"train-0000[01]\.bin: token 0 is 9, not below the vocabulary size 9"
    ):
        TokenDataset(folder, seq_len=4, vocab_size=9, verify=verify).rows(np.asarray([0, 1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "dsv3_jax/tokens/2"}, r"format is 'dsv3_jax/tokens/2', expected 'dsv3_jax/tokens/1'"),
        ({"dtype": "int8"}, r"dtype is 'int8'"),
        ({"vocab_size": "10"}, r"vocab_size must be an integer"),
        ({"shards": [{"split": "train"}]}, r"shards\[0\]\.file is missing"),
    ],
)
def test_a_wrong_index_is_named(folder: Path, change: dict[str, object], message: str) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | change))
    with pytest.raises(DataError, match=message):
        TokenDataset(folder, seq_len=4)


def test_a_shard_outside_the_folder_is_refused(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["file"] = "../train-00000.bin"
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="is not a plain file name"):
        TokenDataset(folder, seq_len=4)


def test_a_folder_that_is_none_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no token shards here .* dsv3_jax\.training\.prepare"):
        TokenDataset(tmp_path, seq_len=4)
