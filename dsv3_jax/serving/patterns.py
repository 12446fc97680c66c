r"""Regular expressions that are safe to run on anybody's text: a part of Python's syntax, without backtracking.

Literals, `.`, classes `[a-z0-9]` and `[^…]`, `\d \w \s \D \W \S`, groups `(…)` and `(?:…)`, `|`, `?`, `{m}`, `{m,n}`,
and `\b` at the two ends. Every expression has a longest match (no `*`, `+`, `{m,}`), which bounds what a stream must
hold back, and runs as a set of states (automaton.py): time grows with the text's length, never faster. Patterns are
folded like the text (folding.py), so they always ignore case.
"""

from __future__ import annotations

import dataclasses

from dsv3_jax.errors import ConfigError
from dsv3_jax.serving.folding import fold

MAX_LENGTH = 256  # of a match, in characters
MAX_STATES = 4096  # of an expression, written out
_REPEATS = "?*+{"
_RANGE = 4096  # longest range of a class that is folded character by character


@dataclasses.dataclass(frozen=True)
class CharClass:
    """A set of folded characters."""

    chars: frozenset[str] = frozenset()
    ranges: tuple[tuple[str, str], ...] = ()
    kinds: str = ""  # letters of d, w, s and their complements D, W, S
    negated: bool = False

    def has(self, char: str) -> bool:
        """Whether `char` is in the set."""
        found = char in self.chars or any(low <= char <= high for low, high in self.ranges)
        found = found or any(_is(char, kind) for kind in self.kinds)
        return found != self.negated


ANY = CharClass(chars=frozenset("\n"), negated=True)


def _is(char: str, kind: str) -> bool:
    if kind in "DWS":
        return not _is(char, kind.lower())
    if kind == "d":
        return char.isdecimal()
    return char.isspace() if kind == "s" else char.isalnum() or char == "_"


@dataclasses.dataclass(frozen=True)
class Seq:
    """One after another."""

    parts: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Alt:
    """One of several."""

    parts: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Repeat:
    """`least` to `most` times."""

    part: Node
    least: int
    most: int


Node = str | CharClass | Seq | Alt | Repeat  # a str is one folded character


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A parsed expression. word_start, word_end: `\\b` at its ends."""

    node: Node
    word_start: bool = False
    word_end: bool = False


def parse(source: str, where: str) -> Pattern:
    """Raises ConfigError that begins with `where` and names what is not supported, and at which character."""
    start, end = source.startswith(r"\b"), source.endswith(r"\b") and not source.endswith(r"\\b")
    body = source[2 * start : len(source) - 2 * (end and len(source) > 2)]
    node = _Parser(body, f"{where} {source!r}").parse()
    least, most = lengths(node)
    if least == 0:
        raise ConfigError(f"{where} {source!r} matches the empty text")
    if most > MAX_LENGTH:
        raise ConfigError(
            f"{where} {source!r} can match {most} characters; at most {MAX_LENGTH} are supported"
        )
    if size(node) > MAX_STATES:
        raise ConfigError(f"{where} {source!r} needs {size(node)} states; at most {MAX_STATES} are supported")
    return Pattern(node, start, end)


def literal(text: str, where: str) -> Seq:
    """A word or phrase; a blank in it stands for any number of blanks up to eight. Raises ConfigError."""
    words = [tuple(char for source in word for char in fold(source)) for word in text.split()]
    if not all(words) or not words:
        raise ConfigError(f"{where} {text!r} holds no visible character")
    parts: list[Node] = []
    for number, word in enumerate(words):
        parts += [Repeat(CharClass(kinds="s"), 1, 8)] if number else []
        parts += word
    node = Seq(tuple(parts))
    if lengths(node)[1] > MAX_LENGTH:
        raise ConfigError(f"{where} {text!r} is longer than {MAX_LENGTH} characters")
    return node


def lengths(node: Node) -> tuple[int, int]:
    """(shortest, longest) match."""
    if isinstance(node, (str, CharClass)):
        return 1, 1
    if isinstance(node, Repeat):
        least, most = lengths(node.part)
        return node.least * least, node.most * most
    parts = [lengths(part) for part in node.parts]
    if isinstance(node, Seq):
        return sum(least for least, _ in parts), sum(most for _, most in parts)
    return min(least for least, _ in parts), max(most for _, most in parts)


def size(node: Node) -> int:
    """States when written out."""
    if isinstance(node, (str, CharClass)):
        return 1
    if isinstance(node, Repeat):
        return node.most * size(node.part) + 1
    return sum(map(size, node.parts)) + 1


class _Parser:
    def __init__(self, source: str, shown: str) -> None:
        self._source, self._shown = source, shown
        self._at = 0
        self._depth = 0

    def parse(self) -> Node:
        node = self._alternatives()
        if self._at < len(self._source):
            raise self._wrong("an unmatched )")
        return node

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"{self._shown}: {what} at character {self._at + 1}")

    def _peek(self) -> str:
        return self._source[self._at : self._at + 1]

    def _next(self) -> str:
        if self._at == len(self._source):
            raise self._wrong("something is missing")
        self._at += 1
        return self._source[self._at - 1]

    def _alternatives(self) -> Node:
        parts = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else Alt(tuple(parts))

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom()))
        return Seq(tuple(parts))

    def _repeated(self, part: Node) -> Node:
        char = self._peek()
        if not char or char not in _REPEATS:
            return part
        if char in "*+":
            raise self._wrong(f"{char} has no longest match; give a bound, such as {{1,40}},")
        self._at += 1
        least, most = (0, 1) if char == "?" else self._bounds()
        if self._peek() == "?":
            self._at += 1  # lazy or greedy: all matches are found anyway
        if self._peek() and self._peek() in _REPEATS:
            raise self._wrong("a repeat of a repeat needs a group")
        repeated = Repeat(part, least, most)
        if size(repeated) > 16 * MAX_STATES:
            raise self._wrong("repeating this needs too many states")
        return repeated

    def _bounds(self) -> tuple[int, int]:
        end = self._source.find("}", self._at)
        low, comma, high = self._source[self._at : max(end, self._at)].partition(",")
        if end < 0 or not low.isdecimal() or (comma and not high.isdecimal()):
            raise self._wrong("{ must begin {m} or {m,n} with both bounds given")
        self._at = end + 1
        least, most = int(low), int(high or low)
        if least > most or most > MAX_LENGTH:
            raise self._wrong(f"the bounds must be rising and at most {MAX_LENGTH}")
        return least, most

    def _atom(self) -> Node:
        char = self._next()
        if char == "(":
            self._depth += 1
            if self._depth > 32:
                raise self._wrong("groups nest too deep")
            if self._source.startswith("?:", self._at):
                self._at += 2
            elif self._peek() == "?":
                raise self._wrong("look-around, names and flags are not supported; (?")
            node = self._alternatives()
            if self._peek() != ")":
                raise self._wrong("a ) is missing")
            self._at += 1
            self._depth -= 1
            return node
        if char == "[":
            return self._class()
        if char == ".":
            return ANY
        if char in _REPEATS:
            raise self._wrong(f"there is nothing to repeat before {char}")
        if char in "^$":
            raise self._wrong(f"{char} is not supported; a rule looks anywhere in a text; it is")
        if char == "\\":
            return self._escape()
        return _folded(char)

    def _escape(self) -> Node:
        char = self._next()
        if char in "dwsDWS":
            return CharClass(kinds=char)
        if char in "nrt":
            return {"n": "\n", "r": "\r", "t": "\t"}[char]
        if char.isalnum():
            raise self._wrong(
                f"\\{char} is not supported" + (" inside an expression" if char == "b" else "") + ","
            )
        return _folded(char)

    def _class(self) -> Node:
        negated = self._peek() == "^"
        self._at += negated
        chars: set[str] = set()
        ranges: list[tuple[str, str]] = []
        kinds = ""
        longer: list[Node] = []
        first = True
        while first or self._peek() != "]":
            first = False
            low = self._next()
            if low == "\\":
                item = self._escape()
                if isinstance(item, CharClass):
                    kinds += item.kinds
                    continue
                low = item if isinstance(item, str) else low
                if not isinstance(item, str):
                    raise self._wrong("a class takes single characters")
            high = low
            if self._peek() == "-" and self._source[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._next()
                if high == "\\" or high < low:
                    raise self._wrong("a range must rise between plain characters")
            if ord(high) - ord(low) >= _RANGE:
                ranges.append((low, high))
                continue
            for code in range(ord(low), ord(high) + 1):
                folded = _folded(chr(code))
                if isinstance(folded, str):
                    chars.add(folded)
                else:
                    longer.append(folded)
        self._at += 1
        if longer and negated:
            raise self._wrong("a class [^…] cannot hold characters that are written with accents")
        single = CharClass(frozenset(chars), tuple(ranges), kinds, negated)
        return Alt((single, *longer)) if longer else single


def _folded(char: str) -> Node:
    folded = fold(char)
    return folded if len(folded) == 1 else Seq(tuple(folded))
