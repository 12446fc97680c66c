"""Generated ids as text in which every control string is one character that no text can hold.

A control string such as `</think>` structures an answer. The same letters spelled out in ordinary tokens are text, so
decoding both to one string would let an answer that quotes a prompt forge its own structure. Here a control *token*
becomes a lone surrogate, which UTF-8 cannot produce; parsers then work on plain strings, and `spelled` turns what is
left back into text. Where the tokenizer has no token for a control string, its spelling is all there is, and counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dsv3_jax.text import StreamDecoder, Tokenizer

# spelling -> its mark. The order is part of nothing: marks live in memory only.
_SPELLINGS = (
    "<think>",
    "</think>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "｜DSML｜",
)
MARKS = {spelling: chr(0xD800 + index) for index, spelling in enumerate(_SPELLINGS)}
THINK, END_THINK, CALLS, END_CALLS, CALL, END_CALL, SEP, DSML = MARKS.values()
_SPELLED = {ord(mark): spelling for spelling, mark in MARKS.items()}


def spelled(text: str) -> str:
    """`text` with its marks written out: what a decode of the ids gives."""
    return text.translate(_SPELLED)


class MarkedDecoder:
    """`StreamDecoder` that gives marks for control strings: `spelled` of all pieces is the full decode."""

    def __init__(self, tokenizer: Tokenizer, marks: Iterable[str] = ()) -> None:
        """`marks`: the control strings to mark (spellings, keys of MARKS); none gives the plain decode."""
        wanted = tuple(marks)
        self._tokenizer = tokenizer
        self._by_id = {
            tokenizer.control[spelling]: MARKS[spelling]
            for spelling in wanted
            if spelling in tokenizer.control
        }
        self._by_text = _Replacer({s: MARKS[s] for s in wanted if s not in tokenizer.control})
        self._decoder = StreamDecoder(tokenizer)

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        out: list[str] = []
        run: list[int] = []
        for index in ids:
            mark = self._by_id.get(int(index))
            if mark is None:
                run.append(int(index))
                continue
            out += [self._decoder.push(run), self._decoder.finish(), mark]
            self._decoder, run = StreamDecoder(self._tokenizer), []
        return self._by_text.push("".join([*out, self._decoder.push(run)]))

    def finish(self) -> str:
        """What was held back, at the end."""
        return self._by_text.push(self._decoder.finish()) + self._by_text.finish()


class _Replacer:
    """Replaces spellings by marks in text that arrives in pieces, holding back only what may become one."""

    def __init__(self, table: dict[str, str]) -> None:
        self._table = table
        self._held = ""

    def push(self, delta: str) -> str:
        if not self._table:
            return delta
        text = self._held + delta
        for spelling, mark in self._table.items():
            text = text.replace(spelling, mark)
        held = beginning_at_end(text, tuple(self._table))
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


def beginning_at_end(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of `text` that one of `strings` starts with (and is longer than)."""
    longest = max((len(string) for string in strings), default=1) - 1
    for length in range(min(len(text), longest), 0, -1):
        end = text[len(text) - length :]
        if any(len(string) > length and string.startswith(end) for string in strings):
            return length
    return 0
