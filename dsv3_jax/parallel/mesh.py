"""The device mesh: axes data, fsdp, expert, tensor, from the outermost (slowest links) to the innermost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from dsv3_jax.config import MESH_PRESETS, MeshConfig
from dsv3_jax.errors import ConfigError

MESH_AXES = (
    "data",
    "fsdp",
    "expert",
    "tensor",
)  # "context" and "pipeline" have rows in the tables, but no mesh yet
# Tokens are split over these. Attention is data-parallel over the expert axis (V3 report, section 3.2).
BATCH_AXES = ("data", "fsdp", "expert")
DECODE_AXES = ("data", "expert")
"""What decoding can be told: it cuts no dense weight, so that `fsdp` would be another name for `data`."""


def mesh_shape(cfg: MeshConfig, devices: int) -> dict[str, int]:
    """Devices along every axis. Raises ConfigError if the product is not `devices`."""
    if cfg.preset != "none":
        axes = MESH_PRESETS[cfg.preset]
    else:
        rest = max(devices // (cfg.data * cfg.expert * cfg.tensor), 1)
        axes = {"data": cfg.data, "fsdp": cfg.fsdp or rest, "expert": cfg.expert, "tensor": cfg.tensor}
    total = math.prod(axes.values())
    if total != devices:
        told = " x ".join(f"{axis} {axes[axis]}" for axis in MESH_AXES)
        raise ConfigError(f"mesh: {told} = {total} devices; expected {devices}, as there are")
    return {axis: axes[axis] for axis in MESH_AXES}


def parse_mesh(text: str) -> MeshConfig:
    """`expert=8`, or `data=2,expert=4`: devices along axes as in the section `mesh` of a config, for decoding.

    Raises ConfigError naming the part.
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, number = part.partition("=")
        if (
            axis not in DECODE_AXES
            or not equals
            or not (number.isascii() and number.isdecimal())
            or number == "0"
        ):
            raise ConfigError(
                f"mesh: {part!r} in {text!r}; expected AXIS=DEVICES, AXIS one of {', '.join(DECODE_AXES)}, "
                "such as expert=8 or data=2,expert=4"
            )
        if axis in axes:
            raise ConfigError(f"mesh: {axis} is given twice in {text!r}")
        axes[axis] = int(number)
    return MeshConfig(**{"fsdp": 1, **axes})


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all of them), with axes for the partitioner (Auto).

    Raises:
      ConfigError: the product of the axes differs from the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(cfg, len(devices))
    return jax.make_mesh(
        tuple(shape.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )
