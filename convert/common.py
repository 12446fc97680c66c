"""What the converters share: dtype names, notes for the user, running as a command."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NoReturn

from dsv3_jax.checkpoint import layout
from dsv3_jax.checkpoint.native import copy_files, write_model_config
from dsv3_jax.checkpoint.source import Source
from dsv3_jax.errors import run_main

Dtype = Literal["keep", "bfloat16", "float32"]

ExportDtype = Literal["keep", "bfloat16", "float32", "fp8"]

SAFETENSORS_NAMES = {"keep": "keep", "bfloat16": "BF16", "float32": "F32", "fp8": "F8_E4M3"}
TORCH_NAMES = {"BF16": "bfloat16", "F32": "float32", "F16": "float16"}


def tell(notes: Iterable[str]) -> None:
    """Print notes, one line each, on stderr."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def fingerprint(files: Iterable[Path]) -> list[list[Any]]:
    """Name, size and time of change of files: what a resumed conversion must find unchanged."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(set(files))]


def text_digest(text: str) -> str:
    """SHA-256 of a text, for the plan of a conversion."""
    return hashlib.sha256(text.encode()).hexdigest()


def summary(dst: Path, tensors: int, nbytes: int, started: float) -> str:
    """The last line of a conversion."""
    seconds = max(time.monotonic() - started, 1e-6)
    return f"{dst}: {tensors:,} tensors, {nbytes / 1e9:.3f} GB in {seconds:.1f} s ({nbytes / 1e6 / seconds:.0f} MB/s)"


def write_companions(out: Path, source: Source) -> None:
    """What goes with the weights of a checkpoint made from another: config, tokenizer, the files that travel along.

    A manifest that a killed run left is removed: it is written last.
    """
    write_model_config(out, source.cfg)
    tokenizer = sorted(source.tokenizer_dir.iterdir()) if source.tokenizer_dir else []
    copy_files([file for file in tokenizer if file.name in layout.TOKENIZER_FILES], out / layout.TOKENIZER)
    if source.hf_config is not None:
        hf = source.folder if source.kind == "hf" else source.folder / layout.HF
        copy_files([hf / "config.json", *source.files], out / layout.HF)
    (out / layout.MANIFEST).unlink(missing_ok=True)


def command(name: str, function: Callable[..., int | None]) -> NoReturn:
    """Run `function` with the flags of the command line and exit. On the CPU: weights never visit a device."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import tyro

    run_main(lambda: tyro.cli(function, prog=f"python -m convert.{name}"))
