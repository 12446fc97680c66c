"""Decode prompts with a DeepSeek-family checkpoint: a file of prompts, or one prompt to the terminal.

python infer.py --checkpoint runs/demo --input prompts.jsonl --output results.jsonl
python infer.py --checkpoint runs/demo --prompt "Once upon a time"
"""

from __future__ import annotations

import dataclasses

import tyro

from dsv3_jax.config import parse_kernels
from dsv3_jax.errors import ConfigError, run_main
from dsv3_jax.infer_flags import Flags


def main() -> int:
    """Parse, build, run; returns the exit code."""
    flags = tyro.cli(Flags, prog="infer.py", config=(tyro.conf.FlagCreatePairsOff,))
    if flags.checkpoint is None:
        raise ConfigError("--checkpoint DIR is missing")
    if (flags.prompt is None) == (flags.input is None):
        raise ConfigError("give --input FILE with --output FILE, or --prompt TEXT")
    if (flags.input is None) != (flags.output is None):
        raise ConfigError("--input and --output go together")

    from dsv3_jax.inference.batch import Job, run_file, run_prompt  # after the flags: imports take seconds
    from dsv3_jax.inference.options import Sampling

    sampling = Sampling(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(Sampling)})
    batch_size = flags.batch_size if flags.batch_size is not None else 16 if flags.input else 1
    job = Job(
        flags.checkpoint,
        sampling,
        batch_size,
        flags.dtype,
        flags.force,
        flags.page_size,
        flags.pages,
        parse_kernels(flags.kernels),
        flags.speculative,
        flags.quantize,
        flags.mesh,
        flags.adapter,
        flags.cache_dtype,
        flags.keep_kv_b_codes,
    )
    if flags.input is not None and flags.output is not None:
        return run_file(job, flags.input, flags.output)
    assert flags.prompt is not None
    return run_prompt(job, flags.prompt, lambda text: print(text, end="", flush=True))


if __name__ == "__main__":
    run_main(main)
