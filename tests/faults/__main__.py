"""Hurts real runs and says what came of it: `python -m tests.faults [--full] [--seed N] [--output DIR]`.

Without --full a sample of about two minutes; with it at least 15 kills, 500 damaged steps, 10 SIGTERM, 10 full disks.
--parts damage kill ... runs some of it. Writes faults.json (the other parts of one that is there are kept) and exits 1
if anything was lost, torn or not found.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before jax: two devices, and a cache so that restarts do not compile again
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

from benchmarks.common import environment
from dsv3_jax.checkpoint import step_folder, steps_of
from dsv3_jax.errors import storage_error
from dsv3_jax.training.metrics import read_metrics
from dsv3_jax.training.restore import newest_good_step
from dsv3_jax.training.trainer import train
from tests.faults import inject, runs

Result = dict[str, Any]
PARTS = ("kill", "sigterm", "damage", "not_finite", "full_disk", "small_disk")


def damage_trial(whole: Path, run: Path, rng: random.Random, kind: str) -> Result:
    """Damage the newest step (sometimes the one before as well) of a copy; is the newest good one found?"""
    steps = steps_of(whole)
    hurt = steps[-1:] if rng.random() < 0.75 else steps[-2:]
    for step in steps[-1 - len(hurt) :]:
        inject.link_copy(step_folder(whole, step), step_folder(run, step))
    done = [inject.damage(step_folder(run, step), kind, rng) for step in hurt]
    found = newest_good_step(run, lambda _: None)
    aside = sorted(path.name for path in (run / "checkpoints").glob("*.corrupt"))
    right = found == steps[-1 - len(hurt)] and aside == sorted(f"{step}.corrupt" for step in hurt)
    shutil.rmtree(run)
    return {"done": done, "found": found, "right": right}


def damages(whole: Path, work: Path, rng: random.Random, count: int) -> Result:
    """`count` damaged copies, every kind as often as the others."""
    kinds, wrong = Counter[str](), []
    for number in range(count):
        kind = inject.DAMAGES[number % len(inject.DAMAGES)]
        trial = damage_trial(whole, work / f"damage-{number}", rng, kind)
        kinds[kind] += 1
        if not trial["right"]:
            wrong.append(trial)
        if (number + 1) % 84 == 0:
            print(f"damage: {number + 1} of {count}, {len(wrong)} wrong", flush=True)
    return {
        "trials": count,
        "kinds": dict(kinds),
        "found_and_right_step_used": count - len(wrong),
        "wrong": wrong,
    }


def kills(data: Path, whole: Path, work: Path, rng: random.Random, rounds: int, first_s: float) -> Result:
    """Runs that are killed at each moment in turn, then finished and compared."""
    found, different = [], []
    for number in range(rounds):
        cfg = runs.config(data, work / f"killed-{number}")
        moments = list(runs.MOMENTS)
        rng.shuffle(moments)
        found += [runs.kill_once(cfg, moment, rng, first_s) for moment in moments]
        last = runs.Started(cfg)
        code = last.end()
        run = Path(str(cfg.run.dir))
        problems = runs.differences(run, whole) if code == 0 else [f"exit {code}: {last.lines[-3:]}"]
        different += problems + [f"left: {name}" for name in runs.leftovers(run)]
        print(f"kills: round {number + 1} of {rounds}, {len(different)} differences", flush=True)
    return {
        "kills": sum(one["killed"] for one in found),
        "ended_before_the_kill": sum(not one["killed"] for one in found),
        "by_moment": dict(Counter(one["moment"] for one in found if one["killed"])),
        "left_by_a_writer": sum("writing" in one["left"] for one in found),
        "left_by_a_deletion": sum("removed" in one["left"] for one in found),
        "torn_steps": [problem for one in found for problem in one["torn"]],
        "finished_runs": rounds,
        "differences": different,
        "each": [{key: one[key] for key in ("moment", "delay_s", "left", "steps")} for one in found],
    }


def terms(data: Path, whole: Path, work: Path, rng: random.Random, count: int, run_s: float) -> Result:
    """SIGTERM at random times of a run; it must save and exit 0 each time, and end with the same bits."""
    codes, torn, stopped, number = [], [], 0, 0
    different: list[str] = []
    while stopped < count:
        cfg = runs.config(data, work / f"terminated-{number}")
        run, number = Path(str(cfg.run.dir)), number + 1
        for share in (0.6, 0.4):  # of the time a whole run takes: most are still running then
            started = runs.Started(cfg)
            started.until(lambda started=started: any("compiling the step" in x for x in started.lines))  # type: ignore[misc]
            wait = time.monotonic() + rng.random() * share * run_s
            started.until(lambda wait=wait: time.monotonic() > wait)  # type: ignore[misc]
            alive = started.process.poll() is None
            codes.append(started.end(signal.SIGTERM if alive else None))
            stopped += alive
            torn += runs.torn_steps(run)
            different += [f"left: {name}" for name in runs.leftovers(run)]
        last = runs.Started(cfg)
        codes.append(last.end())
        different += runs.differences(run, whole)
        print(f"SIGTERM: {stopped} of {count}, exit codes {sorted(set(codes))}", flush=True)
    return {
        "signals": stopped,
        "exit_codes": dict(Counter(codes)),
        "torn_steps": torn,
        "differences": different,
    }


def full_disks(data: Path, whole: Path, work: Path, rng: random.Random, count: int) -> Result:
    """A disk that is full from a random write of a chunk on (injected at os.pwrite), then has room again."""
    refused, wrong, different = 0, [], []
    last = step_folder(whole, runs.STEPS)
    chunks = sum(
        1 for part in ("weights", "optimizer") for path in (last / part).rglob("c*") if path.is_file()
    )
    for number in range(count):
        run = work / f"full-{number}"
        after = rng.randrange(4 * chunks)
        try:
            with inject.FullDisk(after) as disk:
                train(runs.config(data, run))
            wrong.append(f"write {after}: no error")
        except OSError as error:
            if storage_error(error) is None:
                raise
            refused += 1
        want = list(range(runs.EVERY, runs.STEPS + 1, runs.EVERY))[: after // chunks][-3:]
        if steps_of(run) != want or runs.leftovers(run) or runs.torn_steps(run):
            wrong.append(
                f"write {after}: {disk.writes=} {steps_of(run)}, {want} expected; {runs.leftovers(run)}"
            )
        assert train(runs.config(data, run)) == 0
        different += runs.differences(run, whole)
        print(f"full disk: {number + 1} of {count}", flush=True)
    return {
        "how": "os.pwrite of the chunk writer fails with ENOSPC after half of the bytes, from a random write on",
        "trials": count,
        "ended_as_storage_error": refused,
        "wrong": wrong,
        "differences": different,
    }


def small_disk(data: Path, work: Path) -> Result:
    """A real file system of limited size (tmpfs), where it may be mounted; exit codes of the command itself."""
    mount = work / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(mount)], capture_output=True, text=True
    )
    if done.returncode:
        return {"ran": False, "why": done.stderr.strip()}
    try:
        cfg = runs.config(data, mount / "run", keep=0)
        started = runs.Started(cfg)
        code = started.end()
        run = Path(str(cfg.run.dir))
        return {
            "ran": True,
            "how": "tmpfs of 6 MiB, checkpoint.keep 0",
            "exit_code": code,
            "message": next((x for x in reversed(started.lines) if x.startswith("error")), ""),
            "steps": steps_of(run),
            "torn_steps": runs.torn_steps(run),
            "left": runs.leftovers(run),
        }
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def not_finite(data: Path, work: Path) -> Result:
    """NaN and infinity in warm-up (2), later (20) and in a step that is saved (21); restarted before the end."""
    found: Result = {}
    for name, value in (("nan", float("nan")), ("inf", float("inf"))):
        run, again = work / f"poisoned-{name}", work / f"poisoned-{name}-again"
        with inject.not_finite_at((2, 20, 21), value):
            assert train(runs.config(data, run)) == 0
        skipped = [one["step"] for one in read_metrics(run / "metrics.jsonl") if one["skipped"]]
        finite = all(
            inject.all_finite(_floats(path))
            for step in steps_of(run)
            for path in step_folder(run, step).rglob("c.*")
            if path.is_file()
        )
        shutil.copytree(run, again)
        shutil.rmtree(step_folder(again, runs.STEPS))
        assert train(runs.config(data, again)) == 0
        found[name] = {
            "injected": [2, 20, 21],
            "not_applied": skipped,
            "all_saved_values_finite": finite,
            "differences_after_restart": runs.differences(again, run),
        }
    return found


def _floats(path: Path) -> Any:
    import numpy as np

    return np.fromfile(path, np.float32)


def problems_in(result: Result) -> list[str]:
    """Everything in a result that should be empty and is not."""
    found = []
    for part, values in result.items():
        if isinstance(values, dict):
            found += [
                f"{part}.{key}: {value}"
                for key, value in values.items()
                if key in ("wrong", "differences", "torn_steps", "differences_after_restart", "left")
                and value
            ]
            found += [f"{part}.{problem}" for problem in problems_in(values)]
    codes = result.get("sigterm", {}).get("exit_codes", {})
    found += [f"sigterm exit codes {codes}"] if set(codes) - {0} else []
    small = result.get("small_disk", {})
    found += [f"small disk: {small}"] if small.get("ran") and small["exit_code"] != 74 else []
    return found


def main() -> int:
    """Run it all; 1 when anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, default=None, help="folder for faults.json")
    arguments = parser.parse_args()
    began = time.monotonic()
    scale = {"kill": 6, "damage": 504, "sigterm": 10, "full_disk": 10} if arguments.full else {}
    parts: Result = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(work / "compiled"))
        data, whole = runs.make_data(work / "data"), work / "whole"
        for _ in range(2):  # the second finds the step compiled, as the restarts do
            shutil.rmtree(whole, ignore_errors=True)
            started = runs.Started(runs.config(data, whole))
            first_s = runs.seconds_to_first_step(started)
            begun = time.monotonic()
            assert started.end() == 0, started.lines[-20:]
            run_s = first_s + time.monotonic() - begun
        for part in arguments.parts:
            rng = random.Random(f"{arguments.seed} {part}")
            count = scale.get(part, {"damage": 70}.get(part, 2))
            began_part = time.monotonic()
            parts[part] = {
                "damage": lambda rng=rng, n=count: damages(whole, work, rng, n),
                "not_finite": lambda: not_finite(data, work),
                "full_disk": lambda rng=rng, n=count: full_disks(data, whole, work, rng, n),
                "small_disk": lambda: small_disk(data, work),
                "kill": lambda rng=rng, n=count: kills(data, whole, work, rng, n, first_s),
                "sigterm": lambda rng=rng, n=count: terms(data, whole, work, rng, n, run_s),
            }[part]()
            parts[part]["seconds"] = round(time.monotonic() - began_part)
            print(f"{part}: done in {parts[part]['seconds']} s", flush=True)
    file = None if arguments.output is None else arguments.output / "faults.json"
    old = json.loads(file.read_text()) if file is not None and file.is_file() else {}
    result: Result = {
        "environment": environment(),
        "full": arguments.full,
        "seed": arguments.seed,
        "run": f"{runs.STEPS} steps on two simulated devices, a checkpoint every {runs.EVERY}",
        **{part: parts.get(part, old.get(part)) for part in PARTS if part in parts or part in old},
    }
    result["seconds_of_last_call"] = round(time.monotonic() - began)
    result["problems"] = problems_in(result)
    text = json.dumps(result, indent=1)
    print(text)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
