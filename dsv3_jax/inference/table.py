"""What the device must know about every row: one array an option, changed row by row, sent when it has changed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from dsv3_jax.inference.adjustments import make_adjustments, needs_adjusting
from dsv3_jax.inference.options import Sampling, row_key
from dsv3_jax.inference.pages import NULL_PAGE
from dsv3_jax.inference.placement import Placement
from dsv3_jax.inference.sampling import Choosing, row_options

_UNUSED = Sampling()


class RowTable:
    """Sampling options and block tables of the rows of a decode step."""

    def __init__(
        self, rows: int, pages_of_a_row: int, vocab_size: int, placement: Placement | None = None
    ) -> None:
        self._place = placement or Placement()
        nobody = np.zeros(2, np.uint32)
        self._options = row_options([_UNUSED] * rows, [nobody] * rows)
        self._changes = make_adjustments([None] * rows, vocab_size)
        self._adjusted = [False] * rows
        self._vocab_size = vocab_size
        self.tables_BM = np.full((rows, pages_of_a_row), NULL_PAGE, np.int32)
        self._lengths = [0] * rows
        self._owners: list[Any] = [None] * rows
        self._on_device: dict[str, Any] = {}

    def enter(self, row: int, owner: Any, sampling: Sampling, prompt: np.ndarray) -> bool:
        """A request is on a row; False and nothing done if it was before. `owner` changes whenever its pages may."""
        if self._owners[row] == owner:
            return False
        self._owners[row] = owner
        self._lengths[row] = 0
        self._set(row, sampling, prompt, row_key(sampling.seed, prompt))
        return True

    def allow(self, row: int, mask_W: np.ndarray) -> None:
        """The ids that the row may choose next (`Adjustments.mask_BW`)."""
        self._changes.mask_BW[row] = mask_W
        self._adjusted[row] = True
        self._on_device.pop("masks", None)

    def leave(self, used: set[int]) -> None:
        """Rows but `used` are nobody's: their options no longer make the device do anything."""
        for row, owner in enumerate(self._owners):
            if owner is not None and row not in used:
                self._owners[row] = None
                self._set(row, _UNUSED, np.zeros(0, np.int32), np.zeros(2, np.uint32))

    def list_pages(self, row: int, pages: list[int]) -> None:
        """The row's pages; a request only ever gets further ones while it stays on the row."""
        known = self._lengths[row]
        if known != len(pages):
            self.tables_BM[row, known : len(pages)] = pages[known:]
            self._lengths[row] = len(pages)
            self._on_device.pop("tables", None)

    def choosing(self) -> Choosing:
        """On the device."""
        sent, masks = self._on_device, self._changes.mask_BW
        if "options" not in sent:
            sent["options"] = jax.tree.map(self._send, self._options)
            # The masks change with every token of a guided row, the rest with a row.
            rest = dataclasses.replace(self._changes, mask_BW=masks[:, :0])
            sent["changes"] = jax.tree.map(self._send, rest)
        if "masks" not in sent:
            sent["masks"] = self._send(masks)
        changes = dataclasses.replace(sent["changes"], mask_BW=sent["masks"])
        return Choosing(sent["options"], changes, np.bool_(any(self._adjusted)))

    def tables(self) -> jax.Array:
        """On the device: int32 [rows, pages of a row]."""
        if "tables" not in self._on_device:
            self._on_device["tables"] = self._send(self.tables_BM)
        return self._on_device["tables"]

    def _set(self, row: int, sampling: Sampling, prompt: np.ndarray, key: np.ndarray) -> None:
        for name in ("options", "masks"):
            self._on_device.pop(name, None)
        self._adjusted[row] = needs_adjusting(sampling)
        new = (row_options([sampling], [key]), make_adjustments([(sampling, prompt)], self._vocab_size))
        for all_, one in zip(*map(jax.tree.leaves, ((self._options, self._changes), new)), strict=True):
            all_[row] = one[0]

    def _send(self, array: np.ndarray) -> jax.Array:
        # A copy: on the CPU the device may use the host's memory itself, and this table changes.
        return self._place.send(array.copy(), self._place.cut)
