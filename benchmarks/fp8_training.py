"""FP8 training against float32 and bfloat16: the loss curve of the demo model, `python -m benchmarks.fp8_training`.

Trains configs/tiny.yaml on real text (Python's documentation) for several seeds, each with the same first weights and
rows for every way of computing products, and writes benchmarks/results/fp8_training.json: losses, how far each is from
float32's (means of 20 steps), and over the seeds the mean of the differences and their standard error, next to how far
float32 is from itself with other seeds. The V3 report (section 3.3) has less than 0.25 % against bfloat16.

  --steps N   (300)
  --seeds N   (3)
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
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = flags.runs or Path(folder)
        by_seed = [
            {way: curve(runs / name_of(way, seed), more, flags.steps, seed) for way, more in WAYS.items()}
            for seed in range(flags.seeds)
        ]
    result = {
        "environment": environment(),
        "config": "configs/tiny.yaml",
        "steps": flags.steps,
        "window": WINDOW,
        "over_seeds": over_seeds(by_seed),
        "seeds": [compared(curves) for curves in by_seed],
    }
    write("fp8_training", result)
    print(json.dumps(result["over_seeds"], indent=1), flush=True)
    return 0


def name_of(way: str, seed: int) -> str:
    """The folder of a way's run."""
    return way.replace(", ", "-").replace(" ", "-") + f"-{seed}"


def curve(folder: Path, more: list[str], steps: int, seed: int) -> dict[str, Any]:
    """Losses of every step and the last held-out loss of a run, which is made unless the folder has it whole."""
    lines = _metrics(folder)
    if len([line for line in lines if "ce_loss" in line]) < steps:
        command = [sys.executable, "train.py", "--config", "configs/tiny.yaml", "--run.dir", str(folder)]
        command += ["--training.steps", str(steps), "--checkpoint.every", str(steps)]
        command += ["--seed", str(seed), *more]
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


def over_seeds(by_seed: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Relative differences of losses with the same seed, their mean, and the standard error over the seeds.

    "last" is the mean training loss of the last WINDOW steps, "held_out" the held-out loss.
    """
    pairs = [("fp8", "float32"), ("bfloat16", "float32"), ("fp8, bfloat16 elsewhere", "bfloat16")]
    found: dict[str, Any] = {}
    for way, base in pairs:
        rows = {}
        for key, of in (
            ("held_out", lambda one: one["held_out"]),
            ("last", lambda one: smooth(one["losses"])[-1]),
        ):
            rows[key] = spread([of(curves[way]) / of(curves[base]) - 1 for curves in by_seed])
        found[f"{way} against {base}"] = rows
    losses = np.array([curves["float32"]["held_out"] for curves in by_seed])
    found["float32, seeds against their mean"] = {"held_out": spread(list(losses / losses.mean() - 1))}
    return found


def spread(values: list[float]) -> dict[str, Any]:
    """Each, mean, standard deviation and standard error of the mean."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return {
        "each": [round(float(x), 5) for x in values],
        "mean": round(float(np.mean(values)), 5),
        "deviation": round(deviation, 5),
        "standard_error": round(deviation / len(values) ** 0.5, 5),
    }


if __name__ == "__main__":
    sys.exit(main())
