"""A leaf that multiplies like the array it holds, and tells the host what it was multiplied with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from dsv3_jax.kernels.grouped_matmul import grouped_matmul
from dsv3_jax.kernels.grouped_matmul.reference import _weight_gradient
from dsv3_jax.kernels.registry import full_precision
from dsv3_jax.quantization.leaf import Multiplying

Array = jax.Array


class Moments:
    """Sums of outer products of inputs, by name: [columns, columns], or one for each expert; and numbers of inputs."""

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}

    def add(self, name: str, moment: np.ndarray, count: np.ndarray) -> None:
        """Take one batch."""
        if name not in self.sums:
            self.sums[name] = np.zeros(moment.shape, np.float64)
            self.counts[name] = np.zeros(np.shape(count), np.int64)
        self.sums[name] += moment
        self.counts[name] += np.asarray(count)

    def clear(self) -> None:
        """Forget everything, for the next layer."""
        self.sums, self.counts = {}, {}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["name", "add", "columns", "apart"]
)
@dataclasses.dataclass(frozen=True)
class Recorded(Multiplying):
    """`array`, whose inputs go to `add(name, sum of x x^T, number of x)`; several matrices share their inputs.

    apart: whether experts tell their moments each, or all of them one.
    """

    array: Array
    name: str
    add: Callable[[str, np.ndarray, np.ndarray], None]
    columns: int
    apart: bool = True

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.array.shape

    def astype(self, dtype: Any) -> Array:
        """The array: a use that is no product with inputs is not recorded."""
        return self.array.astype(dtype)

    def product(self, x_NK: Array) -> Array:
        """See `Multiplying`."""
        x = x_NK.astype(jnp.float32)
        self._tell(_moment(x), jnp.int32(len(x)))
        weight = self.array.reshape(-1, self.columns).astype(x_NK.dtype)
        return jnp.einsum("NK,RK->NR", x_NK, weight, precision=full_precision(x_NK.dtype))

    def grouped(self, x_ND: Array, group_sizes_E: Array) -> Array:
        """See `Multiplying`."""
        x = x_ND.astype(jnp.float32)
        if self.apart:
            self._tell(_weight_gradient(x, x, group_sizes_E, jnp.float32), group_sizes_E)
        else:
            x = jnp.where((jnp.arange(len(x)) < group_sizes_E.sum())[:, None], x, 0)
            self._tell(_moment(x), group_sizes_E.sum())
        E = self.array.shape[0]
        return grouped_matmul(x_ND, self.array.reshape(E, -1, self.columns).astype(x_ND.dtype), group_sizes_E)

    def _tell(self, moment: Array, count: Array) -> None:
        io_callback(functools.partial(_add, self.add, self.name), None, moment, count)


def _moment(x: Array) -> Array:
    return jnp.einsum("NJ,NK->JK", x, x, precision=full_precision(jnp.float32))


def _add(add: Callable[..., None], name: str, moment: Any, count: Any) -> None:
    add(name, np.asarray(moment), np.asarray(count))
