"""The grouped product and its fused SwiGLU by the Mosaic GPU kernels: gradients, tiles, and what is refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.kernels import shim
from dsv3_jax.kernels.grouped_matmul.mosaic_dw import GradientTile, weight_gradient
from dsv3_jax.kernels.grouped_matmul.mosaic_product import Tile, product
from dsv3_jax.kernels.grouped_matmul.pipeline import LINE
from dsv3_jax.kernels.tables import tuned

# Widths are cut in whole tiles, of 128 at the least.
WIDTH = 128
# Average rows per expert up to which a tile is one WGMMA high. There the weights' bytes decide.
FEW_ROWS = LINE


def refuses(x_ND: jax.Array, w: jax.Array, group_sizes_E: jax.Array) -> str | None:
    """Why these arguments are not taken, or None."""
    if x_ND.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x_ND.dtype}; the tensor cores' operands are bfloat16 or float16"
    if x_ND.shape[0] == 0:
        return "there are no rows"
    for name, width in (("input", x_ND.shape[1]), ("output", w.shape[-2])):
        if width % WIDTH:
            return f"the {name} width {width} is not a multiple of {WIDTH}"
    return None


def _few(N: int, E: int) -> bool:
    return N <= FEW_ROWS * E


def shape_class(x_ND: jax.Array, w: jax.Array, group_sizes_E: jax.Array) -> str:
    """Widths, type, and whether tiles are low (few rows per expert)."""
    rows = "few" if _few(x_ND.shape[0], w.shape[0]) else "many"
    return f"d{w.shape[-1]}-f{w.shape[-2]}-{rows}-{x_ND.dtype.name}"


def default_tile(kind: str, N: int, E: int, width: int) -> Tile:
    """The tile of `mosaic_product.product` where the table has none."""
    columns = 128 if kind.startswith("swiglu") or width % 256 else 256
    if _few(N, E):
        # At most min(N, E) experts have rows: narrow tiles where wide ones would leave multiprocessors idle.
        if kind != "dx" and min(N, E) * (width // 128) <= shim.sm_count():
            return Tile(LINE, LINE, 6, 2, "columns")
        return Tile(LINE, columns, 4, 2, "columns")
    deep = columns == 128 and not kind.startswith("swiglu")
    return Tile(2 * LINE, columns, 6 if deep else 4, 2, "rows")


def default_gradient_tile(D: int) -> GradientTile:
    """The tile of `mosaic_dw.weight_gradient` where the table has none."""
    return GradientTile() if D % 256 == 0 else GradientTile(columns=128, stages=6)


def _product(x: jax.Array, w: jax.Array, group_sizes_E: jax.Array, kind: str) -> Any:
    width = w.shape[-1] if kind == "dx" else w.shape[-2]
    default = default_tile(kind, x.shape[0], w.shape[0], width)
    program = {"forward": "grouped_matmul", "dx": "grouped_matmul_dx"}.get(kind, "grouped_swiglu")
    tile = tuned(program, shape_class(x, w, group_sizes_E), default)
    return product(x, w, group_sizes_E, tile, kind)


def _weight_gradient(
    x_ND: jax.Array, dy_NF: jax.Array, w_EFD: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
    default = default_gradient_tile(x_ND.shape[1])
    tile = tuned("grouped_matmul_dw", shape_class(x_ND, w_EFD, group_sizes_E), default)
    return weight_gradient(x_ND, dy_NF, group_sizes_E, tile)


def _no_gradient(group_sizes_E: jax.Array) -> np.ndarray:
    return np.zeros(group_sizes_E.shape, jax.dtypes.float0)


@jax.custom_vjp
def grouped_matmul(x_ND: jax.Array, w_EFD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`. A row's result is bitwise independent of the other rows and of its place."""
    return _product(x_ND, w_EFD, group_sizes_E, "forward")[0]


def _forward(x_ND, w_EFD, group_sizes_E):
    return grouped_matmul(x_ND, w_EFD, group_sizes_E), (x_ND, w_EFD, group_sizes_E)


def _backward(saved, dy_NF):
    x_ND, w_EFD, group_sizes_E = saved
    (dx_ND,) = _product(dy_NF, w_EFD, group_sizes_E, "dx")
    dw_EFD = _weight_gradient(x_ND, dy_NF, w_EFD, group_sizes_E)
    return dx_ND, dw_EFD, _no_gradient(group_sizes_E)


grouped_matmul.defvjp(_forward, _backward)


@jax.custom_vjp
def grouped_swiglu(x_ND: jax.Array, w_EPFD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """See `api.grouped_swiglu`.

    Where it is differentiated the kernel also writes gate and up, rounded, for backward: 2 F numbers a row
    more, against computing a third of this layer's products once more (a policy that keeps nothing still
    recomputes them, by this kernel).
    """
    return _product(x_ND, w_EPFD, group_sizes_E, "swiglu")[0]


def _swiglu_forward(x_ND, w_EPFD, group_sizes_E):
    h_NF, gate_up_NX = _product(x_ND, w_EPFD, group_sizes_E, "swiglu+")
    return h_NF, (x_ND, w_EPFD, group_sizes_E, checkpoint_name(gate_up_NX, "experts_gate_up"))


def _swiglu_backward(saved, dh_NF):
    x_ND, w_EPFD, group_sizes_E, gate_up_NX = saved
    E, P, F, D = w_EPFD.shape
    gate, up = jnp.split(gate_up_NX.astype(jnp.float32), 2, axis=1)
    dh, gated = dh_NF.astype(jnp.float32), jax.nn.sigmoid(gate)
    d_gate = dh * up * gated * (1 + gate * (1 - gated))
    dy_NX = jnp.concatenate([d_gate, dh * gate * gated], axis=1).astype(x_ND.dtype)
    dx_ND, dw_EXD, none = _backward((x_ND, w_EPFD.reshape(E, P * F, D), group_sizes_E), dy_NX)
    return dx_ND, dw_EXD.reshape(w_EPFD.shape), none


grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)
