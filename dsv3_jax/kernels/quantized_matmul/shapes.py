"""Named shapes of products with quantised weights, for tests, benchmarks and tuning."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """N R K; experts 0 for a dense product."""

    rows: int
    outputs: int
    inputs: int
    experts: int = 0


SHAPES = {
    "one_token": Shape(1, 12, 64),
    "odd": Shape(3, 37, 96),
    "kv_a": Shape(2, 576, 256),
    "experts_decode": Shape(6, 24, 64, 4),
    "experts_prefill": Shape(70, 24, 64, 4),
    "cpu_100m": Shape(16, 1024, 512),
    "v3_q_b_decode": Shape(64, 24576, 1536),
    "v3_o_decode": Shape(64, 7168, 16384),
    "v3_experts_decode": Shape(512, 4096, 7168, 256),
    "v3_experts_prefill": Shape(65536, 4096, 7168, 256),
}
