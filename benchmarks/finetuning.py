"""LoRA on bases of several formats: bytes and held-out losses, `python -m benchmarks.finetuning --base RUN`.

Trains configs/tiny-lora.yaml (rank 8 on all linear weights) on the source files of Python's standard library, 60 steps
of 1,024 tokens, on the demo's model in float32, int8, FP8 and int4, for each seed; and writes
benchmarks/results/finetuning.json: what a run says of its base, pairs and moments, the same of full training, held-out
losses every 20 steps, and how far each is from the float32 base's with the same seed.

  --seeds N   (2)
  --runs DIR  keep the run folders there, and take those that are whole already
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from benchmarks.common import RESULTS, environment, write

BASES = {"float32": "none", "int8": "int8", "int4:64": "int4:64", "fp8": "fp8"}
STEPS, EVERY = 60, 20
_LINE = re.compile(r"base ([\d.,]+) MiB .*pairs ([\d.,]+) MiB, optimiser ([\d.,]+) MiB")


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--runs", type=Path)
    flags = parser.parse_args()
    weights = _weights_mib(flags.base)
    rows: list[dict[str, Any]] = []
    full = {"weights_mib": weights, "moments_mib": 2 * weights}
    what = {"config": "configs/tiny-lora.yaml", "steps": STEPS, "every": EVERY, "tokens_a_step": 1024}
    result = {"environment": environment(), **what, "full_training": full, "rows": rows}
    with tempfile.TemporaryDirectory() as folder:
        runs = flags.runs or Path(folder)
        for name, rounded in BASES.items():
            ways = [
                run_of(runs / f"{rounded}-{seed}", flags.base, rounded, seed) for seed in range(flags.seeds)
            ]
            losses = np.array([way["losses"] for way in ways])
            rows.append({"base": name, **ways[0]["mib"], "held_out": losses.tolist()})
            off = losses / np.array(rows[0]["held_out"]) - 1
            rows[-1]["off_float32"] = off.tolist()
            print(rows[-1], file=sys.stderr, flush=True)
            write("finetuning", result)  # after each base, so that a run that is cut off leaves what it had


def run_of(folder: Path, base: Path, rounded: str, seed: int) -> dict[str, Any]:
    """Held-out losses of a run every EVERY steps and what it says of its bytes; made unless the folder has it whole."""
    if len(_losses(folder)) < STEPS // EVERY:
        command = [sys.executable, "train.py", "--config", "configs/tiny-lora.yaml", "--run.dir", str(folder)]
        flags = {
            "lora.base": base, "lora.base_quantize": rounded, "data.source": "python-stdlib", "seed": seed,
            "training.steps": STEPS, "training.accumulate": 1, "training.eval_every": EVERY,
            "checkpoint.every": STEPS,
        }  # fmt: skip
        for flag, value in flags.items():
            command += [f"--{flag}", str(value)]
        done = subprocess.run(
            command,
            cwd=RESULTS.parents[1],
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        (folder / "said.txt").write_text(done.stdout)
    found = _LINE.search((folder / "said.txt").read_text())
    assert found is not None, f"{folder}/said.txt tells no bytes"
    base_mib, pairs, moments = (float(x.replace(",", "")) for x in found.groups())
    return {
        "losses": _losses(folder),
        "mib": {"base_mib": base_mib, "pairs_mib": pairs, "moments_mib": moments},
    }


def _losses(folder: Path) -> list[float]:
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [line["val_loss"] for line in lines if "val_loss" in line]


def _weights_mib(base: Path) -> float:
    """Of all weights in float32, which full training holds with two moments each."""
    from dsv3_jax.checkpoint.source import open_source
    from dsv3_jax.model import abstract_variables

    return 4 * open_source(base, abstract_variables).count_parameters() / 2**20


if __name__ == "__main__":
    main()
