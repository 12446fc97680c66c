"""A mixture: exact shares over any window, a pure function of the position, each source's own rows in its own order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from dsv3_jax.cli import parse_mixture, parse_run_config
from dsv3_jax.config import DataConfig, MixtureSource, from_mapping, to_mapping
from dsv3_jax.errors import ConfigError
from dsv3_jax.training.data import Batches, TokenDataset
from dsv3_jax.training.mixture import MixedEvaluation, Mixture, Schedule, source_seed
from dsv3_jax.training.rows import Batch
from tests.training.test_data import write

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9)
REPO = Path(__file__).resolve().parents[2]


@given(WEIGHTS, st.integers(0, 2**31 - 1), st.integers(0, 10**15), st.integers(1, 10**6))
def test_any_window_holds_each_source_by_its_weight(
    weights: list[float], seed: int, start: int, size: int
) -> None:
    schedule = Schedule(weights, seed)
    before, after = schedule.counts(start), schedule.counts(start + size)
    assert sum(before) == start and sum(after) == start + size
    spread = 2 * math.ceil(math.log2(len(weights))) if len(weights) > 1 else 0
    for share, a, b in zip(schedule.shares, before, after, strict=True):
        assert abs((b - a) - size * share) <= spread + 1e-6 * size * share


@given(WEIGHTS, st.integers(0, 100), st.integers(0, 10**12))
def test_a_position_is_the_next_row_of_its_source(weights: list[float], seed: int, start: int) -> None:
    schedule = Schedule(weights, seed)
    counts = schedule.counts(start)
    for position in range(start, start + 20):
        source, place = schedule.at(position)
        assert place == counts[source]
        counts[source] += 1
        assert counts == schedule.counts(position + 1)


def test_shares_are_exact_where_the_weights_are_decimal_fractions() -> None:
    assert Schedule([0.7, 0.2, 0.1], seed=5).counts(1000) == [700, 200, 100]
    first = [Schedule([1.0, 1.0, 1.0], seed).at(0)[0] for seed in range(20)]
    assert set(first) == {0, 1, 2}, "the seed shifts the sequence"


@pytest.fixture
def parts(tmp_path: Path) -> list[TokenDataset]:
    """Three sources told apart by their ids, of 8, 3 and 5 rows."""
    sizes = {1: 8, 2: 3, 3: 5}
    return [
        TokenDataset(write(tmp_path / str(i), [[9, i, k, 8] for k in range(n)], vocab=10), seq_len=3)
        for i, n in sizes.items()
    ]


def test_rows_are_those_of_the_source_in_its_own_order(parts: list[TokenDataset]) -> None:
    mixture = Mixture(["a", "b", "c"], parts, [5, 2, 1])
    batch = mixture.sample(0, 64, seed=7)
    ids = batch["tokens_BT"][:, 1]
    assert [int((ids == source).sum()) for source in (1, 2, 3)] == mixture.schedule(7).counts(64)
    for source, part in enumerate(parts):
        mine = batch["tokens_BT"][ids == source + 1]
        own = part.sample(0, len(mine), source_seed(7, source))["tokens_BT"]
        np.testing.assert_array_equal(mine, own)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_the_rows_and_a_resume_goes_on(parts: list[TokenDataset], hosts: int) -> None:
    mixture = Mixture(["a", "b", "c"], parts, [0.5, 0.3, 0.2])
    whole = mixture.sample(0, 32, seed=1)
    shares = [Batches(mixture, 8, seed=1, host=h, n_hosts=hosts, prefetch=0) for h in range(hosts)]
    joined = np.concatenate([next(share)["tokens_BT"] for _ in range(2) for share in shares])
    np.testing.assert_array_equal(joined, whole["tokens_BT"][:16])
    resumed = Batches(mixture, 8, seed=1)
    resumed.restore(shares[0].state())
    np.testing.assert_array_equal(next(resumed)["tokens_BT"], whole["tokens_BT"][16:24])
    assert resumed.progress()["shares"] == {"a": 0.5, "b": 7 / 24, "c": 5 / 24}
    resumed.close()
    other = Batches(Mixture(["a", "b", "c"], parts, [0.5, 0.2, 0.3]), 8, seed=1, prefetch=0)
    with pytest.raises(ConfigError, match="other data"):
        other.restore(shares[0].state())


def test_evaluation_takes_every_row_once_by_weight(parts: list[TokenDataset]) -> None:
    batches = list(MixedEvaluation(parts, [1, 1, 1], 3).in_order(4))
    ids = np.concatenate([batch["tokens_BT"][:, 1] for batch in batches])
    assert len(batches) == 4 and [int((ids == i).sum()) for i in (1, 2, 3)] == [8, 3, 5]
    assert set(ids[:3]) == {1, 2, 3}


def test_an_evaluation_asks_a_source_for_no_more_rows_than_it_can_use(
    parts: list[TokenDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(MixedEvaluation(parts, [1, 1, 1], 3).in_order(2))[:3]
    asked: list[tuple[int, int | None]] = []
    in_order = TokenDataset.in_order

    def limited(part: TokenDataset, size: int, limit: int | None = None) -> Iterator[Batch]:
        asked.append((size, limit))
        return in_order(part, size, limit)

    monkeypatch.setattr(TokenDataset, "in_order", limited)
    some = list(MixedEvaluation(parts, [1, 1, 1], 3).in_order(2, max_batches=3))
    assert asked == [(1, 6)] * 3
    for have, want in zip(some, whole, strict=True):
        np.testing.assert_array_equal(have["tokens_BT"], want["tokens_BT"])


def test_the_key_in_a_file_and_as_a_flag() -> None:
    want = (MixtureSource("python-docs", 0.7), MixtureSource("a=b/c", 0.3))
    assert parse_mixture("python-docs=0.7,a=b/c=0.3") == want
    flags = ["--config", str(REPO / "configs" / "tiny.yaml"), "--data.mixture", "python-docs=0.7,a=b/c=0.3"]
    assert parse_run_config(flags).data.mixture == want
    data = DataConfig(mixture=want)
    assert from_mapping(DataConfig, to_mapping(data)) == data
    assert to_mapping(data)["mixture"][0] == {"source": "python-docs", "weight": 0.7}
    with pytest.raises(
        ConfigError, match=r"unknown key 'data\.mixture\.sorce'; did you mean 'source'|did you mean 'source'"
    ):
        from_mapping(DataConfig, {"mixture": [{"sorce": "x", "weight": 1}]}, "data")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "expected NAME=WEIGHT"),
        ("x=y", "expected NAME=WEIGHT"),
        ("x=0", "weight of x is 0.0; expected a number above 0"),
        ("x=inf", "weight of x is inf"),
        ("=1", "source is ''"),
    ],
)
def test_a_wrong_part_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_mixture(f"ok=1,{text}")
    with pytest.raises(ConfigError, match="every source once"):
        DataConfig(mixture=(MixtureSource("a", 1), MixtureSource("a", 2)))
