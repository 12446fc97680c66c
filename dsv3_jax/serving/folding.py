"""Characters as the content rules see them: one at a time, so that text may come in pieces.

`fold` is Unicode's compatibility decomposition (two strings have the same NFKC form exactly if they have the same
NFKD form, up to the order of stacked accents), case folded, invisible characters dropped: "Ｆｏｏ", "FOO" and
"f\\u200boo" read "foo". Decomposing leaves accents on their own; a match may not end before one, or begin with one.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

# Joiners, soft hyphen, byte order mark, bidirectional controls and tags are of category Cf.
_INVISIBLE = {0x034F, 0x115F, 0x1160, 0x3164, 0xFFA0, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}

# Scripts that put no blanks between words, where "whole word" means nothing.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x11FF),  # Myanmar, Hangul letters
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x9FFF),  # Chinese, Japanese
    (0xA960, 0xA97F),
    (0xAC00, 0xD7FF),
    (0xF900, 0xFAFF),
    (0x1B000, 0x1B2FF),
    (0x20000, 0x3FFFF),
)


@lru_cache(maxsize=65536)
def fold(char: str) -> str:
    """What a character is compared as: none, one or several characters."""
    if unicodedata.category(char) == "Cf" or ord(char) in _INVISIBLE:
        return ""
    return unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", char).casefold())


def fold_text(text: str) -> str:
    """`fold` of every character."""
    return "".join(map(fold, text))


@lru_cache(maxsize=65536)
def continues(char: str) -> bool:
    """Whether a folded character belongs to the one before it: accents, vowel signs, later Hangul letters."""
    return unicodedata.category(char) in ("Mn", "Mc", "Me") or 0x1160 <= ord(char) <= 0x11FF


@lru_cache(maxsize=65536)
def in_word(char: str) -> bool:
    """Whether a folded character is part of a word in a script with blanks between words."""
    if any(low <= ord(char) <= high for low, high in _UNSPACED):
        return False
    return char.isalnum() or char == "_" or continues(char)
