"""A process for tests: it joins the others as train.py does, then does what it is told."""

from __future__ import annotations

import os
import sys
import time

from dsv3_jax.config import DistributedConfig
from dsv3_jax.errors import ConfigError, run_main
from dsv3_jax.launch import detect, joined, supervised_command, watch
from dsv3_jax.launch.local import SUPERVISED


def refuse() -> str:
    raise ConfigError("no such thing")


def main() -> int:
    job, address, index, patience = sys.argv[1:]
    cfg = DistributedConfig(
        coordinator_address=address,
        num_processes=2,
        process_id=int(index),
        heartbeat_timeout_seconds=3,
        initialization_timeout_seconds=int(patience),
    )
    member = detect(cfg, {})
    assert member is not None
    if SUPERVISED not in os.environ:
        return watch([supervised_command(__file__, sys.argv[1:], member, os.environ)])
    with joined(member, cfg):
        from dsv3_jax.parallel import barrier, from_first

        barrier("start")
        if job == f"kill {index}":
            time.sleep(1)
            os.kill(os.getpid(), 9)
        if job == "refuse":
            from_first("thing", refuse)
        if job == "agree":
            told = from_first("thing", lambda: [os.getpid(), "ü"])
            assert isinstance(told[0], int) and told[1] == "ü" and (told[0] == os.getpid()) == (index == "0")
            return 0
        time.sleep(60)
    return 0


if __name__ == "__main__":
    run_main(main)
