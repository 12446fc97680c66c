"""Real text that every machine with the project's packages has: their docstrings, for calibration and held-out text.

    python -m benchmarks.docstrings numpy scipy --output held_out.txt

English with examples, as the demo's data (the standard library's docstrings) is, and no part of it.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import random
from pathlib import Path


def docstrings(package: str, least: int = 400) -> list[str]:
    """Those of a package's modules, classes and functions of at least that many characters, each once, by file."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, package
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
    parser.add_argument("packages", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    texts = [text for package in args.packages for text in docstrings(package)]
    random.Random(0).shuffle(texts)  # the first tokens are then of everything
    args.output.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    print(f"{args.output}: {len(texts):,} docstrings, {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
