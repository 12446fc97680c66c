"""Hurts live servers and says what came of it: `python -m tests.serving [--full] [--seed N] [--output DIR]`.

Every trial runs against the command itself over a tiny checkpoint made here (random weights, the real engine). Without
--full a sample of about a minute; with it 5,000 requests of the fuzzer, 200 disconnects, 64 clients for two minutes, 5
times SIGTERM under load. --parts corpus fuzz ... runs some of it. Writes serving.json (other parts of one that is there
are kept) and exits 1 if anything was lost, wrong or found.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before jax
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

from benchmarks.common import environment
from tests.inference import tiny
from tests.serving import fake, fuzz, trials

Result = dict[str, Any]
PARTS = ("corpus", "fuzz", "disconnects", "load", "sigterm")
MODEL = "tiny"
FLAGS = "--port 0 --page-size 16 --prefill-tiles 4 --tile 8 --max-queue 200 --model-id tiny".split()
FLAGS += ["--max-reserved-tokens", "100000"]


@contextmanager
def server(checkpoint: Path, *flags: str) -> Iterator[fake.Process]:
    """The command, with eight rows and a queue for every client of a trial."""
    command = [sys.executable, "-m", "dsv3_jax.serving", "--checkpoint", str(checkpoint), *FLAGS, *flags]
    process = fake.Process(command)
    try:
        yield process
    finally:
        process.close()


def corpus_part(checkpoint: Path, full: bool, seed: int) -> tuple[Result, bool]:
    """The raw bytes; several times over when in full."""
    with server(checkpoint, "--rows", "8", "--read-timeout", "1.0", "--model-id", "fake") as process:
        rounds = [trials.corpus_trial(process) for _ in range(3 if full else 1)]
    found = {
        "cases": rounds[0]["cases"],
        "rounds": len(rounds),
        "statuses": rounds[0]["statuses"],
        "growth_mib_by_round": [one["growth_mib"] for one in rounds],
        "healthy_after": all(one["healthy_after"] for one in rounds),
        "findings": {name: told for one in rounds for name, told in one["findings"].items()},
    }
    return found, found["healthy_after"] and not found["findings"]


def fuzz_part(checkpoint: Path, full: bool, seed: int) -> tuple[Result, bool]:
    """Schemathesis on every route."""
    with server(checkpoint, "--rows", "8") as process:
        found = fuzz.fuzz(process.url, 5000 if full else 150, seed, MODEL)
        found["seconds_until_idle"] = round(trials.seconds_until_idle(process), 3)
    return found, not found["findings"]


def disconnects_part(checkpoint: Path, full: bool, seed: int) -> tuple[Result, bool]:
    """Clients that leave."""
    with server(checkpoint, "--rows", "8", "--no-prefix-cache") as process:
        found = trials.disconnect_trial(process, 200 if full else 40, seed)
    return found, True  # it raises when pages stay away


def load_part(checkpoint: Path, full: bool, seed: int) -> tuple[Result, bool]:
    """A crowd that asks without pause."""
    with server(checkpoint, "--rows", "16") as process:
        found = trials.load_trial(process, MODEL, clients=64, seconds=120 if full else 8, seed=seed)
    return found, not found["wrong"] and not found["lost"]


def sigterm_part(checkpoint: Path, full: bool, seed: int) -> tuple[Result, bool]:
    """An end under load."""
    rounds = []
    for number in range(5 if full else 1):
        with server(checkpoint, "--rows", "1") as process:
            rounds.append(trials.sigterm_trial(process, count=20 + 8 * number, tokens=200))
    return {"rounds": rounds}, all(map(trials.ended_well, rounds))


RUN = {
    "corpus": corpus_part,
    "fuzz": fuzz_part,
    "disconnects": disconnects_part,
    "load": load_part,
    "sigterm": sigterm_part,
}


def main() -> int:
    """Run the parts; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.serving", description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the fuzzer's own
    path = args.output / "serving.json"
    results: Result = json.loads(path.read_text()) if path.is_file() else {}
    bad = []
    with tempfile.TemporaryDirectory() as work:
        checkpoint = tiny.save(Path(work))
        for part in args.parts:
            began = time.monotonic()
            found, right = RUN[part](checkpoint, args.full, args.seed)
            seconds = round(time.monotonic() - began, 1)
            results[part] = {
                "right": right,
                "full": args.full,
                "seed": args.seed,
                "part_seconds": seconds,
                **found,
            }
            print(
                f"{part}: {'right' if right else 'WRONG'} in {seconds} s: {json.dumps(found)[:600]}",
                flush=True,
            )
            bad += [] if right else [part]
            results["environment"] = environment()
            args.output.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{path}: {'all right' if not bad else 'wrong: ' + ', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
