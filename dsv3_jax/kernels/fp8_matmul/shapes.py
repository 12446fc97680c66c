"""Named shapes of FP8 products, for tests, benchmarks, compilation checks and tuning."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.kernels.cases import Case, normal
from dsv3_jax.kernels.fp8_matmul import mosaic_quantize
from dsv3_jax.kernels.fp8_matmul.mosaic_product import Tile
from dsv3_jax.kernels.fp8_matmul.quantize import BLOCK, quantize_blocks, quantize_lines
from dsv3_jax.kernels.grouped_matmul.pipeline import SHARED_BYTES
from dsv3_jax.kernels.quantized_matmul import Coding, grouped_quantized_matmul, quantized_matmul
from dsv3_jax.kernels.registry import Implementation, call
from dsv3_jax.kernels.registry import mosaic as hopper

CODING = Coding("fp8", BLOCK, BLOCK, "fp8")


class Shape(NamedTuple):
    """N R K, experts (0: dense)."""

    rows: int
    outputs: int
    inputs: int
    experts: int = 0

    @property
    def kernel(self) -> str:
        """The registry's name."""
        return "grouped_fp8_matmul" if self.experts else "fp8_matmul"

    def arrays(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Abstract x, codes (bytes), scales, and group sizes for experts."""
        lead = (self.experts,) if self.experts else ()
        blocks = CODING.scale_shape(self.outputs, self.inputs)
        arrays = (
            jax.ShapeDtypeStruct((self.rows, self.inputs), jnp.bfloat16),
            jax.ShapeDtypeStruct((*lead, self.outputs, self.inputs), jnp.uint8),
            jax.ShapeDtypeStruct((*lead, *blocks), jnp.float32),
        )
        return (*arrays, jax.ShapeDtypeStruct(lead, jnp.int32)) if lead else arrays

    def sizes(self, seed: int = 0) -> np.ndarray:
        """Group sizes as a balanced router's draw."""
        E = self.experts
        return np.random.default_rng(seed).multinomial(self.rows, np.full(E, 1 / E)).astype(np.int32)

    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs

    def bytes(self) -> int:
        """x, its codes written and read, weights of experts that have rows, y."""
        live = int((self.sizes() > 0).sum()) if self.experts else 1
        return self.rows * (4 * self.inputs + 2 * self.outputs) + live * self.outputs * self.inputs


SHAPES = {
    # DeepSeek-V3, 8,192 tokens: its widest and its longest dense products, the 4.5 blocks of kv_a; then decoding.
    "v3_q_b": Shape(8192, 24576, 1536),
    "v3_o": Shape(8192, 7168, 16384),
    "v3_dense_gate_up": Shape(8192, 36864, 7168),
    "v3_kv_a": Shape(8192, 576, 7168),
    "v3_q_b_decode": Shape(64, 24576, 1536),
    "v3_kv_a_decode": Shape(64, 576, 7168),
    "v3_gate_up": Shape(65536, 4096, 7168, 256),
    "v3_down": Shape(65536, 7168, 2048, 256),
    "v3_gate_up_decode": Shape(512, 4096, 7168, 256),
    "v3_down_decode": Shape(512, 7168, 2048, 256),
    # 16B-A3B: experts of 1408 (11 blocks).
    "a3b_gate_up": Shape(49152, 2816, 2048, 64),
    "a3b_down": Shape(49152, 2048, 1408, 64),
    # Small enough for the interpreter: partial blocks of both sides.
    "interpret": Shape(150, 192, 272),
    "interpret_few": Shape(9, 576, 144),
    "interpret_experts": Shape(300, 192, 272, 5),
    "interpret_experts_few": Shape(40, 192, 128, 5),
}
INTERPRETED = {name: s for name, s in SHAPES.items() if name.startswith("interpret")}
DEVICE_SHAPES = {name: s for name, s in SHAPES.items() if name not in INTERPRETED}

# One rounding to a 16-bit result, relative to the largest value. Codes next to a middle may be neighbours where the
# scale's inverse is rounded elsewhere: at most one step of the top octave, 32 of 448.
BOUND, QUANTIZE_BOUND = 0.01, 0.08


def _forward(
    x: jax.Array, codes: jax.Array, scales: jax.Array, *sizes: jax.Array, implementation: str
) -> Any:
    if sizes:
        product = functools.partial(grouped_quantized_matmul, x, codes, scales, None, *sizes)
    else:
        product = functools.partial(quantized_matmul, x, codes, scales)
    return product(coding=CODING, implementation=implementation)


def _by_kernel(x_NK: jax.Array) -> tuple[jax.Array, jax.Array]:
    codes, scales_GN = mosaic_quantize.quantize_lines(x_NK)
    return codes, scales_GN[:, : x_NK.shape[0]]


def _by_xla(x_NK: jax.Array) -> tuple[jax.Array, jax.Array]:
    codes, scales_NG = quantize_lines(x_NK)
    return codes, scales_NG.T


# For these cases alone: the rounding is a part of the product, which the registry chooses for.
QUANTIZE = {
    "mosaic": hopper(_by_kernel, refuses=lambda x: None, shape_class=lambda x: f"k{x.shape[1]}"),
    "reference": Implementation(_by_xla),
}


def _quantize(x_NK: jax.Array, *, implementation: str) -> tuple[jax.Array, jax.Array]:
    """Codes, and scales [G, N]."""
    return call("fp8_quantize", implementation, QUANTIZE, x_NK)


@functools.partial(jax.jit, static_argnames="shape")
def _inputs(key: jax.Array, *, shape: Shape) -> tuple[jax.Array, ...]:
    x, codes, *_ = shape.arrays()
    keys = jax.random.split(key, 2)
    lead = codes.shape[:-2]
    w = normal(keys[1], jax.ShapeDtypeStruct(codes.shape, jnp.bfloat16)) * jnp.bfloat16(shape.inputs**-0.5)
    # An expert at a time: float32 of all of them would not fit.
    coded = jax.lax.map(quantize_blocks, w) if lead else quantize_blocks(w)
    arrays = normal(keys[0], x), jax.lax.bitcast_convert_type(coded.codes, jnp.uint8), coded.scales
    return (*arrays, jnp.asarray(shape.sizes())) if lead else arrays


def _tiles(shape: Shape) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """What to try: every tile that fits registers, shared memory and the widths."""
    splits = ((64, "columns"), (128, "rows"))
    each = itertools.product(splits, (64, 128, 256), (3, 4, 5, 6, 8), (1, 2), (1, 16, 32), (1, 2))
    tiles = [
        Tile(rows, c, stages, slots, split, band, cluster)
        for (rows, split), c, stages, slots, band, cluster in each
    ]
    return {
        shape.kernel: [
            t._asdict()
            for t in tiles
            if t.fits() and t.shared_bytes() <= SHARED_BYTES and t.columns * t.cluster <= shape.outputs
        ]
    }


def cases() -> list[Case]:
    """Every product, and the rounding of its activations by itself for two of them."""
    found = []
    for name, shape in SHAPES.items():
        size: Any = "small" if name in INTERPRETED else "full"
        found.append(
            Case(
                kernel=shape.kernel,
                program="forward",
                shape=name,
                size=size,
                function=_forward,
                arguments=shape.arrays(),
                flops=shape.flops(),
                bytes=shape.bytes(),
                bound=BOUND,
                inputs=functools.partial(_inputs, shape=shape),
                tiles=_tiles(shape) if size == "full" else {},
            )
        )
        if name in ("v3_gate_up", "v3_q_b_decode", "interpret"):
            x = shape.arrays()[0]
            found.append(
                Case(
                    kernel="fp8_quantize",
                    program="forward",
                    shape=name,
                    size=size,
                    function=_quantize,
                    arguments=(x,),
                    flops=0,
                    bytes=3 * x.size + 4 * x.size // BLOCK,
                    bound=QUANTIZE_BOUND,
                )
            )
    return found
