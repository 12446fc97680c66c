"""Speed on one GPU: `python -m benchmarks.gpu [--only WORD] [--record]`.

Every kernel first shows that it is right (fresh random inputs, poisoned memory), then is timed with inputs that change
from call to call, beside the other implementations, torch, and the copy and product ceilings of the same run. Then FP8
products against bfloat16, products of decoding with quantised weights against their bytes, the train step of a
1.75e9-parameter model against transformers, and decoding of a 16B-A3B model.
The result file is written after every case, so that a run that is cut keeps what it has.

  --only WORD   tables (ceilings, kernels, fp8, quantized, train, decode) or cases that have all these words
  --minutes N   of a table, after which no further case is begun (8)
  --record      write kernels/verified.json: classes of shapes that "auto" may give to a kernel on this device
  --dry-run     everything once at tiny shapes, also on a CPU; writes nothing unless --output says where
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.common import RESULTS, environment
from benchmarks.gpu import decode, fp8, quantized, train
from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.kernels import lines, run_case, shown_correct
from dsv3_jax.errors import ConfigError, run_main
from dsv3_jax.kernels import shim, tables
from dsv3_jax.kernels.cases import all_cases

TABLES = ("ceilings", "kernels", "fp8", "quantized", "train", "decode")


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", action="append", default=[], metavar="WORD")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--output", type=Path)
    flags = parser.parse_args()
    where = shim.target()
    if not flags.dry_run and where.platform != "gpu":
        raise ConfigError(
            f"no GPU here (platform {where.platform}); --dry-run runs everything at tiny shapes"
        )
    if flags.record and flags.dry_run:
        raise ConfigError("--record needs a run on a GPU, not --dry-run")
    output = flags.output or (None if flags.dry_run else RESULTS / f"gpu-{where.kind.lower()}.json")
    result = measure(flags.only, flags.minutes, flags.dry_run, output)
    if flags.record:
        record(result)
    wrong = wrong_ones(result)
    print(f"{len(wrong)} wrong: {', '.join(wrong)}" if wrong else "none wrong")
    return 1 if wrong else 0


def wrong_ones(result: dict[str, Any]) -> list[str]:
    """What was not within its bound, or failed on the device, in the tables that compare results."""
    rows = [
        (f"{row['kernel']} {row['program']} {row['shape']}", row["implementations"])
        for row in result.get("kernels", [])
    ]
    for table in ("fp8", "quantized"):
        rows += [
            (" ".join([table, row["shape"], *filter(None, [row.get("format")])]), row["by"])
            for row in result.get(table, [])
        ]
    return [f"{title} {name}" for title, by in rows for name, one in by.items() if one.get("right") is False]


def measure(only: list[str], minutes: float, small: bool, output: Path | None) -> dict[str, Any]:
    """The chosen tables; written to `output` as they grow."""
    words = [word for text in only for word in text.split()]
    asked = [table for table in TABLES if table in words] or list(TABLES)
    words = [word for word in words if word not in TABLES]
    if words and "kernels" in asked and len(asked) == len(TABLES):
        asked = ["ceilings", "kernels"]
    result: dict[str, Any] = {"environment": environment() | device(), "dry_run": small}

    def keep() -> None:
        if output is not None:
            output.write_text(json.dumps(result, indent=1) + "\n")

    peaks = result["ceilings"] = ceilings(small)
    print(f"copy {peaks['bytes_per_s'] / 1e12:.3f} TB/s, product {peaks['flops_per_s'] / 1e12:.1f} TFLOP/s")
    keep()
    kernels = ("reference", "auto", "mosaic")
    if "kernels" in asked:
        cases = [c for c in all_cases() if c.size == ("small" if small else "full")]
        cases = [c for c in cases if all(word in c.name for word in words)]
        result["kernels"], result["not_begun"] = [], []
        seed = time.time_ns() % (1 << 31)
        end = time.monotonic() + 60 * minutes
        for case in cases:
            if time.monotonic() > end:
                result["not_begun"].append(case.name)
                continue
            row = run_case(case, seed, 3 if small else 20, peaks, with_rivals=True)
            result["kernels"].append(row)
            print("\n".join(lines(row)), flush=True)
            keep()
    if "fp8" in asked:
        result["fp8"] = fp8.run(small, 3 if small else 20)
        print(fp8.lines(result["fp8"]), flush=True)
        keep()
    if "quantized" in asked:
        result["quantized"] = quantized.measure(small, 3 if small else 20, peaks)
        print(quantized.lines(result["quantized"]), flush=True)
        keep()
    if "train" in asked:
        result["train"] = train.run(small, kernels, 2 if small else 10)
        print(json.dumps(result["train"], indent=1), flush=True)
        keep()
    if "decode" in asked:
        result["decode"] = decode.run(small, kernels, 2 if small else 10, peaks)
        print(json.dumps(result["decode"], indent=1), flush=True)
        keep()
    return result


def device() -> dict[str, Any]:
    """Which device and driver."""
    one = jax.devices()[0]
    version = getattr(one.client, "platform_version", "")
    return {"device": one.device_kind, "family": shim.target().kind, "driver": version, "pid": os.getpid()}


def record(result: dict[str, Any]) -> None:
    """Add the classes that this run shows correct to kernels/verified.json, and take away those it does not."""
    family, env = result["environment"]["family"], result["environment"]
    table = json.loads(tables.VERIFIED.read_text())
    seen = {
        (kernel, name, shape_class)
        for row in result.get("kernels", [])
        for name, one in row["implementations"].items()
        for kernel, shape_class in one.get("classes", {}).items()
    }
    of_device = table.setdefault(family, {})
    for kernel, name, shape_class in seen:
        of_device.setdefault(kernel, {}).setdefault(name, {}).pop(shape_class, None)
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": env["commit"],
        "jax": env["versions"]["jax"],
        "device": env["device"],
    }
    for kernel, names in shown_correct(result.get("kernels", [])).items():
        for name, classes in names.items():
            for shape_class, entry in classes.items():
                of_device[kernel][name][shape_class] = entry | about
    tables.VERIFIED.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(f"written: {tables.VERIFIED}")


if __name__ == "__main__":
    run_main(main)
