"""Attention of other libraries, for comparison: cuDNN through JAX, and tokamax where it is installed.

Neither gives the log-sum-exp, and both are asked only for what they do without a mask of T x S values.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import jax


def _masks(segments_BT: Any, mask_BTS: Any) -> str | None:
    if segments_BT is not None or mask_BTS is not None:
        return "segments and masks would need a mask of B T S values, and rows that see nothing are not zero"
    return None


def cudnn_refuses(
    q_BTHQ, k_BSGQ, v_BSGU, segments_BT, segments_BS, mask_BTS, *, scale: float, causal: bool
) -> str | None:
    """Why cuDNN does not take these arguments, or None."""
    Q, U = q_BTHQ.shape[3], v_BSGU.shape[3]
    if Q != U:
        return f"cuDNN as JAX calls it takes equal head sizes, not {Q} and {U}"
    if Q % 8 or Q > 128:
        return f"it takes head sizes to 128 in multiples of 8, not {Q}"
    if q_BTHQ.dtype.name not in ("bfloat16", "float16"):
        return f"it takes bfloat16 or float16, not {q_BTHQ.dtype.name}"
    return _masks(segments_BT, mask_BTS)


def cudnn(q_BTHQ, k_BSGQ, v_BSGU, segments_BT, segments_BS, mask_BTS, *, scale: float, causal: bool):
    """(out_BTHU, None), see `api.attention`."""
    out_BTHU = jax.nn.dot_product_attention(
        q_BTHQ, k_BSGQ, v_BSGU, scale=scale, is_causal=causal, implementation="cudnn"
    )
    return out_BTHU, None


def tokamax_missing() -> str | None:
    """Why tokamax cannot be used here, or None."""
    return None if importlib.util.find_spec("tokamax") else "tokamax is not installed"


def tokamax_refuses(
    q_BTHQ, k_BSGQ, v_BSGU, segments_BT, segments_BS, mask_BTS, *, scale: float, causal: bool
) -> str | None:
    """Why tokamax's Mosaic kernel is not asked for these arguments, or None."""
    if q_BTHQ.dtype.name not in ("bfloat16", "float16"):
        return f"it takes bfloat16 or float16, not {q_BTHQ.dtype.name}"
    return _masks(segments_BT, mask_BTS)


def tokamax(q_BTHQ, k_BSGQ, v_BSGU, segments_BT, segments_BS, mask_BTS, *, scale: float, causal: bool):
    """(out_BTHU, None), see `api.attention`."""
    library: Any = importlib.import_module("tokamax")
    out_BTHU = library.dot_product_attention(
        q_BTHQ, k_BSGQ, v_BSGU, scale=scale, is_causal=causal, implementation="mosaic"
    )
    return out_BTHU, None
