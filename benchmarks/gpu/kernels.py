"""Kernels: right first, then fast, beside other implementations and torch."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import rivals
from benchmarks.gpu.timing import bytes_of, poison, sets_for, timed
from dsv3_jax.errors import ConfigError
from dsv3_jax.kernels import tables
from dsv3_jax.kernels.cases import Case

FLOAT32_BYTES = 24 << 30  # of a case's inputs in float32, up to which the reference runs in float32

Row = dict[str, Any]


def in_float32(case: Case) -> bool:
    """Whether the expected result is computed in float32; larger cases are compared in their own type."""
    return sum(4 * a.size for a in case.arguments) <= FLOAT32_BYTES


def expected(case: Case, arrays: tuple[jax.Array, ...]) -> Any:
    """The reference's result, in float32 where that fits."""
    if in_float32(case):
        arrays = tuple(a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in arrays)
    return jax.device_get(jax.jit(functools.partial(case.function, implementation="reference"))(*arrays))


def error_of(found: Any, wanted: Any) -> float:
    """max |difference| / max |wanted|, the worst of all outputs; infinite for anything not finite."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if not jnp.issubdtype(b.dtype, jnp.floating):
            continue
        a64, b64 = np.asarray(a, np.float32), np.asarray(b, np.float32)
        if not np.isfinite(a64).all():
            return float("inf")
        worst = max(worst, float(np.max(np.abs(a64 - b64)) / max(float(np.max(np.abs(b64))), 1e-30)))
    return worst


def run_case(case: Case, seed: int, calls: int, peaks: Row, with_rivals: bool) -> Row:
    """Correctness and time of every implementation of one case."""
    keys = jax.random.split(jax.random.key(seed), sets_for(bytes_of(case.arguments)))
    sets = [case.make(key) for key in keys]
    wanted = expected(case, sets[0])
    row: Row = {
        "kernel": case.kernel,
        "program": case.program,
        "shape": case.shape,
        "dtype": case.arguments[0].dtype.name,
        "flops": case.flops,
        "bytes": case.bytes,
        "bound": case.bound,
        "compared_in": "float32" if in_float32(case) else case.arguments[0].dtype.name,
        "implementations": {},
    }
    for name in case.implementations:
        row["implementations"][name] = one(case, name, sets, wanted, calls, peaks)
    if with_rivals:
        row["rivals"] = {
            name: finish(case, result, peaks)
            for name, result in rivals.run(case, sets, wanted, calls, error_of)
        }
    return row


def one(case: Case, name: str, sets: list[tuple], wanted: Any, calls: int, peaks: Row) -> Row:
    """One implementation: refused, wrong (also where the device fails), or right with its time."""
    function = jax.jit(functools.partial(case.function, implementation=name))
    result: Row = {"classes": {}}
    try:
        with tables.watching() as watch:
            lowered = function.lower(*sets[0])
        classes = {kernel: c for (kernel, chosen), c in watch.kernels.items() if chosen == name}
        result["classes"] = classes
        start = time.perf_counter()
        compiled = lowered.compile()
        result["compile_s"] = round(time.perf_counter() - start, 2)
        poison(wanted)
        result["error"] = error_of(jax.device_get(compiled(*sets[0])), wanted)
        result["right"] = result["error"] <= case.bound
        if result["right"]:
            result["time"] = timed(compiled, sets, calls).row()
    except (ConfigError, NotImplementedError) as error:
        return {"refused": str(error)}
    except (ValueError, jax.errors.JaxRuntimeError) as error:  # the other cases are still worth their time
        return result | failed(error)
    return finish(case, result, peaks)


def failed(error: Exception) -> Row:
    """Of an implementation that the device could not compile or run: wrong, with its words."""
    return {"error": float("inf"), "right": False, "failed": str(error).splitlines()[0][:200]}


def finish(case: Case, result: Row, peaks: Row) -> Row:
    """Adds rates, and their ratio to the ceilings of the same run."""
    if "time" in result:
        seconds = 1e-3 * result["time"]["median"]
        result["of_product"] = case.flops / seconds / peaks["flops_per_s"]
        result["of_copy"] = case.bytes / seconds / peaks["bytes_per_s"]
    return result


def lines(row: Row) -> Iterator[str]:
    """For people."""
    yield f"{row['kernel']} {row['program']} {row['shape']} {row['dtype']}"
    for kind in ("implementations", "rivals"):
        for name, result in row.get(kind, {}).items():
            if "refused" in result:
                yield f"  {name}: {result['refused']}"
            elif "failed" in result:
                yield f"  {name}: FAILED, {result['failed']}"
            elif "time" not in result:
                yield f"  {name}: WRONG, error {result['error']:.2e} above {row['bound']:.0e}"
            else:
                rates = f"{result['of_product']:.2f} of product, {result['of_copy']:.2f} of copy"
                yield f"  {name}: {result['time']['median']:.3f} ms, {rates}, error {result['error']:.1e}"


def shown_correct(rows: list[Row]) -> dict[str, dict[str, dict[str, Row]]]:
    """kernel -> implementation -> shape class -> largest error: classes of which every case that ran was right."""
    found: dict[tuple[str, str, str], list[tuple[bool, float, float]]] = {}
    for row in rows:
        for name, result in row["implementations"].items():
            for kernel, shape_class in result.get("classes", {}).items():
                entry = (result["right"], result["error"], row["bound"])
                found.setdefault((kernel, name, shape_class), []).append(entry)
    shown: dict[str, dict[str, dict[str, Row]]] = {}
    for (kernel, name, shape_class), results in found.items():
        if all(right for right, _, _ in results):
            worst = max(results, key=lambda r: r[1] / r[2])
            entry = {"error": worst[1], "bound": worst[2], "cases": len(results)}
            shown.setdefault(kernel, {}).setdefault(name, {})[shape_class] = entry
    return shown


Runner = Callable[[], Row]
