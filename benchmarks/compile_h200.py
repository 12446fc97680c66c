"""Every kernel and whole program compiled for H200s on a machine without one: `./run h200 [flags]`.

Checked: no spilled byte, no serialised WGMMA, shared memory within the limit, temporary memory within 5 % of what
is recorded, no dense product over all experts, no expert weight that travels, no copy of the cache. Nothing is run, so
nothing is said about results or speed. Kernels come from `dsv3_jax.kernels.cases`.

  --quick       one shape of every kernel's program, one whole program: for CI
  --only WORD   what has all these words in its name
  --record      write benchmarks/results/compile_h200.json instead of comparing with it (rules must still hold)
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("MOSAIC_GPU_DUMP_PTXAS", "1")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax

from benchmarks.common import RESULTS, environment, write
from benchmarks.h200 import checks
from benchmarks.h200.compiler import Report, compile_for_h200, on_one_device, why_not
from benchmarks.h200.programs import Program, all_programs
from dsv3_jax.errors import ConfigError, run_main
from dsv3_jax.kernels import shim
from dsv3_jax.kernels.cases import Case, all_cases

NAME = "compile_h200"
Rows = dict[str, dict[str, Any]]


def kernel_report(case: Case, implementation: str) -> Report:
    """A kernel's program at a full shape, compiled."""
    function = functools.partial(case.function, implementation=implementation)
    return compile_for_h200(function, *on_one_device(case.arguments))


def quick_cases(cases: list[Case]) -> list[Case]:
    """The first full shape of every kernel's program."""
    first: dict[tuple[str, str], Case] = {}
    for case in cases:
        first.setdefault((case.kernel, case.program), case)
    return list(first.values())


def chosen(only: list[str], quick: bool) -> tuple[list[Case], list[Program]]:
    """What to compile."""
    cases = [case for case in all_cases() if case.size == "full" and "mosaic" in case.implementations]
    programs = all_programs()
    if quick:
        cases, programs = quick_cases(cases), [p for p in programs if p.name == QUICK]
    wanted = [word for words in only for word in words.split()]
    return (
        [case for case in cases if all(word in case.name for word in wanted)],
        [program for program in programs if all(word in program.name for word in wanted)],
    )


QUICK = "decode 16B-A3B, 6 layers, 64 rows of 1024 mosaic"


def main() -> int:
    """Compile, check, tell; 1 when a rule is broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--only", action="append", default=[], metavar="WORD")
    flags = parser.parse_args()
    if (reason := why_not()) is not None:
        print(f"NOT RUN: {reason}")
        return 0 if os.environ.get("CI") else 2
    path = RESULTS / f"{NAME}.json"
    before: dict[str, Any] = (
        json.loads(path.read_text()) if path.is_file() else {"kernels": {}, "programs": {}}
    )
    kernels: Rows = {}
    programs: Rows = {}
    wrong: list[str] = []
    cases, whole = chosen(flags.only, flags.quick)

    def done(name: str, report: Report, rows: Rows, recorded: Rows, breaches: list[str]) -> None:
        rows[name] = report.row()
        if not flags.record:
            breaches = breaches + checks.against_record(report, recorded.get(name))
        print(line(name, report), flush=True)
        for breach in breaches:
            print(f"  WRONG: {breach}", flush=True)
        wrong.extend(f"{name}: {breach}" for breach in breaches)

    for case in cases:
        report = kernel_report(case, "mosaic")
        breaches = checks.of_kernels(report)
        if not report.kernels:
            breaches.append("no Mosaic kernel in the program")
        done(case.name, report, kernels, before["kernels"], breaches)
    for program in whole:
        try:
            report = program.compile()
        except ConfigError as error:
            print(f"{program.name}: NOT RUN ({error})", flush=True)
            programs[program.name] = {"not_run": str(error)}
            continue
        breaches = [*checks.of_kernels(report), *checks.of_program(report, program)]
        done(program.name, report, programs, before["programs"], breaches)
        jax.clear_caches()
    if flags.record:
        if flags.only or flags.quick:  # the others stay as they are
            kernels, programs = before["kernels"] | kernels, before["programs"] | programs
        kept = {name: kernels[name] for name in sorted(kernels)}
        write(NAME, {"environment": versions(), "kernels": kept, "programs": programs})
    print(f"{len(kernels)} kernels, {len(programs)} programs, {len(wrong)} breaches")
    return 1 if wrong else 0


def versions() -> dict[str, Any]:
    """What the figures depend on: the compilers, not this machine's speed."""
    import importlib.metadata

    where = environment()
    names = ("jax", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "nvidia-nvvm")
    where["versions"] = {name: importlib.metadata.version(name) for name in names}
    where["jax_shim"] = ".".join(map(str, shim.VERSION))
    return where


def line(name: str, report: Report) -> str:
    """One line for people."""
    text = f"{name}: {report.seconds:.1f} s, {report.temporary_bytes / 2**20:,.1f} MiB temporary"
    if report.kernels:
        registers = "/".join(str(kernel["registers"]) for kernel in report.kernels)
        text += f", registers {registers}, {report.shared_bytes:,} bytes shared"
    return text


if __name__ == "__main__":
    run_main(main)
