"""Train a model: `python train.py --config configs/tiny.yaml [--run.dir DIR] [--section.key VALUE ...]`.

Started again on the same folder it resumes. `--help` lists every key. On many hosts the same command is started on
each of them (docs/training.md); `--launch local:N` starts N processes on this machine.
With `--dry-run [--devices N] [--hardware h100] [--output FILE]` the step is planned and compiled on simulated devices;
nothing is trained or written to a run folder.
"""

from __future__ import annotations

import os
import sys

from dsv3_jax.cli import parse_run_config
from dsv3_jax.errors import run_main
from dsv3_jax.launch import (
    detect,
    follow_parent,
    joined,
    local_commands,
    supervised_command,
    take_launch,
    watch,
)
from dsv3_jax.launch.local import SUPERVISED
from dsv3_jax.planning.command import dry_run, take_options


def main() -> int:
    """Parse, build, run; the exit code."""
    follow_parent()
    plan, arguments = take_options(sys.argv[1:])
    if plan is not None:
        return dry_run(plan, arguments)
    arguments, processes = take_launch(arguments)
    cfg = parse_run_config(arguments)
    if processes is not None:
        return watch(local_commands(__file__, arguments, processes, os.environ))
    member = detect(cfg.distributed, os.environ)
    if member is not None and SUPERVISED not in os.environ:
        return watch([supervised_command(__file__, arguments, member, os.environ)])
    with joined(member, cfg.distributed):
        from dsv3_jax.training.trainer import train  # late: a wrong flag is told without waiting for JAX

        return train(cfg)


if __name__ == "__main__":
    run_main(main)
