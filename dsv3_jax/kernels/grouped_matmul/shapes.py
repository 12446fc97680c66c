"""Named shapes of the grouped products, for tests, benchmarks, compilation checks and tuning."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal["grouped_matmul", "grouped_swiglu"]
Load = Literal["even", "hot", "one"]


class Shape(NamedTuple):
    """N E D F: rows, experts, width in, width out (of each of gate and up, for the fused product)."""

    rows: int
    experts: int
    inputs: int
    outputs: int
    kind: Kind = "grouped_matmul"
    load: Load = "even"

    def arrays(self, dtype: jnp.dtype = jnp.float32) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Abstract x, w, group sizes."""
        parts = (2,) if self.kind == "grouped_swiglu" else ()
        return (
            jax.ShapeDtypeStruct((self.rows, self.inputs), dtype),
            jax.ShapeDtypeStruct((self.experts, *parts, self.outputs, self.inputs), dtype),
            jax.ShapeDtypeStruct((self.experts,), jnp.int32),
        )

    def sizes(self, seed: int = 0) -> np.ndarray:
        """Group sizes: "even" as a balanced router's draw, "hot" half of all rows on one expert, "one" all of them."""
        rng, E = np.random.default_rng(seed), self.experts
        hot = {"even": 0, "hot": self.rows // 2, "one": self.rows}[self.load]
        sizes_E = rng.multinomial(self.rows - hot, np.full(E, 1 / E))
        sizes_E[E // 2] += hot
        return sizes_E.astype(np.int32)

    def products(self) -> int:
        """FLOPs of forward; dX and dW take as many each."""
        return 2 * self.rows * self.inputs * self.outputs * (2 if self.kind == "grouped_swiglu" else 1)

    def weight_bytes(self, itemsize: int = 2) -> int:
        """Bytes of the weights, read once (and of dW, written once)."""
        return (
            itemsize * self.experts * self.inputs * self.outputs * (2 if self.kind == "grouped_swiglu" else 1)
        )


SHAPES = {
    "one_row": Shape(1, 4, 12, 10),
    "few_rows": Shape(17, 8, 12, 10),
    "many_experts": Shape(64, 256, 6, 5),
    "rows_below_tile": Shape(9, 1, 12, 10),
    "tiles": Shape(301, 3, 12, 10),
    "cpu_100m_decode": Shape(64, 32, 512, 512),
    "cpu_100m_train": Shape(32768, 32, 512, 512),
    # One device's share of DeepSeek-V3 (7168 wide, experts of 2048) at 8,192 tokens, and all experts on one.
    "v3_gate_up": Shape(65536, 256, 7168, 2048, "grouped_swiglu"),
    "v3_down": Shape(65536, 256, 2048, 7168),
    "v3_down_hot": Shape(65536, 256, 2048, 7168, load="hot"),
    "v3_down_one": Shape(65536, 256, 2048, 7168, load="one"),
    # The 1.73B model: 32 experts of 1024, four a token, 8 x 4096 tokens; then decoding 64 rows.
    "b1_gate_up": Shape(131072, 32, 2048, 1024, "grouped_swiglu"),
    "b1_down": Shape(131072, 32, 1024, 2048),
    "b1_gate_up_decode": Shape(256, 32, 2048, 1024, "grouped_swiglu"),
    "b1_down_decode": Shape(256, 32, 1024, 2048),
    # 16B-A3B: 64 experts of 1408 (no multiple of 256), six a token.
    "a3b_gate_up": Shape(49152, 64, 2048, 1408, "grouped_swiglu"),
    "a3b_down": Shape(49152, 64, 1408, 2048),
    "a3b_gate_up_decode": Shape(384, 64, 2048, 1408, "grouped_swiglu"),
    "a3b_down_decode": Shape(384, 64, 1408, 2048),
    # Small enough for the interpreter.
    "interpret": Shape(300, 5, 128, 256),
    "interpret_few": Shape(40, 5, 128, 128),
    "interpret_gate_up": Shape(300, 5, 128, 128, "grouped_swiglu"),
    "interpret_gate_up_few": Shape(40, 5, 128, 128, "grouped_swiglu"),
}

# What a GPU is for: compiled for one in the checks, timed on one by the benchmark.
DEVICE_SHAPES = {name: s for name, s in SHAPES.items() if name.startswith(("v3_", "b1_", "a3b_"))}
INTERPRETED = {name: s for name, s in SHAPES.items() if name.startswith("interpret")}
