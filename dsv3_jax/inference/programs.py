"""Device programs, compiled ahead of time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax

from dsv3_jax.inference.placement import HERE, Placement

Program = Callable[..., Any]

# Of the process: another engine of the same model and sizes compiles nothing.
_COMPILED: dict[Any, Program] = {}


class Programs:
    """Compiles pure functions for fixed shapes. What it returns refuses other shapes, so nothing recompiles.

    Attributes:
      count: programs that had to be compiled.
      seconds: what that took.
    """

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def compile(
        self,
        function: Callable[..., Any],
        static: tuple[Any, ...],
        args: tuple[Any, ...],
        donate: tuple[int, ...] = (),
        *,
        placement: Placement | None = None,
        specs: tuple[Any, Any] = (HERE, HERE),
        local: bool = True,
    ) -> Program:
        """The program of `function(*static, *args)`, to be called with arrays like `args`.

        Args:
          static: hashable leading arguments.
          args: arrays or shapes (jax.ShapeDtypeStruct), and trees of them.
          donate: positions in `args` whose buffers may be reused.
          placement, specs, local: the devices, and how arguments and results are cut over them; they follow from
            the function and the placement. See `Placement.spread`.
        """
        placement = placement or Placement()
        leaves, tree = jax.tree.flatten(args)
        key = (function, static, donate, placement, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        program = _COMPILED.get(key)
        if program is None:
            started = time.perf_counter()
            jitted = placement.spread(functools.partial(function, *static), *specs, local=local)
            program = _COMPILED[key] = jitted(donate_argnums=donate).lower(*args).compile()
            self.seconds += time.perf_counter() - started
            self.count += 1
        return program
