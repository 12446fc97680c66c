"""XLA's GPU compiler and ptxas without a GPU: what a program needs of registers, shared memory and device memory.

`target.txtpb` describes the device (`xla.GpuTargetConfig` as text). Programs are lowered with shardings on a mesh of
devices that do not exist, then compiled as on a machine that has them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.kernels import shim

TARGET = Path(__file__).with_name("target.txtpb")
SHARED_LIMIT = 232_448  # bytes a block may ask for on compute capability 9.0


def why_not() -> str | None:
    """The reason nothing can be compiled for an H200 here, or None."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return "the package jax-cuda13-plugin is missing: `./run h200-env` makes an environment with it"
    if shim.VERSION < (0, 11):
        return f"jax {jax.__version__} cannot compile for a GPU that is not there; 0.11 or later does (Python 3.12)"
    if not os.environ.get("MOSAIC_GPU_DUMP_PTXAS"):
        return "MOSAIC_GPU_DUMP_PTXAS is not set before the compiler is loaded"
    return None


@functools.cache
def devices(count: int = 1) -> list[Any]:
    """`count` H200s of one machine, for `make_mesh`."""
    text = TARGET.read_text(encoding="utf-8")
    found = topologies.get_topology_desc(platform="cuda", target_config=text, topology=f"1x1x{count}")
    return list(found.devices)


def on_one_device(arguments: Any) -> Any:
    """Abstract arrays placed on the one device of a mesh without axes to cut over."""
    where = NamedSharding(jax.sharding.Mesh(devices(1)[:1], ("x",)), P())
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), arguments)


@dataclasses.dataclass
class Report:
    """What a compiled program needs.

    Attributes:
      seconds: of lowering and compiling.
      temporary_bytes: device memory beside arguments and results.
      argument_bytes: device memory of the arguments.
      kernels: of each Mosaic kernel, in the order ptxas met them: name, registers, spilled bytes.
      shared_bytes: the most that a Mosaic kernel asks for at launch, or None without one.
      warnings: ptxas' words for WGMMA that it had to serialise.
      text: the optimised HLO.
    """

    seconds: float
    temporary_bytes: int
    argument_bytes: int
    kernels: list[dict[str, Any]]
    shared_bytes: int | None
    warnings: list[str]
    text: str

    def row(self) -> dict[str, Any]:
        """For the result file."""
        row: dict[str, Any] = {
            "seconds": round(self.seconds, 1),
            "temporary_bytes": self.temporary_bytes,
            "argument_bytes": self.argument_bytes,
        }
        if self.kernels:
            row["kernels"], row["shared_bytes"] = self.kernels, self.shared_bytes
        return row


def compile_for_h200(function: Any, *arguments: Any, donate: tuple[int, ...] = ()) -> Report:
    """Lower and compile `function` for the devices its abstract arguments lie on; nothing is run."""
    start = time.perf_counter()
    with _printed() as said:
        with shim.compiling_for():
            lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
        compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    log = said()
    return Report(
        seconds,
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        _kernels(log),
        max(_shared_bytes(lowered), default=None),
        sorted({line.strip() for line in log.splitlines() if "serialized" in line}),
        compiled.as_text() or "",
    )


@contextlib.contextmanager
def _printed() -> Iterator[Any]:
    """What is written to file descriptors 1 and 2 meanwhile: ptxas' report comes from C++."""
    with tempfile.TemporaryFile() as file:
        saved = [os.dup(1), os.dup(2)]
        said: list[str] = []
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: said[0]
        finally:
            for number, descriptor in zip((1, 2), saved, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
            if os.environ.get("DSV3_SHOW_PTXAS"):
                print(said[0])


def _kernels(log: str) -> list[dict[str, Any]]:
    """Registers and spilled bytes of every kernel in ptxas' report."""
    found = []
    for part in log.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0].removesuffix("_mosaic_gpu_kernel")
        stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()  # type: ignore[union-attr]
        registers = re.search(r"Used (\d+) registers", part)
        assert registers, part[:400]
        found.append({"name": name, "registers": int(registers[1]), "spilled": int(stores) + int(loads)})
    return found


def _shared_bytes(lowered: Any) -> list[int]:
    """Dynamic shared memory of every Mosaic kernel in a lowered program: the last operand of its launch."""
    from jax._src.interpreters import mlir
    from jaxlib.mlir import ir

    found: list[int] = []
    modules: list[bytes] = []

    def calls(operation: Any) -> Any:
        attributes = operation.attributes
        if operation.name == "stablehlo.custom_call" and "mosaic_gpu" in str(attributes["call_target_name"]):
            modules.append(ir.StringAttr(attributes["mhlo.backend_config"]["module"]).value_bytes)
        return ir.WalkResult.ADVANCE

    def launches(operation: Any) -> Any:
        if operation.name.endswith("gpu.launch"):
            constant = operation.operands[-1].owner
            found.append(ir.IntegerAttr(constant.attributes["value"]).value)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(calls)
    context = mlir.make_ir_context()
    context.allow_unregistered_dialects = True
    for module in modules:
        with context:
            ir.Module.parse(module).operation.walk(launches)
    return found
