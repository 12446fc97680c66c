"""The built-in content filter: word lists and regular expressions from a YAML file.

    mask: "[removed]"
    rules:
      - name: project-names          # what the log says
        language: en                 # for the reader of the file; folding serves all languages
        words: [Blue Heron, 蓝鹭]     # whole words; in scripts without blanks, anywhere
        words_file: names.txt        # more of them, one a line, beside this file
        action: redact               # or block (the default)
        apply: [input, output]       # the default
      - name: card-numbers
        regex: ['\\b\\d{4}[ -]?\\d{4}[ -]?\\d{4}[ -]?\\d{4}\\b']      # the syntax of patterns.py

What is compared is folded (folding.py): width, case, ligatures and invisible characters do not matter. In a stream only
what may still become a match is held back, at most 256 characters; what a rule forbids never leaves in part.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from pathlib import Path
from typing import Literal

from dsv3_jax.config.files import from_mapping, load_yaml
from dsv3_jax.errors import ConfigError
from dsv3_jax.serving.automaton import Automaton, Match, Scan
from dsv3_jax.serving.filter import Verdict, log_decision
from dsv3_jax.serving.folding import fold_text, in_word
from dsv3_jax.serving.patterns import Pattern, literal, parse

MAX_STATES = 500_000  # of all rules together
LOGGED = 8  # redactions of one text that are logged


@dataclasses.dataclass(frozen=True)
class Rule:
    """One entry of the file's `rules`."""

    name: str
    language: str = ""
    words: tuple[str, ...] = ()
    words_file: str | None = None
    regex: tuple[str, ...] = ()
    whole_word: bool = True
    action: Literal["block", "redact"] = "block"
    apply: tuple[Literal["input", "output"], ...] = ("input", "output")


@dataclasses.dataclass(frozen=True)
class RuleFile:
    """The file. mask: what stands for a redacted text."""

    rules: tuple[Rule, ...]
    mask: str = "[removed]"


class RuleFilter:
    """A `Filter` made of rules; nothing in it changes, so all requests share one."""

    def __init__(self, config: RuleFile, folder: Path | None = None) -> None:
        """`folder`: where `words_file`s are. Raises ConfigError, naming the rule and what is wrong."""
        names = [rule.name for rule in config.rules]
        if len(set(names)) < len(names):
            raise ConfigError(f"rules: a name is given twice in {', '.join(names)}")
        self.config = config
        compiled = [_patterns(rule, folder) for rule in config.rules]
        self._automata = {
            side: Automaton(
                (number, pattern)
                for number, rule in enumerate(config.rules)
                if side in rule.apply
                for pattern in compiled[number]
            )
            for side in ("input", "output")
        }
        states = max(automaton.size for automaton in self._automata.values())
        if states > MAX_STATES:
            raise ConfigError(f"rules: {states} states in all; at most {MAX_STATES} are supported")

    @classmethod
    def load(cls, path: Path) -> RuleFilter:
        """The filter of a YAML file. Raises ConfigError, naming the file."""
        try:
            return cls(from_mapping(RuleFile, load_yaml(path)), path.parent)
        except ConfigError as error:
            raise ConfigError(str(error) if str(path) in str(error) else f"{path}: {error}") from None

    def check(self, text: str, *, where: str = "input", request_id: str = "") -> Verdict:
        """See `Filter`."""
        stream = self.stream(where=where, request_id=request_id)
        first = stream.push(text)
        if first.blocked:
            return first
        last = stream.finish()
        return Verdict(first.text + last.text, last.blocked)

    def stream(self, *, where: str = "content", request_id: str = "") -> RuleStream:
        """See `Filter`."""
        automaton = self._automata["input" if where == "input" else "output"]
        return RuleStream(self.config, Scan(automaton), where, request_id)


def _patterns(rule: Rule, folder: Path | None) -> list[Pattern]:
    where = f"rule {rule.name!r}:"
    words = list(rule.words)
    if rule.words_file is not None:
        path = (folder or Path()) / rule.words_file
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where} words_file {path}: {error}") from None
        words += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not words and not rule.regex:
        raise ConfigError(f"{where} has neither words nor regex")
    if not rule.apply:
        raise ConfigError(f"{where} apply is empty; expected input, output or both")
    patterns = [parse(source, f"{where} regex") for source in rule.regex]
    for word in words:
        node = literal(word, f"{where} word")
        folded = fold_text(word.strip())
        whole = rule.whole_word
        patterns.append(Pattern(node, whole and in_word(folded[0]), whole and in_word(folded[-1])))
    return patterns


class RuleStream:
    """A `FilterStream`."""

    def __init__(self, config: RuleFile, scan: Scan, where: str, request_id: str) -> None:
        self._config, self._scan, self._where, self._request_id = config, scan, where, request_id
        self._held = ""  # text that has not been released, from character `_start` on
        self._start = 0
        self._hidden: deque[Match] = deque()  # apart from each other and rising
        self._rules: dict[int, set[int]] = {}  # beginning of a hidden part -> its rules
        self._blocked = False
        self._redacted = 0

    def push(self, delta: str) -> Verdict:
        """See `FilterStream`."""
        if self._blocked:
            return Verdict("", True)
        for char in delta:
            self._held += char
            if (matches := self._scan.push(char)) and (block := self._take(matches)) is not None:
                return self._block(block)
        return Verdict(self._release(self._scan.earliest))

    def finish(self) -> Verdict:
        """See `FilterStream`."""
        if self._blocked:
            return Verdict("", True)
        block = self._take(self._scan.finish())
        return self._block(block) if block is not None else Verdict(self._release(self._scan.position))

    def _take(self, matches: list[Match]) -> Match | None:
        """Note what is to be hidden; the match that blocks, if one does."""
        blocking = [m for m in matches if self._config.rules[m.rule].action == "block"]
        if blocking:
            return min(blocking, key=lambda match: (match.start, match.rule))
        for match in matches:
            start, end, rules = match.start, match.end, {match.rule}
            while (
                self._hidden and self._hidden[-1].end > start
            ):  # ends rise, so only the last ones can overlap
                other = self._hidden.pop()
                start, end = min(start, other.start), max(end, other.end)
                rules |= self._rules.pop(other.start)
            self._hidden.append(Match(start, end, match.rule))
            self._rules[start] = rules
        return None

    def _block(self, match: Match) -> Verdict:
        self._blocked = True
        self._log("block", {match.rule}, match.start, match.end - match.start)
        self._hidden = deque(m for m in self._hidden if m.start < match.start)
        return Verdict(self._release(match.start, cut=True), True)

    def _release(self, safe: int, cut: bool = False) -> str:
        """The text before character `safe`, hidden parts masked; one that reaches over it waits, or is `cut`."""
        out: list[str] = []
        while self._hidden:
            hidden = self._hidden[0]
            if hidden.end > safe and not cut:
                safe = min(safe, hidden.start)
                break
            self._hidden.popleft()
            out += [self._pass(hidden.start), self._config.mask]
            self._pass(min(hidden.end, safe) if cut else hidden.end)
            self._log("redact", self._rules.pop(hidden.start), hidden.start, hidden.end - hidden.start)
        return "".join([*out, self._pass(safe)])

    def _pass(self, end: int) -> str:
        """Let go of the held text up to character `end`."""
        count = max(0, end - self._start)
        text, self._held = self._held[:count], self._held[count:]
        self._start += len(text)
        return text

    def _log(self, action: str, rules: set[int], offset: int, length: int) -> None:
        self._redacted += action == "redact"
        if action == "redact" and self._redacted > LOGGED:
            return  # a text of nothing else must not fill the log
        names = [self._config.rules[rule].name for rule in sorted(rules)]
        log_decision(
            where=self._where,
            request_id=self._request_id,
            action=action,
            rules=names,
            offset=offset,
            length=length,
        )
