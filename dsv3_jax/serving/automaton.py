"""Many patterns run over a text at once, character by character: found matches, and what may still become one.

A set of states, each with the earliest place where it may have begun (two threads in one state have the same future,
and the earlier one covers the later). Per character the work is the number of states alive, whatever the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from dsv3_jax.serving.folding import continues, fold, in_word
from dsv3_jax.serving.patterns import Alt, CharClass, Node, Pattern, Repeat, Seq


@dataclasses.dataclass(frozen=True)
class Match:
    """Characters `start` up to `end` of the text, found by rule number `rule`."""

    start: int
    end: int
    rule: int


@dataclasses.dataclass
class _State:
    chars: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    tests: list[tuple[CharClass, int]] = dataclasses.field(default_factory=list)
    free: list[int] = dataclasses.field(default_factory=list)  # reached without a character
    accepts: list[tuple[int, bool]] = dataclasses.field(
        default_factory=list
    )  # rule, whether it must end a word


class Automaton:
    """Patterns compiled together. `patterns`: (rule number, pattern)."""

    def __init__(self, patterns: Iterable[tuple[int, Pattern]]) -> None:
        self._states = [_State(), _State()]  # begin anywhere; begin a word
        self._tree: dict[tuple[int, str], int] = {}
        for rule, pattern in patterns:
            end = self._add_shared(pattern.node, int(pattern.word_start))
            self._states[end].accepts.append((rule, pattern.word_end))
        self._closures = [self._closure(index) for index in range(len(self._states))]

    @property
    def size(self) -> int:
        """Number of states."""
        return len(self._states)

    def _new(self) -> int:
        self._states.append(_State())
        return len(self._states) - 1

    def _add_shared(self, node: Node, start: int) -> int:
        """`_add`, but patterns that begin with the same characters share the states of these: a tree of words."""
        parts = list(node.parts) if isinstance(node, Seq) else [node]
        for number, part in enumerate(parts):
            if not isinstance(part, str):
                return self._add(Seq(tuple(parts[number:])), start)
            if (start, part) not in self._tree:
                self._tree[start, part] = self._add(part, start)
            start = self._tree[start, part]
        return start

    def _add(self, node: Node, start: int) -> int:
        """Put `node` behind state `start`; the state it ends in."""
        state = self._states[start]
        if isinstance(node, str):
            end = self._new()
            state.chars.setdefault(node, []).append(end)
            return end
        if isinstance(node, CharClass):
            end = self._new()
            state.tests.append((node, end))
            return end
        if isinstance(node, Alt):
            end = self._new()
            for part in node.parts:
                self._states[self._add(part, start)].free.append(end)
            return end
        if isinstance(node, Repeat):
            end = self._new()
            for done in range(node.most):
                if done >= node.least:
                    self._states[start].free.append(end)
                start = self._add(node.part, start)
            self._states[start].free.append(end)
            return end
        for part in node.parts:
            start = self._add(part, start)
        return start

    def _closure(self, index: int) -> tuple[int, ...]:
        seen, todo = {index}, [index]
        while todo:
            for other in self._states[todo.pop()].free:
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        return tuple(seen)


class Scan:
    """One text on its way through an automaton.

    Attributes:
      position: characters read.
    """

    def __init__(self, automaton: Automaton) -> None:
        self._automaton = automaton
        self._states = automaton._states
        self._alive: dict[int, int] = {}  # state -> earliest beginning
        self._ended: dict[tuple[int, bool], tuple[int, int]] = {}  # (rule, at a word's end) -> beginning, end
        self._before = ""  # folded character before
        self.position = 0

    @property
    def earliest(self) -> int:
        """Where what may still become a match begins; `position` if nothing may."""
        begins = [*self._alive.values(), *(begin for begin, _ in self._ended.values())]
        return min(begins, default=self.position)

    def push(self, char: str) -> list[Match]:
        """Read a character; the matches that are certain now."""
        found: list[Match] = []
        for folded in fold(char):
            found += self._settle(folded)
            self._step(folded)
            self._before = folded
        self.position += 1
        return found

    def finish(self) -> list[Match]:
        """The matches that end with the text."""
        found = self._settle("")
        self._alive = {}
        return found

    def _settle(self, after: str) -> list[Match]:
        """The matches that ended before the folded character `after` ("" at the end), if it lets them."""
        if not self._ended:
            return []
        found = []
        for (rule, at_word), (begin, end) in self._ended.items():
            word_goes_on = at_word and after != "" and in_word(after) and in_word(self._before)
            if not word_goes_on and not (after != "" and continues(after)):
                found.append(Match(begin, end, rule))
        self._ended = {}
        return found

    def _step(self, char: str) -> None:
        reached: dict[int, int] = {}
        threads = list(self._alive.items())
        if not self._before or not continues(char):
            threads.append((0, self.position))
            if not (self._before and in_word(self._before) and in_word(char)):
                threads.append((1, self.position))
        closures = self._automaton._closures
        for index, begin in threads:
            for at in closures[index] if index < 2 else (index,):
                state = self._states[at]
                for target in state.chars.get(char, ()):
                    _reach(reached, closures[target], begin)
                for test, target in state.tests:
                    if test.has(char):
                        _reach(reached, closures[target], begin)
        self._alive = {}
        for index, begin in reached.items():
            state = self._states[index]
            if state.chars or state.tests:
                self._alive[index] = begin
            for accepted in state.accepts:
                earlier = self._ended.get(accepted, (begin, 0))[0]
                self._ended[accepted] = min(begin, earlier), self.position + 1


def _reach(reached: dict[int, int], states: tuple[int, ...], begin: int) -> None:
    for state in states:
        if reached.get(state, begin) >= begin:
            reached[state] = begin
