"""The balance rule against none, on real text: `python -m benchmarks.balance [--size 10m|100m] [--steps N]`.

Trains configs/balance-SIZE.yaml twice from the same seed on the same batches, with the rule and with its rate set to 0
and nothing else changed, and writes docs/results/balance-SIZE.json and .svg. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import environment
from benchmarks.figures import standalone
from dsv3_jax.cli import load_run_config
from dsv3_jax.config import RunConfig
from dsv3_jax.errors import run_main
from dsv3_jax.training.charts import Series, line_chart, smoothed
from dsv3_jax.training.metrics import Record, read_metrics

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
ARMS = {"with": "with the balance rule", "without": "without"}
CURVES = {
    "balanced_fraction": "Share of experts within ±50 % of their layer's mean load",
    "maxvio": "MaxVio: largest expert load over the mean, minus 1 (mean over layers)",
}
EVERY = 5  # steps between the points kept in the JSON, each the mean of as many steps


def arm_config(cfg: RunConfig, arm: str, steps: int | None, runs: Path) -> RunConfig:
    """The run of an arm; only its folder and the rule's rate differ between arms."""
    rate = cfg.training.balance_update_rate if arm == "with" else 0.0
    training = dataclasses.replace(cfg.training, steps=steps or cfg.training.steps, balance_update_rate=rate)
    run = dataclasses.replace(cfg.run, dir=str(runs / arm))
    return dataclasses.replace(cfg, training=training, run=run)


def curve(records: Sequence[Record], key: str) -> list[float]:
    """A metric over steps, a mean for every `EVERY` of them."""
    values = [record[key] for record in records]
    means = [np.mean(values[at : at + EVERY]) for at in range(0, len(values), EVERY)]
    return [round(float(mean), 4) for mean in means]


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """What the last tenth of a run shows, and its end."""
    tail = records[-max(len(records) // 10, 1) :]

    def mean(key: str) -> float:
        return round(float(np.mean([record[key] for record in tail])), 4)

    return {
        "steps": f"{tail[0]['step']} to {tail[-1]['step']}",
        **{key: mean(key) for key in (*CURVES, "dead_experts", "router_entropy", "ce_loss")},
        "worst_layer_maxvio": round(
            max(float(np.mean(rows)) for rows in zip(*(_maxvio_L(r) for r in tail), strict=True)), 4
        ),
        "val_loss": records[-1].get("val_loss"),
        "minutes": round(sum(record["seconds"] for record in records) / 60, 1),
    }


def _maxvio_L(record: Record) -> np.ndarray:
    counts_LE = np.asarray(record["expert_counts"], float)
    return counts_LE.max(axis=1) / counts_LE.mean(axis=1) - 1.0


def picture(arms: dict[str, Sequence[Record]]) -> str:
    """Both curves of both arms, as one SVG file for light and dark pages."""
    panels = []
    for key, title in CURVES.items():
        series = []
        for color, (arm, records) in enumerate(arms.items(), 1):
            steps = [record["step"] for record in records]
            values = [record[key] for record in records]
            series.append(Series(ARMS[arm], steps, values, color, faint=True))
            series.append(Series(ARMS[arm], steps, smoothed(values, 15), color))
        panels.append((title, line_chart(series, zero=True)))
    return standalone(panels, [(ARMS[arm], color) for color, arm in enumerate(arms, 1)])


def main() -> int:
    """Run both arms, write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.balance", description=__doc__)
    parser.add_argument("--steps", type=int, help="of each arm (default: the config's)")
    parser.add_argument("--size", choices=("10m", "100m"), default="10m")
    parser.add_argument("--runs", type=Path, help="folder of the two runs (default: runs/balance-SIZE)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where JSON and SVG go")
    arguments = parser.parse_args(sys.argv[1:])
    from dsv3_jax.training.trainer import train

    name = f"balance-{arguments.size}"
    runs = arguments.runs or ROOT / "runs" / name
    arms, cfg = {}, load_run_config(ROOT / "configs" / f"{name}.yaml")
    for arm in ARMS:
        code = train(arm_config(cfg, arm, arguments.steps, runs))
        records = read_metrics(runs / arm / "metrics.jsonl")
        if code or records[-1]["step"] < (arguments.steps or cfg.training.steps):
            return code or 1  # stopped by a signal: start again to go on
        arms[arm] = records
    result = {
        "command": f"python -m benchmarks.balance --size {arguments.size}",
        "environment": environment(),
        "config": f"{name}.yaml",
        "seed": cfg.seed,
        "tokens": arms["with"][-1]["tokens"],
        "balance_update_rate": cfg.training.balance_update_rate,
        "arms": {arm: summary(records) for arm, records in arms.items()},
        "every": EVERY,
        "curves": {arm: {key: curve(records, key) for key in CURVES} for arm, records in arms.items()},
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.results / f"{name}.svg").write_text(picture(arms))
    print(json.dumps(result["arms"], indent=1))
    return 0


if __name__ == "__main__":
    run_main(main)
