"""Evaluate a checkpoint on texts, questions and code.

python -m dsv3_jax.evaluation --checkpoint runs/demo --tasks perplexity:held_out.txt,multiple_choice:questions.jsonl
python -m dsv3_jax.evaluation --checkpoint runs/demo --tasks humaneval --run-code --quantize int4:64 --out int4.json
"""

from __future__ import annotations

import tyro

from dsv3_jax.errors import run_main
from dsv3_jax.evaluation.flags import Flags


def main() -> int:
    """Parse and run; returns the exit code."""
    flags = tyro.cli(Flags, prog="python -m dsv3_jax.evaluation", config=(tyro.conf.FlagCreatePairsOff,))
    from dsv3_jax.evaluation.command import evaluate  # after the flags: imports take seconds

    return evaluate(flags)


if __name__ == "__main__":
    run_main(main)
