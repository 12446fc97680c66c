"""What a kernel offers to the benchmarks: its programs at named shapes, ready to compile, check and time.

`kernels/<op>/shapes.py` has `def cases() -> list[Case]`; `all_cases` finds it, and `benchmarks.compile_h200`,
`benchmarks.gpu` and `benchmarks.tune` run what it lists. Adding a kernel or a shape needs no edit there.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

import dsv3_jax.kernels


@dataclasses.dataclass(frozen=True)
class Case:
    """One program of a kernel at one named shape.

    Attributes:
      kernel: the registry's name of the kernel, such as "attention".
      program: "forward", "backward", "dx", "dw", ...
      shape: a key of the op's SHAPES, and what else tells its cases apart.
      size: "full" shapes are compiled for a GPU and timed there; "small" ones run everywhere (CPU, interpreted).
      function: function(*arrays, implementation=...) -> arrays: through the op's api. A backward program takes the
        forward's inputs and the cotangent, and returns the gradients (`jax.vjp` inside).
      arguments: the arrays, abstract.
      flops: of the useful products (causal: half of the square).
      bytes: read and written once each, at least.
      bound: the largest error allowed against the reference in float32: max |difference| / max |reference|, per output.
      inputs: key -> arrays; by default normal values for floats, and for integers the op must give its own.
      tiles: for `benchmarks.tune`: program (as `tables.tuned` is asked for it) -> tile parameters to try.
      implementations: beyond these the op's other implementations are compared where they can run.
    """

    kernel: str
    program: str
    shape: str
    size: Literal["small", "full"]
    function: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    flops: float
    bytes: float
    bound: float
    inputs: Callable[[jax.Array], tuple[jax.Array, ...]] | None = None
    tiles: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    implementations: tuple[str, ...] = ("mosaic", "reference")

    @property
    def name(self) -> str:
        """For people and files: "attention forward v3_train bfloat16"."""
        return f"{self.kernel} {self.program} {self.shape} {self.arguments[0].dtype.name}"

    def make(self, key: jax.Array) -> tuple[jax.Array, ...]:
        """Fresh arrays for the arguments; another key gives others."""
        if self.inputs is not None:
            return self.inputs(key)
        keys = jax.random.split(key, len(self.arguments))
        return tuple(normal(k, a) for k, a in zip(keys, self.arguments, strict=True))


def normal(key: jax.Array, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """Standard normal values of a shape and floating dtype."""
    if not jnp.issubdtype(abstract.dtype, jnp.floating):
        raise ValueError(f"{abstract}: only floats are drawn here; give the case `inputs`")
    return jax.random.normal(key, abstract.shape, jnp.float32).astype(abstract.dtype)


def all_cases() -> list[Case]:
    """The cases of every operation, in the order of their folders' names."""
    cases: list[Case] = []
    for module in pkgutil.iter_modules(dsv3_jax.kernels.__path__):
        if module.ispkg:
            shapes = importlib.import_module(f"dsv3_jax.kernels.{module.name}.shapes")
            cases += shapes.cases() if hasattr(shapes, "cases") else []
    return cases
