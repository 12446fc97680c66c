"""Rounding a stored tensor to nearest without holding it: some whole rows of blocks at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dsv3_jax.errors import DataError
from dsv3_jax.hf.safetensors import PIECE_BYTES
from dsv3_jax.hf.tensors import StoredTensor
from dsv3_jax.quantization.formats import Format, quantize


def quantized_pieces(tensor: StoredTensor, fmt: Format, part: str) -> Iterator[np.ndarray]:
    """The flat pieces of "codes", "scales" or "zeros" of a tensor [rows, columns] in a format.

    Each part reads the tensor once: reading twice is cheaper than keeping.

    Raises DataError, naming the tensor, for a weight that is not finite.
    """
    for slab in _slabs(tensor, fmt.coding(tensor.shape[1]).block_rows):
        try:
            parts = quantize(slab, fmt)
        except DataError as error:
            raise DataError(f"{tensor.name}: {error}") from None
        piece = getattr(parts, part)
        assert piece is not None, (tensor.name, str(fmt), part)
        yield np.ascontiguousarray(piece).reshape(-1)


def _slabs(tensor: StoredTensor, height: int) -> Iterator[np.ndarray]:
    """float32 [some rows, columns], whole multiples of `height` rows but for the last."""
    rows, columns = tensor.shape
    step = max(1, 4 * PIECE_BYTES // 4 // max(columns, 1) // height) * height
    buffer, filled, done = np.empty(step * columns, np.float32), 0, 0
    for piece in tensor.pieces("F32"):
        while piece.size:
            count = min(piece.size, min(step, rows - done) * columns - filled)
            buffer[filled : filled + count] = piece[:count]
            filled, piece = filled + count, piece[count:]
            if filled == min(step, rows - done) * columns:
                yield buffer[:filled].reshape(-1, columns)
                done, filled = done + filled // columns, 0
