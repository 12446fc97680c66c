"""How GPTQ rounds by default, chosen on a text that nothing is reported on: `python -m benchmarks.rounding_choice`.

    python -m benchmarks.texts numpy scipy --output choice.txt
    python -m benchmarks.rounding_choice --run DIR --text choice.txt --calibration train.txt

Quantises a trained checkpoint with each setting (clippings that are tried, damping, order of columns) and writes KL
against the float32 model on the text, and the difference to the default with its paired standard error, to
benchmarks/results/rounding_choice.json. `benchmarks.quantized quality` reports on other texts.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from benchmarks.common import environment, write
from benchmarks.quality import against, quantized
from convert import calibrate, compare
from dsv3_jax.checkpoint.source import open_source
from dsv3_jax.model import abstract_variables
from dsv3_jax.quantization import gptq

GRIDS = {
    "none": (1.0,),
    "to 0.85": (1.0, 0.95, 0.9, 0.85),
    "to 0.7": (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7),
}
DEFAULT = {"rounding": "gptq", "clippings": "to 0.85", "damping": 0.01}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "int4:64": [
        {},
        {"rounding": "gptq+order"},
        {"clippings": "none"},
        {"clippings": "to 0.7"},
        {"rounding": "gptq+order", "clippings": "none"},
        {"rounding": "gptq+order", "clippings": "to 0.7"},
        {"damping": 0.1},
        {"damping": 0.001},
    ],
    "int4:128": [{}, {"rounding": "gptq+order"}, {"clippings": "none"}, {"clippings": "to 0.7"}],
    "int4a:64": [{}, {"rounding": "gptq+order"}, {"clippings": "none"}],
    "int8": [{}, {"rounding": "gptq+order"}],
}


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag in ("--run", "--text", "--calibration"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--formats", nargs="+", default=list(VARIANTS))
    parser.add_argument("--name", default="rounding_choice")
    args = parser.parse_args()
    before, source = environment(), open_source(args.run, abstract_variables)
    windows = calibrate.read_tokens(source, args.text, args.tokens, args.window, "--text")
    reference = compare.Reference(source.cfg, source.load("float32"), windows, keep=True)
    rows: list[dict[str, Any]] = []
    default: tuple[np.ndarray, ...] | None = None
    for fmt in args.formats:
        for changed in VARIANTS[fmt]:
            how = DEFAULT | changed
            with tempfile.TemporaryDirectory() as folder, _settings(how):
                dst = Path(folder) / "out"
                made = quantized(args.run, dst, fmt, how["rounding"], args.calibration, args.window)
                found = reference.tokens(source.cfg, open_source(dst, abstract_variables).load("float32"))
            default = found if not changed else default
            assert default is not None, "the default comes first"
            row = {"format": fmt, **how, "kl": float(found[2].mean()), "error": made["error"]}
            rows.append(row | {"against_default": against(found, default)})
            print(rows[-1], file=sys.stderr, flush=True)
    what = {"text": args.text.stem, "tokens": windows.size, "window": args.window}
    result = {"environment": before, "parameters": source.count_parameters(), **what}
    print(write(args.name, result | {"calibration": args.calibration.stem, "rows": rows}))


@contextlib.contextmanager
def _settings(how: dict[str, Any]) -> Iterator[None]:
    rounded = functools.partial(gptq.gptq_each, clippings=GRIDS[how["clippings"]])
    with (
        mock.patch.object(calibrate, "gptq_each", rounded),
        mock.patch.object(gptq, "DAMPING", how["damping"]),
    ):
        yield


if __name__ == "__main__":
    main()
