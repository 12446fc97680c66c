"""Named shapes of expanded attention, for tests, benchmarks and tuning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.attention.api import attention
from dsv3_jax.kernels.cases import Case, normal


class Shape(NamedTuple):
    """B T H Q U, with as many keys as queries.

    Attributes:
      groups: key and value heads; 0 means as many as query heads.
      segments: packed sequences a row, of different lengths; 0 means no segment ids.
    """

    batch: int
    length: int
    heads: int
    qk_dim: int
    v_dim: int
    groups: int = 0
    segments: int = 0
    causal: bool = True

    def arrays(self, dtype: jnp.dtype = jnp.float32) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Abstract q, k, v."""
        G = self.groups or self.heads
        lead = (self.batch, self.length)
        dims = ((self.heads, self.qk_dim), (G, self.qk_dim), (G, self.v_dim))
        return tuple(jax.ShapeDtypeStruct((*lead, *d), dtype) for d in dims)

    def segment_ids(self, key: jax.Array) -> jax.Array:
        """int32 [B, T]: `segments` sequences a row, cut at random places, the last one padding."""
        cuts = jax.random.randint(key, (self.batch, self.segments), 1, max(2, self.length))
        ids = 1 + (jnp.arange(self.length)[None, :, None] >= cuts[:, None]).sum(-1)
        return jnp.where(ids > self.segments, 0, ids).astype(jnp.int32)

    def pairs(self) -> float:
        """Pairs of a query and a key that it sees, without segments, over the batch."""
        T = self.length
        return self.batch * (T * (T + 1) / 2 if self.causal else T * T)


SHAPES = {
    "one_token": Shape(2, 1, 3, 12, 8),
    "one_block": Shape(2, 17, 3, 12, 8),
    "odd_blocks": Shape(2, 301, 2, 12, 8),
    "grouped_odd_blocks": Shape(2, 301, 4, 12, 8, groups=2),
    "cpu_100m": Shape(8, 512, 16, 96, 64),
    # For the Mosaic kernels: what they take, small enough to interpret.
    "small_token": Shape(2, 1, 2, 64, 64),
    "small": Shape(2, 17, 2, 192, 128),
    "small_odd": Shape(1, 301, 2, 192, 128),
    "small_packed": Shape(2, 301, 1, 192, 128, segments=4),
    "small_grouped": Shape(1, 193, 4, 64, 64, groups=2, segments=3),
    "small_full": Shape(1, 301, 2, 128, 128, groups=1, causal=False),
    "v3_train": Shape(4, 4096, 16, 192, 128),
    "v3": Shape(1, 4096, 128, 192, 128),
    "v3_packed": Shape(4, 4096, 16, 192, 128, segments=8),
    "v3_odd": Shape(1, 4001, 16, 192, 128),
    "equal_128": Shape(4, 4096, 16, 128, 128),
    "grouped_128": Shape(4, 4096, 32, 128, 128, groups=8),
    "grouped_128_packed": Shape(4, 4096, 32, 128, 128, groups=8, segments=8),
    "equal_64": Shape(4, 4096, 16, 64, 64),
    "full_192": Shape(4, 4096, 16, 192, 128, causal=False),
    "full_128": Shape(4, 4096, 16, 128, 128, causal=False),
}

FLOATS = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}
# Largest error against the float32 reference, relative to the largest value: 3 to 8 roundings of the type.
BOUNDS = {"bfloat16": 0.012, "float16": 0.0016}


def cases() -> list[Case]:
    """Forward and backward at every shape that a GPU kernel takes; both 16-bit types at the main one."""
    small = [name for name in SHAPES if name.startswith("small")]
    large = ["v3_train", "v3", "v3_packed", "v3_odd", "equal_128", "grouped_128", "grouped_128_packed"]
    large += ["equal_64", "full_192", "full_128"]
    listed = [(name, "bfloat16") for name in (*small, *large)] + [
        ("small", "float16"),
        ("v3_train", "float16"),
    ]
    return [
        _case(name, dtype, program)
        for name, dtype in listed
        for program in ("forward", "backward")
        # The softmax of one score has gradient 0: there is no relative error to bound.
        if (name, program) != ("small_token", "backward")
    ]


def _case(name: str, dtype: str, program: str) -> Case:
    shape = SHAPES[name]
    q, k, v = shape.arrays(FLOATS[dtype])
    out = jax.ShapeDtypeStruct((*q.shape[:3], shape.v_dim), q.dtype)
    ids = (jax.ShapeDtypeStruct(q.shape[:2], jnp.int32),) if shape.segments else ()
    floats = (q, k, v) if program == "forward" else (q, k, v, out)

    def inputs(key: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(key, len(floats) + 1)
        drawn = tuple(normal(k, a) for k, a in zip(keys, floats, strict=False))
        return (*drawn, shape.segment_ids(keys[-1])) if ids else drawn

    # Two products forward; scores, dp, dq, dk, dv backward. Q for scores, dq and dk, U for the rest.
    Q, U = shape.qk_dim, shape.v_dim
    columns = Q + U if program == "forward" else 3 * Q + 2 * U
    moved = sum(2 * a.size for a in (q, k, v, out)) * (1 if program == "forward" else 2)
    statistics = 4 * q.shape[0] * q.shape[1] * q.shape[2]
    return Case(
        kernel="attention",
        program=program,
        shape=name,
        size="small" if name.startswith("small") else "full",
        function=_program(shape, program),
        arguments=(*floats, *ids),
        flops=2.0 * shape.pairs() * shape.heads * columns,
        bytes=float(moved + statistics),
        bound=BOUNDS[dtype],
        inputs=inputs,
        tiles=_tiles(shape, program),
        implementations=("mosaic", "reference", "cudnn", "tokamax"),
    )


def _program(shape: Shape, program: str) -> Callable[..., Any]:
    # float32 arrays may come too: the reference's result for comparison.
    scale = shape.qk_dim**-0.5

    def run(q, k, v, *ids, implementation):
        segments_BT = ids[0] if ids else None
        options: dict[str, Any] = {"scale": scale, "causal": shape.causal, "segments_BT": segments_BT}
        return attention(q, k, v, implementation=implementation, **options)

    def forward(q, k, v, *ids, implementation):
        return (run(q, k, v, *ids, implementation=implementation),)

    def backward(q, k, v, dout, *ids, implementation):
        f = functools.partial(run, implementation=implementation)
        return jax.vjp(lambda q, k, v: f(q, k, v, *ids), q, k, v)[1](dout)

    return forward if program == "forward" else backward


def _tiles(shape: Shape, program: str) -> dict[str, list[dict[str, int]]]:
    if program == "backward":
        stages = [{"stages": n} for n in (2, 3)]
        return {"attention_dq": stages, "attention_dkv": stages}
    most = 2 if shape.qk_dim > 64 else 4
    return {
        "attention": [{"keys": 128, "stages": n} for n in range(2, most + 1)]
        + [{"keys": 64, "stages": n} for n in (2, 3, 4)]
    }
