"""The counts of `dsv3_jax.model.counts`, under the name they had before training needed them too."""

from dsv3_jax.model.counts import (
    GROUPS,
    Leaf,
    active_parameters,
    bytes_per_device,
    cache_bytes_per_token,
    flops_per_token,
    leaves,
    total,
    train_flops_per_token,
)

__all__ = [
    "GROUPS",
    "Leaf",
    "active_parameters",
    "bytes_per_device",
    "cache_bytes_per_token",
    "flops_per_token",
    "leaves",
    "total",
    "train_flops_per_token",
]
