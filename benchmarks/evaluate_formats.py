"""Formats of weights compared on tasks: one checkpoint, evaluated as it is and rounded, item by item.

    python -m benchmarks.texts python-docs:validation --output held_out.txt
    python -m benchmarks.continuations held_out.txt --output continuations.jsonl --items 500
    python -m benchmarks.evaluate_formats RUN --text held_out.txt --choices continuations.jsonl

Differences are paired: an item's worth with the format less its worth without, so their errors are smaller than those
of the metrics themselves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, environment

FORMATS = ("none", "int8", "fp8", "int4:64")


def evaluate(run: Path, text: Path, task: Path, fmt: str, base: Path | None, out: Path) -> dict[str, Any]:
    """The results of one format."""
    command = [sys.executable, "-m", "dsv3_jax.evaluation", "--checkpoint", run, "--out", out, "--items"]
    command += ["--tasks", f"perplexity:{text},{task}", "--window", "256", "--dtype", "float32"]
    command += [] if fmt == "none" else ["--quantize", fmt]
    command += [] if base is None else ["--against", base]
    subprocess.run(list(map(str, command)), check=True)
    return json.loads(out.read_text())


def split(text: str, least: int = 1000) -> list[str]:
    """The text in pieces of whole paragraphs, so many characters or more, which perplexities are compared by."""
    pieces, piece = [], ""
    for paragraph in text.split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) >= least:
            pieces.append(piece)
            piece = ""
    return [*pieces, piece] if piece.strip() else pieces


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--choices", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS / "evaluation_formats.json")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "continuations.yaml"
        lines = ["task: multiple_choice", f"data: {json.dumps(str(args.choices.resolve()))}", 'delimiter: ""']
        task.write_text("\n".join(lines) + "\n")
        pieces = Path(folder) / "pieces.jsonl"
        pieces.write_text(
            "".join(json.dumps({"text": piece}) + "\n" for piece in split(args.text.read_text()))
        )
        base = None
        for fmt in FORMATS:
            out = Path(folder) / f"{fmt.replace(':', '-')}.json"
            found = evaluate(args.run, pieces, task, fmt, base, out)
            base = base or out
            for entry in found["tasks"].values():
                entry.pop("records")
            rows.append({"format": fmt, "seconds": found["seconds"], "tasks": found["tasks"]})
    result = {
        "environment": environment(),
        "checkpoint": {"name": args.run.name, "tokens_read_at_once": 256},
        "data": {p.name: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in (args.text, args.choices)},
        "rows": rows,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{args.output}: {len(rows)} formats")


if __name__ == "__main__":
    main()
