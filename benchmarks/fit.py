"""Will it fit? Peak memory of a training step by the planner's model, nothing compiled: `python -m benchmarks.fit`.

Three models on the mesh presets, one sequence of 4,096 tokens a device and micro-batch, bfloat16 with float32 master
weights and the config's optimiser. Seconds of work, no accelerator.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from benchmarks.common import environment, write
from dsv3_jax.cli import load_run_config
from dsv3_jax.config import MESH_PRESETS, MeshConfig, RunConfig
from dsv3_jax.planning.hardware import HARDWARE, USABLE
from dsv3_jax.planning.memory import abstract_mesh, memory

CONFIGS = Path(__file__).parent.parent / "configs"
MODELS = {
    "V2-Lite (15.7B)": "deepseek-v2-lite.yaml",
    "Moonlight (16B)": "moonlight-16b-a3b.yaml",
    "V3 (671B)": "deepseek-v3.yaml",
}
GPUS = ("h100", "h200", "b200")
LENGTH = 4096


def run_config(cfg: RunConfig, preset: str, remat: str, accumulate: int) -> RunConfig:
    """The run of a row: a sequence a device and micro-batch."""
    devices = 1
    for size in MESH_PRESETS[preset].values():
        devices *= size
    training = dataclasses.replace(
        cfg.training, batch_size=devices * accumulate, seq_len=LENGTH, accumulate=accumulate, remat=remat
    )
    return dataclasses.replace(cfg, training=training, mesh=MeshConfig(preset=preset))


def row(name: str, cfg: RunConfig, preset: str) -> dict[str, Any]:
    """Peaks of one model on one preset, and the least recomputation that fits each GPU."""
    mesh = abstract_mesh(MESH_PRESETS[preset])
    peaks = {
        f"{remat}, {accumulate}": memory(run_config(cfg, preset, remat, accumulate), mesh)
        for remat in ("none", "latents", "full")
        for accumulate in (1, 8)
    }
    least = {}
    for gpu in GPUS:
        usable = HARDWARE[gpu].memory * USABLE
        least[gpu] = {
            accumulate: next(
                (
                    remat
                    for remat in ("none", "latents", "full")
                    if peaks[f"{remat}, {accumulate}"].peak <= usable
                ),
                None,
            )
            for accumulate in (1, 8)
        }
    one = peaks["full, 1"]
    devices = 1
    for size in MESH_PRESETS[preset].values():
        devices *= size
    return {
        "model": name,
        "preset": preset,
        "mesh": MESH_PRESETS[preset],
        "devices": devices,
        "state": one.parameters + one.optimizer + one.other,
        "peaks": {key: {"peak": need.peak, "phase": need.phase} for key, need in peaks.items()},
        "least_remat": {gpu: {str(n): remat for n, remat in by.items()} for gpu, by in least.items()},
    }


def main() -> None:
    """Write results/fit.json."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    result: dict[str, Any] = {"environment": environment(), "seq_len": LENGTH, "usable": USABLE, "rows": []}
    for name, file in MODELS.items():
        cfg = load_run_config(CONFIGS / file)
        for preset in MESH_PRESETS:
            result["rows"].append(row(name, cfg, preset))
            one = result["rows"][-1]
            full = one["peaks"]["full, 1"]["peak"] / 1e9
            print(f"{name:16} {preset:8} state {one['state'] / 1e9:8.1f} GB  full, 1: {full:8.1f} GB")
    print("written:", write("fit", result))


if __name__ == "__main__":
    main()
