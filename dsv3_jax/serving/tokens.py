"""Single tokens as OpenAI's log-probabilities show them: text, bytes and place."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Iterable

from dsv3_jax.text import Tokenizer
from dsv3_jax.text.tokenizer import REPLACEMENT


@dataclasses.dataclass(frozen=True)
class TokenText:
    """One token on its own.

    text: its text; `bytes:\\xe4\\xb8` where its bytes are part of a character, so that two such tokens differ.
    bytes: its bytes, or None for a tokenizer whose tokens have none of their own.
    offset: characters of text that are complete before it (OpenAI's `text_offset`, from the start of the stream).
    """

    text: str
    bytes: list[int] | None
    offset: int = 0


def token_text(tokenizer: Tokenizer, index: int) -> TokenText:
    """A token by its id, control tokens spelled out; ids beyond the tokenizer are U+FFFD."""
    if not tokenizer.byte_level:
        return TokenText(tokenizer.decode([index], skip_special=False), None)
    data = tokenizer.token_bytes(index)
    if data is None:
        data = REPLACEMENT.encode("utf-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
    return TokenText(text, list(data))


class TokenOffsets:
    """`TokenText`s of a stream of ids, with offsets. Special tokens count no characters: they are not in the text."""

    def __init__(self, tokenizer: Tokenizer, start: int = 0) -> None:
        """`start`: the first offset, such as the length of an echoed prompt."""
        self._tokenizer = tokenizer
        self._offset = start
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> list[TokenText]:
        """The next tokens."""
        out: list[TokenText] = []
        for index in map(int, ids):
            token = token_text(self._tokenizer, index)
            out.append(dataclasses.replace(token, offset=self._offset))
            if self._tokenizer.is_special(index):
                continue
            if token.bytes is None:
                self._offset += len(token.text)
            else:
                self._offset += len(self._utf8.decode(bytes(token.bytes)))
        return out
