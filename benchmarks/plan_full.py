"""Plan the 671B model on 8 to 2,048 simulated devices with the command itself: `python -m benchmarks.plan_full`.

One sequence of 4,096 tokens a device and step. Writes results/plan_full.json (seconds and memory that planning takes,
the plan) and results/scaling.json (bytes a device sends, by kind of collective).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import environment, write

ROOT = Path(__file__).parent.parent
MESHES = {
    8: {"expert": 8},
    64: {"fsdp": 8, "expert": 8},
    256: {"fsdp": 4, "expert": 64},
    2048: {"data": 8, "fsdp": 4, "expert": 64},
}
LIMITS = {"seconds": 300, "bytes": 20e9}


def planned(devices: int, mesh: dict[str, int], hardware: str) -> dict[str, Any]:
    """The plan's JSON and what making it took."""
    axes = {"data": 1, "fsdp": 1, "expert": 1, **mesh}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "plan.json"
        arguments = [
            sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / "configs" / "deepseek-v3.yaml"), "--dry-run",
            f"--devices={devices}", f"--hardware={hardware}", f"--output={output}", "--training.accumulate=1",
            f"--training.batch_size={devices}", *(f"--mesh.{axis}={size}" for axis, size in axes.items()),
        ]  # fmt: skip
        env = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
        start = time.perf_counter()
        child = subprocess.Popen(arguments, env=env, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"planning on {devices} devices failed with exit code {child.returncode}")
        return {
            "seconds": seconds,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_bytes": usage.ru_maxrss * 1024,
            "plan": json.loads(output.read_text()),
        }


def main() -> None:
    """Plan every size, check the limits, write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=list(MESHES), choices=list(MESHES))
    parser.add_argument("--hardware", default="h200")
    args = parser.parse_args()
    result: dict[str, Any] = {"environment": environment(), "limits": LIMITS, "runs": []}
    for devices in args.devices:
        run = planned(devices, MESHES[devices], args.hardware)
        result["runs"].append({"devices": devices, **run})
        print(
            f"{devices:5} devices: {run['seconds']:.0f} s ({run['cpu_seconds']:.0f} s of CPU), "
            f"{run['peak_bytes'] / 1e9:.1f} GB",
            flush=True,
        )
        write("plan_full", result)
        write("scaling", {"environment": result["environment"], "rows": [scaling(r) for r in result["runs"]]})
    slow = [r["devices"] for r in result["runs"] if r["seconds"] > LIMITS["seconds"]]
    large = [r["devices"] for r in result["runs"] if r["peak_bytes"] > LIMITS["bytes"]]
    if slow or large:
        raise SystemExit(f"beyond the limits: seconds on {slow}, memory on {large}")


def scaling(run: dict[str, Any]) -> dict[str, Any]:
    """Bytes a device sends, by kind, and how many of them leave its node."""
    kinds: dict[str, dict[str, int]] = {}
    for row in run["plan"]["collectives"].values():
        kind = kinds.setdefault(row["kind"], {"bytes": 0, "network_bytes": 0})
        for key in kind:
            kind[key] += row[key]
    plan = run["plan"]
    return {
        "devices": run["devices"],
        "mesh": plan["mesh"],
        "kinds": kinds,
        "times": plan["times"],
        "hardware": plan["hardware"],
    }


if __name__ == "__main__":
    main()
