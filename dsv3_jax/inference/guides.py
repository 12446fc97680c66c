"""Structured output: which ids may come next so that a text matches a JSON schema, a regular expression or a choice.

The grammars are those of `llguidance` (extra `serve`). A guide follows one row: `mask` says what may come, `accept`
takes what came. Control tokens are never allowed; when the text is complete an end-of-sequence id is, and where nothing
can follow, nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.inference.adjustments import mask_words
from dsv3_jax.text import Tokenizer

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 64
MAX_REGEX = 4096
MAX_CHOICES = 1000

WHITESPACE = r"[ \n\t]{0,40}"
"""Between the tokens of JSON; a bound, so that a model cannot fill its output with spaces."""

# Of llguidance, whose costs are counted, not timed. A schema that needs more is refused, a guide that comes to need
# more ends its row with an error.
_LIMITS = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "max_items_in_row": 2000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}


class Guide:
    """The state of one row's text. See `Guides`."""

    def __init__(self, matcher: Any, tokenizer_ids: int, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._ids, self._vocab_size, self._eos_ids = tokenizer_ids, vocab_size, eos_ids
        self._found = np.zeros(mask_words(tokenizer_ids), np.uint32)
        self._words = mask_words(vocab_size)
        self.finished = False
        """Whether an end-of-sequence id was accepted."""

    def mask(self) -> np.ndarray:
        """uint32 [W]: the ids that may come next; bit i % 32 of element i // 32 is id i. At least one is set.

        Raises DataError when the grammar became too complex to follow, or nothing may come any more.
        """
        self._matcher.unsafe_compute_mask_ptr(self._found.ctypes.data, self._found.nbytes)
        self._check()
        mask = np.zeros(self._words, np.uint32)
        shared = min(self._words, len(self._found))
        mask[:shared] = self._found[:shared]
        if self.finished or not mask.any():
            raise DataError("structured output: no token may follow")
        return mask

    def accept(self, token_id: int) -> None:
        """Take the id that came next. Raises DataError for one that may not."""
        if not self.finished and self._matcher.consume_token(int(token_id)):
            self.finished = int(token_id) in self._eos_ids
            return
        raise DataError(f"structured output: token id {token_id} may not follow")

    def copy(self) -> Guide:
        """Another guide in the same state, at little cost: one for each of several answers."""
        other = Guide(self._matcher.deep_copy(), self._ids, self._vocab_size, self._eos_ids)
        other.finished = self.finished
        return other

    @property
    def complete(self) -> bool:
        """Whether the text so far matches as it is."""
        return bool(self._matcher.is_accepting())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise DataError(f"structured output: {_first_line(self._matcher.get_error())}")


class Guides:
    """Makes guides for one tokenizer. Making this takes about half a second for a vocabulary of 128k ids."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        """
        Args:
          vocab_size: ids of the model, which may have more than the tokenizer; those are never allowed.
          eos_ids: ids that end a row; at least one of the tokenizer's.
        Raises:
          ConfigError: llguidance is missing, or the tokenizer is not one whose ids stand for bytes.
        """
        try:
            import llguidance
        except ImportError:
            raise ConfigError(
                "structured output needs the package llguidance: install the `serve` extra "
                "(./run setup --extras serve)"
            ) from None
        if not (tokenizer.byte_level and tokenizer.can_encode):
            raise ConfigError(f"{tokenizer.origin}: structured output needs a byte-level tokenizer.json")
        eos = [index for index in eos_ids if index < tokenizer.vocab_size]
        if not eos:
            raise ConfigError(
                f"{tokenizer.origin}: structured output needs an end-of-sequence id; found {eos_ids}"
            )
        self._library = llguidance
        self._limits = llguidance.LLParserLimits(**_LIMITS)
        self._ids, self._vocab_size, self._eos_ids = tokenizer.vocab_size, vocab_size, frozenset(eos)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Bytes(tokenizer, eos)),
            eos_token=eos,
            slices=llguidance.LLTokenizer.json_slices(),
        )

    def json_schema(self, schema: Mapping[str, Any]) -> Guide:
        """JSON that is valid under a schema, keys in the schema's order.

        Raises DataError for a schema that is none, is too large, or uses what is not supported (said which).
        """
        if not isinstance(schema, Mapping):
            raise DataError(f"the JSON schema is {type(schema).__name__}; expected an object")
        if _depth(schema) > MAX_SCHEMA_DEPTH:
            raise DataError(f"the JSON schema is nested more than {MAX_SCHEMA_DEPTH} deep")
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise DataError(f"the JSON schema is not JSON: {error}") from None
        if len(text) > MAX_SCHEMA_BYTES:
            raise DataError(f"the JSON schema has {len(text)} bytes; expected at most {MAX_SCHEMA_BYTES}")
        fixed = {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE, "lenient": False}
        try:
            grammar = self._library.LLMatcher.grammar_from_json_schema(text, overrides=fixed)
        except ValueError as error:
            raise DataError(f"the JSON schema cannot be used: {_first_line(str(error))}") from None
        return self._guide(grammar, "the JSON schema")

    def json_object(self) -> Guide:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Guide:
        """A text that a regular expression matches as a whole; no look-around and no back references.

        Raises DataError for one that cannot be used.
        """
        if not isinstance(pattern, str) or not pattern:
            raise DataError("the regular expression is not a string, or empty")
        if len(pattern) > MAX_REGEX:
            raise DataError(
                f"the regular expression has {len(pattern)} characters; expected at most {MAX_REGEX}"
            )
        _check_utf8([pattern], "the regular expression")
        return self._guide(self._library.LLMatcher.grammar_from_regex(pattern), "the regular expression")

    def choice(self, texts: Sequence[str]) -> Guide:
        """One of some texts. Raises DataError when they are none, too many or empty."""
        whole = isinstance(texts, (list, tuple)) and all(isinstance(text, str) and text for text in texts)
        if not whole or not 1 <= len(texts) <= MAX_CHOICES:
            raise DataError(f"the choice is not a list of 1 to {MAX_CHOICES} non-empty strings")
        _check_utf8(texts, "the choice")
        if sum(len(text.encode()) for text in texts) > MAX_SCHEMA_BYTES:
            raise DataError(f"the choice has more than {MAX_SCHEMA_BYTES} bytes")
        return self._guide(
            self._library.LLMatcher.grammar_from_regex("|".join(map(_literal, texts))), "the choice"
        )

    def _guide(self, grammar: str, what: str) -> Guide:
        try:
            matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
            # The first mask costs most; here it is the caller's time and not a decode step's.
            matcher.compute_bitmask()
            error = matcher.get_error() if matcher.is_error() else ""
        except ValueError as raised:
            error = str(raised) or "refused"
        if error:
            raise DataError(f"{what} cannot be used: {_first_line(error)}")
        return Guide(matcher, self._ids, self._vocab_size, self._eos_ids)


class _Bytes:
    """A tokenizer as llguidance reads it: the bytes of every id, and which are special."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Sequence[int]) -> None:
        self.eos_token_id, self.bos_token_id = eos_ids[0], tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(index) or b"" for index in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted({*tokenizer.control.values(), *eos_ids})
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode_text(text.decode("utf-8") if isinstance(text, bytes) else text)


def _literal(text: str) -> str:
    """A regular expression for exactly `text`."""
    return "".join(char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


def _check_utf8(texts: Sequence[str], what: str) -> None:
    if any("\ud800" <= char <= "\udfff" for text in texts for char in text):
        raise DataError(f"{what} holds a lone surrogate")


def _depth(value: Any) -> int:
    """How deep containers are nested; without recursion, and no deeper than is refused."""
    level, depth = [value], 0
    while level and depth <= MAX_SCHEMA_DEPTH:
        inner = []
        for item in level:
            if isinstance(item, Mapping):
                inner += item.values()
            elif isinstance(item, (list, tuple)):
                inner += item
        level = [item for item in inner if isinstance(item, (Mapping, list, tuple))]
        depth += 1
    return depth


def _first_line(text: str) -> str:
    """A message of the library in one line of bounded length."""
    return " ".join(text.split())[:300]
