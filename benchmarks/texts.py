"""Real text that every machine with the project's packages has, for calibration and held-out text; none is committed.

    python -m benchmarks.texts python-docs:validation --output held_out.txt    what `data.val_fraction` 0.03 held out
    python -m benchmarks.texts numpy scipy --output other.txt                  docstrings of installed packages

The documents' order is drawn once, so the first tokens are of everything.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import random
from pathlib import Path

from dsv3_jax.training.prepare import hash_fraction
from dsv3_jax.training.sources import NAMED_SOURCES

VAL_FRACTION = 0.03


def documents(name: str, least: int = 400) -> list[str]:
    """A source's split, "train" or "validation" (source:split), or docstrings of a package, `least` characters each."""
    source, _, split = name.partition(":")
    if source in NAMED_SOURCES:
        assert split in ("train", "validation"), name
        return [
            document.text
            for document in NAMED_SOURCES[source]()
            if (hash_fraction(document) < VAL_FRACTION) == (split == "validation")
        ]
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, name
    found: dict[str, None] = {}
    for file in sorted(Path(spec.origin).parent.rglob("*.py")):
        if "tests" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) >= least:
                    found[inspect.cleandoc(text)] = None
    return list(found)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    texts = [text for source in args.sources for text in documents(source)]
    random.Random(0).shuffle(texts)
    args.output.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    print(f"{args.output}: {len(texts):,} documents, {args.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
