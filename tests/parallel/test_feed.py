"""Which rows each process feeds: all of its devices' rows and no others, for any mesh and number of processes."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from dsv3_jax.config import MeshConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.parallel import MESH_AXES, Feed, make_mesh, share_of
from dsv3_jax.training.step import batch_sharding

ROWS = 16


def rows_of(mesh: Mesh, devices: list[jax.Device]) -> tuple[list[tuple[slice, ...]], set[int]]:
    """The slices and the rows that some devices hold."""
    indices = batch_sharding(mesh).devices_indices_map((ROWS, 1))
    slices = [indices[device] for device in devices]
    return slices, {row for index in slices for row in range(ROWS)[index[0]]}


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "axes", [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 4, 1), (2, 1, 2, 2), (1, 2, 1, 4), (1, 1, 1, 8)]
)
def test_every_process_feeds_exactly_the_rows_of_its_devices(axes: tuple[int, ...], processes: int) -> None:
    mesh = make_mesh(MeshConfig(*axes))
    each = 8 // processes
    fed: list[set[int]] = []
    for process in range(processes):
        slices, rows = rows_of(mesh, jax.devices()[process * each : (process + 1) * each])
        part, parts = share_of(slices, ROWS)
        size = ROWS // parts
        fed.append(set(range(part * size, (part + 1) * size)))
        assert fed[-1] == rows
    assert set().union(*fed) == set(range(ROWS))  # no gap
    # A row is fed once, or by every process that holds a part of its tensor axis.
    copies = max(1, axes[3] // each)
    assert sorted(row for rows in fed for row in rows) == sorted(list(range(ROWS)) * copies)


def test_devices_that_are_not_ordered_by_process_are_refused() -> None:
    devices = np.array(jax.devices()).reshape(2, 4).T.reshape(1, 8, 1, 1)  # 0 4 1 5 ...
    mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    slices, _ = rows_of(mesh, jax.devices()[:4])
    with pytest.raises(
        ConfigError, match=r"devices hold the rows \[\(0, 2\), \(4, 6\), .* of a batch of 16; expected"
    ):
        share_of(slices, ROWS)
    # The first and the last rows span the whole batch, but are not all of it.
    with pytest.raises(ConfigError, match="devices hold the rows"):
        share_of([(slice(0, 2),), (slice(14, 16),)], ROWS)


def test_one_process_feeds_whole_batches_where_they_belong() -> None:
    mesh = make_mesh(MeshConfig(data=2, expert=2))
    feed = Feed(batch_sharding(mesh), ROWS)
    assert (feed.part, feed.parts) == (0, 1)
    batch = {"tokens_BT": np.arange(ROWS * 3, dtype=np.int32).reshape(ROWS, 3)}
    placed = feed.place(feed.own_rows(batch))
    assert placed["tokens_BT"].sharding == batch_sharding(mesh)
    np.testing.assert_array_equal(placed["tokens_BT"], batch["tokens_BT"])
    with jax.transfer_guard("disallow"):  # as in the loop
        parts = feed.from_own_rows(batch["tokens_BT"])
    assert parts.sharding == batch_sharding(mesh)
    np.testing.assert_array_equal(parts, batch["tokens_BT"])


def test_own_rows_are_the_part_of_any_batch() -> None:
    feed = Feed(batch_sharding(make_mesh(MeshConfig())), ROWS)
    feed.part, feed.parts = 1, 4
    np.testing.assert_array_equal(feed.own_rows({"x": np.arange(8)})["x"], [2, 3])
