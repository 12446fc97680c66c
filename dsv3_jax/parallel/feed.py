"""Which rows of a batch each process feeds, read off the mesh, and global batches made from them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding

from dsv3_jax.errors import ConfigError


def share_of(slices: Iterable[tuple[slice, ...]], rows: int) -> tuple[int, int]:
    """The part of a batch that some devices hold, as (part, parts): rows [part * rows / parts, ...).

    Args:
      slices: what each of the devices holds of [rows, ...], as `addressable_devices_indices_map` gives it. Devices
        that differ only along a tensor axis hold the same rows.
    Raises:
      ConfigError: the rows are no contiguous part that a number of equal parts consists of.
    """
    spans = sorted({index[0].indices(rows)[:2] for index in slices})
    start, end = spans[0][0], spans[-1][1]
    gaps = any(a[1] != b[0] for a, b in itertools.pairwise(spans))
    size = end - start
    if gaps or rows % size or start % size:
        raise ConfigError(
            f"mesh: this process's devices hold the rows {spans} of a batch of {rows}; expected one part of equal "
            "parts. Order the mesh's devices by process."
        )
    return start // size, rows // size


class Feed:
    """Global batches from the rows of this process.

    part, parts: which part of every batch this process feeds; processes that share rows have the same part.
    """

    def __init__(self, sharding: NamedSharding, rows: int) -> None:
        """`sharding`: of a batch [B, T]; `rows`: its B. Raises ConfigError as `share_of` does."""
        self.sharding = sharding
        self.part, self.parts = share_of(sharding.addressable_devices_indices_map((rows, 1)).values(), rows)

    def own_rows(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """This process's part of a whole batch."""
        sizes = {name: len(array) // self.parts for name, array in batch.items()}
        return {name: array[self.part * sizes[name] :][: sizes[name]] for name, array in batch.items()}

    def place(self, own: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The global batch whose part in this process is `own`."""
        if self.parts == 1 and jax.process_count() == 1:
            return jax.device_put(dict(own), self.sharding)
        with jax.transfer_guard_host_to_device("allow"):  # asked for by name, though JAX counts it as hidden
            return {
                name: jax.make_array_from_process_local_data(
                    self.sharding, array, (len(array) * self.parts, *array.shape[1:])
                )
                for name, array in own.items()
            }
