"""Named shapes of the grouped products, for tests, benchmarks, compilation checks and tuning."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.kernels.cases import Case, normal
from dsv3_jax.kernels.grouped_matmul.api import grouped_matmul, grouped_swiglu
from dsv3_jax.kernels.grouped_matmul.mosaic_dw import GradientTile
from dsv3_jax.kernels.grouped_matmul.mosaic_product import Tile
from dsv3_jax.kernels.grouped_matmul.pipeline import LINE, SHARED_BYTES

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

    @property
    def parts(self) -> int:
        """Matrices of an expert: 2 for gate and up."""
        return 2 if self.kind == "grouped_swiglu" else 1

    def flops(self) -> int:
        """Of forward; dX and dW take as many each."""
        return 2 * self.rows * self.inputs * self.outputs * self.parts

    def weights_read(self) -> int:
        """Numbers in the weights of experts that have rows."""
        return int((self.sizes() > 0).sum()) * self.parts * self.outputs * self.inputs


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
    "b1_gate_up_decode_1": Shape(4, 32, 2048, 1024, "grouped_swiglu"),
    "b1_down_decode_1": Shape(4, 32, 1024, 2048),
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


# Errors relative to the largest value, against float32: one rounding to a 16-bit result; for the backward pass of the
# fused product also those of gate, up and their gradients.
BOUND, BACKWARD_BOUND = 0.01, 0.02

FUNCTIONS = {"grouped_matmul": grouped_matmul, "grouped_swiglu": grouped_swiglu}


def _forward(x_ND, w, sizes_E, *, kind, implementation):
    return FUNCTIONS[kind](x_ND, w, sizes_E, implementation=implementation)


def _dx(x_ND, w, sizes_E, ct_NF, *, kind, implementation):
    return jax.vjp(lambda x: _forward(x, w, sizes_E, kind=kind, implementation=implementation), x_ND)[1](
        ct_NF
    )


def _dw(x_ND, w, sizes_E, ct_NF, *, kind, implementation):
    return jax.vjp(lambda w: _forward(x_ND, w, sizes_E, kind=kind, implementation=implementation), w)[1](
        ct_NF
    )


def _backward(x_ND, w, sizes_E, ct_NF, *, kind, implementation):
    run = functools.partial(_forward, kind=kind, implementation=implementation)
    return jax.vjp(lambda x, w: run(x, w, sizes_E), x_ND, w)[1](ct_NF)


def _inputs(key: jax.Array, *, shape: Shape, backward: bool) -> tuple[jax.Array, ...]:
    x, w, _ = shape.arrays(jnp.bfloat16)
    keys = jax.random.split(key, 3)
    scaled = normal(keys[1], w) * jnp.asarray(shape.inputs**-0.5, w.dtype)
    arrays = normal(keys[0], x), scaled, jnp.asarray(shape.sizes())
    ct = jax.ShapeDtypeStruct((shape.rows, shape.outputs), x.dtype)
    return (*arrays, normal(keys[2], ct)) if backward else arrays


def _tiles(shape: Shape) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """What to try: every tile that divides the widths and fits shared memory."""

    def products(parts: int, width: int, narrow: bool) -> list[Mapping[str, Any]]:
        """Forward and dX; low tiles share columns out, high ones rows. `narrow`: 64 columns too."""
        splits = ((64, "columns"), (128, "rows"), (256, "rows"))
        each = itertools.product(splits, (64, 128, 256), (3, 4, 6, 8), (1, 2))
        tiles = [Tile(rows, c, stages, 2, split, cluster) for (rows, split), c, stages, cluster in each]
        return [
            t._asdict()
            for t in tiles
            if width % (t.columns * t.cluster) == 0
            and (t.columns > LINE or (narrow and t.rows == LINE))
            and t.warpgroup[0] * t.warpgroup[1] * parts <= 64 * 256
            and t.shared_bytes(parts) <= SHARED_BYTES
        ]

    each = itertools.product((128, 256), (3, 4, 6), (1, 2, 4), (1, 2))
    gradients = [GradientTile(128, *t) for t in each]
    return {
        shape.kind: products(shape.parts, shape.outputs, True),
        "grouped_matmul_dx": products(1, shape.inputs, False),
        "grouped_matmul_dw": [
            t._asdict()
            for t in gradients
            if shape.inputs % t.columns == 0 == shape.parts * shape.outputs % (t.rows * t.cluster)
            and t.shared_bytes() <= SHARED_BYTES
        ],
    }


def cases() -> list[Case]:
    """Forward, dX and dW of the plain product; forward and the whole backward pass of the fused one."""
    found = []
    for name, shape in {**INTERPRETED, **DEVICE_SHAPES}.items():
        x, w, sizes = shape.arrays(jnp.bfloat16)
        ct = jax.ShapeDtypeStruct((shape.rows, shape.outputs), x.dtype)

        reads = shape.rows * (shape.inputs + shape.outputs) + shape.weights_read()
        programs: dict[str, tuple[Any, int, int]] = {"forward": (_forward, 1, reads)}
        if shape.kind == "grouped_matmul":
            # An expert without rows has a gradient of zeros, which is written too.
            writes = shape.rows * (shape.inputs + shape.outputs) + w.size
            programs |= {"dx": (_dx, 1, reads), "dw": (_dw, 1, writes)}
        else:
            # Forward with gate and up kept; these read, their gradients written, and read by dX and dW.
            kept = 5 * shape.rows * 2 * shape.outputs
            programs["backward"] = (_backward, 3, 3 * reads + kept + w.size - shape.weights_read())
        for program, (function, products, numbers) in programs.items():
            found.append(
                Case(
                    kernel=shape.kind,
                    program=program,
                    shape=name,
                    size="small" if name in INTERPRETED else "full",
                    function=functools.partial(function, kind=shape.kind),
                    arguments=(x, w, sizes) if program == "forward" else (x, w, sizes, ct),
                    flops=products * shape.flops(),
                    bytes=2 * numbers,
                    bound=BACKWARD_BOUND if program == "backward" else BOUND,
                    inputs=functools.partial(_inputs, shape=shape, backward=program != "forward"),
                    tiles=_tiles(shape) if name in DEVICE_SHAPES else {},
                    implementations=("mosaic", "reference", "tokamax"),
                )
            )
    return found
