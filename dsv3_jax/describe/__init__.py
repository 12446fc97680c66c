"""What a config means: parameters, sharding, arithmetic and memory, without allocating a weight."""

from dsv3_jax.model.counts import (
    Leaf,
    active_parameters,
    cache_bytes_per_token,
    flops_per_token,
    leaves,
    total,
    train_flops_per_token,
)

__all__ = [
    "Leaf",
    "active_parameters",
    "cache_bytes_per_token",
    "flops_per_token",
    "leaves",
    "total",
    "train_flops_per_token",
]
