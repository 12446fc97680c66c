"""What the device must know about every row: one array an option, changed row by row, sent when it has changed."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from dsv3_jax.inference.options import Sampling, row_key
from dsv3_jax.inference.pages import NULL_PAGE
from dsv3_jax.inference.sampling import RowOptions, row_options

_UNUSED = Sampling()


class RowTable:
    """Sampling options and block tables of the rows of a decode step."""

    def __init__(self, rows: int, pages_of_a_row: int) -> None:
        nobody = np.zeros(2, np.uint32)
        self._options = row_options([_UNUSED] * rows, [nobody] * rows)
        self.tables_BM = np.full((rows, pages_of_a_row), NULL_PAGE, np.int32)
        self._lengths = [0] * rows
        self._owners: list[Any] = [None] * rows
        self._on_device: dict[str, Any] = {}

    def enter(self, row: int, owner: Any, sampling: Sampling, prompt: np.ndarray) -> None:
        """A request is on a row; nothing is done if it was before. `owner` changes whenever its pages may all have."""
        if self._owners[row] != owner:
            self._owners[row] = owner
            self._lengths[row] = 0
            self._set(row, sampling, row_key(sampling.seed, prompt))

    def leave(self, used: set[int]) -> None:
        """Rows but `used` are nobody's: their options no longer make the device do anything."""
        for row, owner in enumerate(self._owners):
            if owner is not None and row not in used:
                self._owners[row] = None
                self._set(row, _UNUSED, np.zeros(2, np.uint32))

    def list_pages(self, row: int, pages: list[int]) -> None:
        """The row's pages; a request only ever gets further ones while it stays on the row."""
        known = self._lengths[row]
        if known != len(pages):
            self.tables_BM[row, known : len(pages)] = pages[known:]
            self._lengths[row] = len(pages)
            self._on_device.pop("tables", None)

    def options(self) -> RowOptions:
        """On the device."""
        if "options" not in self._on_device:
            self._on_device["options"] = jax.tree.map(_send, self._options)
        return self._on_device["options"]

    def tables(self) -> jax.Array:
        """On the device: int32 [rows, pages of a row]."""
        if "tables" not in self._on_device:
            self._on_device["tables"] = _send(self.tables_BM)
        return self._on_device["tables"]

    def _set(self, row: int, sampling: Sampling, key: np.ndarray) -> None:
        self._on_device.pop("options", None)
        for all_, one in zip(
            *map(jax.tree.leaves, (self._options, row_options([sampling], [key]))), strict=True
        ):
            all_[row] = one[0]


def _send(array: np.ndarray) -> jax.Array:
    # A copy: on the CPU the device may use the host's memory itself, and this table changes.
    return jax.device_put(array.copy())
