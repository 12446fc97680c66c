"""FP8 training against float32 and bfloat16: the loss curve of the demo model, `python -m benchmarks.fp8_training`.

Trains configs/tiny.yaml on real text (Python's documentation) with the same seed, so the same first weights and rows,
once for each way of computing products, and writes benchmarks/results/fp8_training.json: losses, and how far each curve
is from float32's (means of 20 steps). The V3 report (section 3.3) has less than 0.25 % against bfloat16.

  --steps N   (300)
  --runs DIR  keep the run folders there, and take those that are whole already
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, environment, write

WAYS = {
    "float32": [],
    "bfloat16": ["--model.dtype", "bfloat16"],
    "fp8": ["--training.products", "fp8"],
    "fp8, bfloat16 elsewhere": ["--training.products", "fp8", "--model.dtype", "bfloat16"],
}
WINDOW = 20


def main() -> int:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--runs", type=Path)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = flags.runs or Path(folder)
        curves = {way: curve(runs / name_of(way), more, flags.steps) for way, more in WAYS.items()}
    result = {
        "environment": environment(),
        "config": "configs/tiny.yaml",
        "steps": flags.steps,
        "window": WINDOW,
    }
    write("fp8_training", result | {"runs": compared(curves)})
    for way, row in compared(curves).items():
        print(f"{way}: last {row['last']:.4f}, held out {row['held_out']:.4f}, off {row['off']}", flush=True)
    return 0


def name_of(way: str) -> str:
    """The folder of a way's run."""
    return way.replace(", ", "-").replace(" ", "-")


def curve(folder: Path, more: list[str], steps: int) -> dict[str, Any]:
    """Losses of every step and the last held-out loss of a run, which is made unless the folder has it whole."""
    lines = _metrics(folder)
    if len([line for line in lines if "ce_loss" in line]) < steps:
        command = [sys.executable, "train.py", "--config", "configs/tiny.yaml", "--run.dir", str(folder)]
        command += ["--training.steps", str(steps), "--checkpoint.every", str(steps), *more]
        subprocess.run(command, cwd=RESULTS.parents[1], check=True)
        lines = _metrics(folder)
    losses = {line["step"]: line["ce_loss"] for line in lines if "ce_loss" in line}
    return {"losses": [losses[n] for n in range(1, steps + 1)], "held_out": held_out(lines)}


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def held_out(lines: list[dict[str, Any]]) -> float:
    """The last held-out loss, nats a token."""
    return [line["val_loss"] for line in lines if "val_loss" in line][-1]


def smooth(losses: list[float]) -> np.ndarray:
    """Means of WINDOW steps, the first of which ends at step WINDOW."""
    return np.convolve(losses, np.full(WINDOW, 1 / WINDOW), mode="valid")


def compared(curves: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every tenth loss, and relative differences of the smoothed curve to float32's: mean, largest, at the end."""
    base = smooth(curves["float32"]["losses"])
    rows = {}
    for way, one in curves.items():
        off = smooth(one["losses"]) / base - 1
        rows[way] = {
            "losses_every_10": [round(x, 4) for x in one["losses"][9::10]],
            "last": round(float(smooth(one["losses"])[-1]), 5),
            "held_out": round(one["held_out"], 5),
            "off": {
                "mean": round(float(off.mean()), 5),
                "mean_absolute": round(float(np.abs(off).mean()), 5),
                "largest": round(float(np.abs(off).max()), 5),
                "last": round(float(off[-1]), 5),
                "held_out": round(one["held_out"] / curves["float32"]["held_out"] - 1, 5),
            },
        }
    return rows


if __name__ == "__main__":
    sys.exit(main())
