"""Ids of answers as a model gives them."""

from __future__ import annotations

import re

from dsv3_jax.serving.marks import MARKS
from dsv3_jax.text import Tokenizer

_CONTROL = re.compile("|".join(map(re.escape, MARKS)))


def marked_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of an answer: control strings as their tokens where the tokenizer has them."""
    ids: list[int] = []
    at = 0
    for match in _CONTROL.finditer(text):
        index = tokenizer.control.get(match.group())
        before, at = text[at : match.start()], match.end()
        ids += tokenizer.encode_text(before) if before else []
        ids += tokenizer.encode_text(match.group()) if index is None else [index]
    return ids + (tokenizer.encode_text(text[at:]) if text[at:] else [])
