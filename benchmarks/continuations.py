"""A multiple-choice task from held-out text: which of four continuations follows.

    python -m benchmarks.texts python-docs:validation --output held_out.txt
    python -m benchmarks.continuations held_out.txt --output continuations.jsonl --items 500

An item's prompt is a stretch of the text that ends before a word; its right choice is what follows there, the three
others are stretches of the same length that begin with words elsewhere in the text, at least 2,000 characters away, all
cut where a line ends or else where a word does. Places and the order of choices are drawn with a fixed seed. So
chance is a quarter, all choices are real text of one kind, and only the prompt tells them apart.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

APART = 2000
CHOICES = 4


def make_items(text: str, count: int, prompt: int, choice: int, seed: int = 0) -> list[dict[str, Any]]:
    """Items of prompts and choices of about so many characters. Raises ValueError for a text that is too short."""
    breaks = [found.start() for found in re.finditer(r"(?<=\w )\w", text)]
    breaks = [at for at in breaks if prompt <= at <= len(text) - choice]
    if len(breaks) < count + 4 * CHOICES:
        raise ValueError(f"{len(breaks)} places in the text are too few for {count} items")
    rng = random.Random(seed)
    items = []
    for at in rng.sample(breaks, count):
        starts, texts = [at], [_cut(text, at, choice)]
        while len(starts) < CHOICES:
            other = rng.choice(breaks)
            found = _cut(text, other, choice)
            if abs(other - at) >= APART and found not in texts:
                starts.append(other)
                texts.append(found)
        order = rng.sample(range(CHOICES), CHOICES)
        items.append(
            {
                "id": at,
                "prompt": text[at - prompt : at],
                "choices": [texts[i] for i in order],
                "answer": order.index(0),
            }
        )
    return items


def _cut(text: str, at: int, length: int) -> str:
    """From `at` about `length` characters, to the last end of a line, else of a word, in their second half."""
    piece = text[at : at + length]
    for mark in ("\n", " "):
        end = piece.rfind(mark)
        if end >= length // 2:
            return piece[:end]
    return piece


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--prompt", type=int, default=200, help="characters")
    parser.add_argument("--choice", type=int, default=60, help="characters")
    args = parser.parse_args()
    items = make_items(args.text.read_text(encoding="utf-8"), args.items, args.prompt, args.choice)
    args.output.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), "utf-8")
    print(f"{args.output}: {len(items)} items")


if __name__ == "__main__":
    main()
