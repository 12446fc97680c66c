"""What a checkpoint costs a training step: `python -m benchmarks.checkpoint [--config FILE] [--saves N]`.

The stall is the time for which a step that is ready to start must wait: the snapshot on the host. Beside it, how long
the background writes, how long a save without a background takes, and how much slower steps are while one is written.
Writes results/checkpoint.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import common
from dsv3_jax.checkpoint import step_folder, steps_of
from dsv3_jax.cli import load_run_config
from dsv3_jax.config import CheckpointConfig, MeshConfig, RunConfig
from dsv3_jax.parallel import make_mesh
from dsv3_jax.training.saving import Saver
from dsv3_jax.training.step import batch_sharding, init_state, make_train_step

INTERVAL = 100  # steps between two saves, for the share


def batch_of(cfg: RunConfig, mesh: jax.sharding.Mesh) -> Any:
    """Full rows of random ids."""
    shape = (cfg.training.batch_size, cfg.training.seq_len)
    ids = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (shape[0], shape[1] + 1), np.int32)
    batch = {
        "tokens_BT": ids[:, :-1],
        "targets_BT": ids[:, 1:],
        "segments_BT": np.ones(shape, np.int32),
        "positions_BT": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    }
    return jax.device_put(batch, batch_sharding(mesh))


def measure(cfg: RunConfig, saves: int, steps: int) -> dict[str, Any]:
    """Seconds of steps and saves."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state, batch = init_state(cfg, mesh), batch_of(cfg, mesh)
    step = jax.jit(make_train_step(cfg, mesh), donate_argnums=0)

    def timed_step(state: Any) -> tuple[Any, float]:
        start = time.perf_counter()
        state, _ = step(state, batch)
        jax.block_until_ready(state)
        return state, time.perf_counter() - start

    state, compile_s = timed_step(state)
    alone: list[float] = []
    for _ in range(steps):
        state, seconds = timed_step(state)
        alone.append(seconds)
    stalls, written, beside, direct = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        for asynchronous in (True, False):
            checkpoint = CheckpointConfig(keep=1, asynchronous=asynchronous)
            saver = Saver(run, RunConfig(model=cfg.model, checkpoint=checkpoint), lambda _: None)
            for _ in range(saves if asynchronous else 2):
                number = (steps_of(run) or [0])[-1] + 1
                start = time.perf_counter()
                saver.save(state, {"step": number}, before=lambda: None)
                called = time.perf_counter() - start
                if not asynchronous:
                    direct.append(called)
                    continue
                stalls.append(called)
                state, seconds = timed_step(state)
                saver.wait()
                written.append(time.perf_counter() - start - called)
                if written[-1] >= seconds:  # it was written for the whole of the step
                    beside.append(seconds)
                state, seconds = timed_step(state)  # as far apart as in a run: not one save after the other
                alone.append(seconds)
        size = sum(
            file.stat().st_size for file in step_folder(run, steps_of(run)[-1]).rglob("*") if file.is_file()
        )
    median = statistics.median
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "checkpoint_bytes": size,
        "first_step_with_compile_s": compile_s,
        "step_s": {"median": median(alone), "min": min(alone), "max": max(alone), "count": len(alone)},
        "stall_s": {"median": median(stalls), "min": min(stalls), "max": max(stalls), "count": len(stalls)},
        "stall_share_of_interval": median(stalls) / (INTERVAL * median(alone)),
        "worst_stall_share_of_interval": max(stalls) / (INTERVAL * median(alone)),
        "interval_steps": INTERVAL,
        "background_s": {"median": median(written), "max": max(written)},
        "step_beside_a_write_s": {"median": median(beside), "count": len(beside)} if beside else None,
        "synchronous_save_s": {"median": median(direct), "count": len(direct)},
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/small-100m.yaml")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    environment = common.environment()
    cfg = load_run_config(arguments.config)
    result = {
        "environment": environment,
        "device": jax.devices()[0].device_kind,
        "config": arguments.config,
        "tokens_a_step": cfg.training.batch_size * cfg.training.seq_len,
        **measure(cfg, arguments.saves, arguments.steps),
    }
    print(common.write("checkpoint", result))


if __name__ == "__main__":
    main()
