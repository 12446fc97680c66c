"""Tile parameters of kernels for this device: `python -m benchmarks.tune [--only WORD]`.

Every full case that lists `tiles` is run with the parameters in force, then with each candidate for one program at a
time: compiled, compared with the first result (the same bound as the benchmark's), timed with rotated inputs. The
fastest right one is written to kernels/tuning.json for the device's family and the class of shapes if it beats the
parameters in force by more than --gain. Cases of one class share an entry: the one with most operations decides.

  --minutes N   of all, after which no further candidate is begun (30)
  --dry-run     small cases on whatever platform, nothing written
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from benchmarks.gpu.kernels import error_of
from benchmarks.gpu.timing import bytes_of, poison, sets_for, timed
from dsv3_jax.errors import ConfigError, run_main
from dsv3_jax.kernels import shim, tables
from dsv3_jax.kernels.cases import Case, all_cases

Tiles = Mapping[str, Any]
Found = dict[tuple[str, str], tuple[float, Tiles]]  # (program, class) -> operations of the case, parameters

FAILURES = (ValueError, TypeError, NotImplementedError, jax.errors.JaxRuntimeError)


def main() -> int:
    """Try, tell, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", action="append", default=[], metavar="WORD")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--gain", type=float, default=0.02)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--dry-run", action="store_true")
    flags = parser.parse_args()
    where = shim.target()
    if where.platform != "gpu" and not flags.dry_run:
        raise ConfigError(
            f"no GPU here (platform {where.platform}); --dry-run tries small cases and writes nothing"
        )
    words = [word for text in flags.only for word in text.split()]
    size = "small" if flags.dry_run else "full"
    cases = [c for c in all_cases() if c.size == size and c.tiles and all(word in c.name for word in words)]
    found = tune(cases, "mosaic", flags.gain, flags.calls, time.monotonic() + 60 * flags.minutes)
    if not flags.dry_run:
        write(found, where.kind, tables.TUNING)
    return 0


def tune(cases: list[Case], implementation: str, gain: float, calls: int, end: float) -> Found:
    """The parameters that beat those in force, by program and class."""
    found: Found = {}
    for case in sorted(cases, key=lambda c: -c.flops):
        keys = jax.random.split(jax.random.key(0), sets_for(bytes_of(case.arguments)))
        sets = [case.make(key) for key in keys]
        try:
            wanted, first, watch = attempt(case, implementation, sets, {}, None, calls)
        except (ConfigError, *FAILURES) as error:  # the other cases are still worth their time
            print(f"{case.name}: {str(error).splitlines()[0]}", flush=True)
            continue
        assert first is not None
        print(f"{case.name}: {first:.4f} ms", flush=True)
        for program, candidates in case.tiles.items():
            shape_class = watch.programs.get(program)
            if shape_class is None or (program, shape_class) in found:
                continue  # not asked for by this case, or decided by one with more operations
            best = (first * (1 - gain), None)
            for tiles in candidates:
                if time.monotonic() > end:
                    print("  time is up", flush=True)
                    return found
                try:
                    _, spent, _ = attempt(case, implementation, sets, {program: tiles}, wanted, calls)
                except FAILURES as error:
                    print(f"  {program} {dict(tiles)}: {str(error).splitlines()[0][:120]}", flush=True)
                    continue
                told = "WRONG" if spent is None else f"{spent:.4f} ms"
                print(f"  {program} {dict(tiles)}: {told}", flush=True)
                if spent is not None and spent < best[0]:
                    best = (spent, tiles)
            if best[1] is not None:
                found[program, shape_class] = (case.flops, best[1])
    return found


def attempt(
    case: Case,
    implementation: str,
    sets: list[tuple],
    instead: Mapping[str, Tiles],
    wanted: Any,
    calls: int,
) -> tuple[Any, float | None, tables.Watch]:
    """A case with these parameters: its result, milliseconds (None: not `wanted`), and what the trace asked for."""
    with tables.watching(instead) as watch:
        # A function of its own, so that nothing traced before is taken.
        compiled = jax.jit(functools.partial(case.function, implementation=implementation)).lower(*sets[0])
    run = compiled.compile()
    if wanted is not None:
        poison(wanted)
    result = jax.device_get(run(*sets[0]))
    if wanted is not None and not error_of(result, wanted) <= case.bound:
        return result, None, watch
    return result, timed(run, sets, calls).median, watch


def write(found: Found, family: str, path: Path) -> None:
    """Merge into the table."""
    table = json.loads(path.read_text(encoding="utf-8"))
    for (program, shape_class), (_, tiles) in found.items():
        table.setdefault(family, {}).setdefault(program, {})[shape_class] = dict(tiles)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(found)} entries for {family} written to {path.name}")


if __name__ == "__main__":
    run_main(main)
