"""A quantised leaf of the parameter tree: same place, same name, same letters as the array it stands for."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.kernels.quantized_matmul import (
    Coding,
    dequantize,
    grouped_quantized_matmul,
    quantized_matmul,
)

Array = jax.Array


class Multiplying:
    """A leaf that is no array and does its products itself; `dsv3_jax.model.module` asks it to."""

    shape: tuple[int, ...]
    columns: int

    def astype(self, dtype: Any) -> Array:
        """The array that it stands for."""
        raise NotImplementedError

    def product(self, x_NK: Array) -> Array:
        """[N, columns] times the transpose of its matrices laid on top of each other: [N, rows]."""
        raise NotImplementedError

    def grouped(self, x_ND: Array, group_sizes_E: Array) -> Array:
        """Rows sorted by expert times their expert's matrices: [N, rows]."""
        raise NotImplementedError


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "zeros"],
    meta_fields=["coding", "block_shape", "implementation"],
)
@dataclasses.dataclass(frozen=True)
class Quantized(Multiplying):
    """A stack of quantised matrices.

    Leading axes (layers, experts, gate and up) are those of the leaf; what follows is one matrix, in codes
    [rows, columns]. A scan over layers slices all three parts; `block_shape` is what one matrix looks like in the
    leaf's own letters, e.g. (H, Q, A), and how many of these are rows follows from the number of columns.

    Attributes:
      codes: [..., rows, columns]; int4 has columns / 2; fp8 as bytes, see `coding.e4m3_values`.
      scales: float32 [..., row blocks, column blocks].
      zeros: uint8 zero points like `scales`, or None.
      coding: how codes stand for values.
      block_shape: shape of one matrix in the leaf.
      implementation: of its products (`implemented`).
    """

    codes: Array
    scales: Array
    zeros: Array | None
    coding: Coding
    block_shape: tuple[int, ...]
    implementation: str = "auto"

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the leaf that it stands for."""
        return (*self.codes.shape[:-2], *self.block_shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def columns(self) -> int:  # type: ignore[override]
        """Columns of one matrix."""
        return math.prod(self.block_shape) // self.codes.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))

    def astype(self, dtype: Any) -> Array:
        """The whole leaf dequantised: where a product does not take it as stored."""
        parts = (self.codes, self.scales, self.zeros)
        return dequantize(parts, self.coding, self.columns, dtype).reshape(self.shape)

    def layer(self, at: int) -> Quantized:
        """One layer of a stack."""
        return jax.tree.map(lambda x: x[at], self)

    def product(self, x_NK: Array) -> Array:
        """[N, columns] times the transposes of the matrices, of which there may be several (gate and up): [N, rows]."""
        multiply = functools.partial(quantized_matmul, coding=self.coding, implementation=self.implementation)
        return jnp.concatenate([multiply(x_NK, *parts) for parts in self._matrices(0)], axis=-1)

    def grouped(self, x_ND: Array, group_sizes_E: Array) -> Array:
        """Rows sorted by expert times their expert's matrices: [N, rows]."""
        multiply = functools.partial(
            grouped_quantized_matmul, coding=self.coding, implementation=self.implementation
        )
        return jnp.concatenate(
            [multiply(x_ND, *parts, group_sizes_E) for parts in self._matrices(1)], axis=-1
        )

    def _matrices(self, kept: int) -> list[tuple[Array, Array, Array | None]]:
        """The parts with `kept` leading axes: matrices laid on top of each other, unless a block would straddle two."""
        parts = (self.codes, self.scales, self.zeros)
        head = self.codes.shape[:kept]
        if self.codes.shape[-2] % self.coding.block_rows == 0:
            return [jax.tree.map(lambda x: x.reshape(*head, -1, x.shape[-1]), parts)]
        flat = jax.tree.map(lambda x: x.reshape(*head, -1, *x.shape[-2:]), parts)
        count = math.prod(self.codes.shape[kept:-2])
        return [jax.tree.map(lambda x, i=i: x[(slice(None),) * kept + (i,)], flat) for i in range(count)]


def implemented(tree: Any, implementation: str) -> Any:
    """The same parameters, whose quantised leaves multiply by this implementation (`Kernels.quantized_matmul`)."""
    return jax.tree.map(
        lambda leaf: (
            dataclasses.replace(leaf, implementation=implementation) if isinstance(leaf, Quantized) else leaf
        ),
        tree,
        is_leaf=lambda leaf: isinstance(leaf, Quantized),
    )


def quantized_leaf(parts: Sequence[Any], coding: Coding, block_shape: tuple[int, ...]) -> Quantized:
    """A leaf of (codes, scales, zeros or None), numpy or jax arrays."""
    codes, scales, zeros = parts
    if coding.kind == "fp8" and codes.dtype != np.uint8:
        codes = np.asarray(codes).view(np.uint8)
    if str(scales.dtype) == "float8_e8m0fnu":  # which few operations take
        scales = np.asarray(scales).astype(np.float32)
    return Quantized(codes, scales, zeros, coding, tuple(block_shape))
