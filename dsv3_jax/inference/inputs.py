"""Prompt files: a text with a prompt a line, or JSON lines. A bad line is a record of its own, never a crash."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import nearest
from dsv3_jax.errors import ConfigError, DataError, UserError
from dsv3_jax.inference.load import OpenedModel
from dsv3_jax.inference.options import RULES, Sampling, check, check_ids
from dsv3_jax.inference.requests import Request, check_prompt
from dsv3_jax.text import ChatFormat, chat_format, render_messages

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
KEYS = (*PROMPT_KEYS, "id", *RULES)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the input: its request, or what is wrong with it."""

    index: int
    id: str | int
    request: Request | None = None
    error: str | None = None


class PromptReader:
    """Turns lines into requests for one model."""

    def __init__(self, model: OpenedModel, defaults: Sampling) -> None:
        self._model = model
        self._defaults = defaults
        self._format: ChatFormat | None = None

    def read(self, path: Path) -> Iterator[Line]:
        """Lines of a .txt or .jsonl file in order.

        Only "\\n" and "\\r\\n" end a line. In a .txt an empty line is an empty prompt; in a .jsonl it is a bad one,
        except at the end.
        Raises ConfigError for a missing file or another kind of file.
        """
        parse = parser_of(path, self)
        try:
            file = path.open("rb")
        except OSError as error:
            raise ConfigError(f"--input {path}: {error.strerror}") from None
        blank: list[Line] = []  # of a .jsonl: bad lines, unless nothing else follows
        with file:
            for index, raw in enumerate(file):
                if index == 0:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
                raw = raw.removesuffix(b"\n").removesuffix(b"\r")
                line = parse(index, raw)
                if parse == self.json_line and not raw.strip():
                    blank.append(line)
                    continue
                yield from blank
                blank.clear()
                yield line

    def text_line(self, index: int, raw: bytes) -> Line:
        """A line of a .txt file."""
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            return Line(index, index, error=f"not UTF-8 text: byte {error.start} is 0x{raw[error.start]:02x}")
        try:
            return Line(index, index, self.request(index, {"prompt": text}))
        except DataError as error:
            return Line(index, index, error=str(error))

    def json_line(self, index: int, raw: bytes) -> Line:
        """A line of a .jsonl file."""
        name: str | int = index
        try:
            fields = parse_object(raw)
            name = _id_of(fields, index)
            return Line(index, name, self.request(index, fields))
        except DataError as error:
            return Line(index, name, error=str(error))

    def request(self, index: int, fields: dict[str, Any]) -> Request:
        """The request of a line's fields. Raises DataError naming the key, the value and what was expected."""
        for key in fields:
            if key not in KEYS:
                raise DataError(f"unknown key {str(key)[:80]!r}; {nearest(str(key), KEYS)}")
        given = [key for key in PROMPT_KEYS if fields.get(key) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise DataError(f"exactly one of prompt, prompt_token_ids and messages is needed; found {found}")
        sampling = self._sampling(fields)
        ids = self._ids(given[0], fields[given[0]])
        check_prompt(self._model.cfg, ids, sampling.max_new_tokens)
        return Request(np.asarray(ids, np.int32), sampling, index)

    def _sampling(self, fields: dict[str, Any]) -> Sampling:
        own = {name: fields[name] for name in RULES if fields.get(name) is not None}
        if "stop" in own:
            own["stop"] = (own["stop"],) if isinstance(own["stop"], str) else own["stop"]
        for name in ("stop", "stop_token_ids"):
            if isinstance(own.get(name), list):
                own[name] = tuple(own[name])
        if "logit_bias" in own:
            own["logit_bias"] = _biases(own["logit_bias"])
        sampling = check(dataclasses.replace(self._defaults, **own), DataError)
        check_top(sampling, self._model.cfg.vocab_size, DataError)
        check_ids(sampling, self._model.cfg.vocab_size, DataError)
        return sampling

    def _ids(self, kind: str, value: Any) -> list[int]:
        tokenizer = self._model.tokenizer
        if kind == "prompt":
            if not isinstance(value, str):
                raise DataError(f"prompt is {_shown(value)}; expected a string")
            return tokenizer.encode_prompt(value, self._model.cfg.bos_token_id)
        if kind == "messages":
            self._format = self._format or chat_format(tokenizer)
            return render_messages(tokenizer, value, fmt=self._format)
        if not isinstance(value, list):
            raise DataError(f"prompt_token_ids is {_shown(value)}; expected a list of token ids")
        for index in value:
            if isinstance(index, bool) or not isinstance(index, int):
                raise DataError(f"prompt_token_ids holds {_shown(index)}; expected integers")
        return value


def parser_of(path: Path, reader: PromptReader) -> Callable[[int, bytes], Line]:
    """What reads a line of this kind of file. Raises ConfigError for a name that ends neither in .txt nor .jsonl."""
    parsers = {".txt": reader.text_line, ".jsonl": reader.json_line}
    if path.suffix.lower() not in parsers:
        raise ConfigError(f"--input {path}: expected a .txt (a prompt a line) or a .jsonl file")
    return parsers[path.suffix.lower()]


def check_top(sampling: Sampling, vocab_size: int, error: type[UserError], dash: bool = False) -> None:
    """Raises `error` when more log-probabilities are asked for than the vocabulary has ids."""
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(sampling, name)
        if value is not None and value > vocab_size:
            shown = "--" + name.replace("_", "-") if dash else name
            raise error(f"{shown} is {value}; the vocabulary has {vocab_size} ids")


def parse_object(raw: bytes) -> dict[str, Any]:
    """A JSON object as strict as the format: no NaN, no number beyond float, no key twice, UTF-8.

    Raises DataError saying what is wrong.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique
        )
    except DataError:
        raise
    except RecursionError:
        raise DataError("not valid JSON: nested too deeply") from None
    except ValueError as error:  # syntax, bytes that are not UTF-8, integers of thousands of digits
        raise DataError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"the line is {_shown(value)}; expected a JSON object")
    return value


def _no_constant(name: str) -> None:
    raise DataError(f"not valid JSON: {name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise DataError(f"the number {text[:40]} is too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise DataError(f"the key {key[:80]!r} is given twice")
        result[key] = value
    return result


def _biases(value: Any) -> tuple[tuple[int, Any], ...]:
    """Pairs from JSON's object of biases by token id, {"123": -100}."""
    if not isinstance(value, dict):
        raise DataError(f"logit_bias is {_shown(value)}; expected an object of biases by token id")
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise DataError(f"logit_bias names token id {key[:40]!r}; expected an integer of 0 or more")
    return tuple((int(key), bias) for key, bias in value.items())


def _id_of(fields: dict[str, Any], index: int) -> str | int:
    value = fields.get("id")
    if value is None:
        return index
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DataError(f"id is {_shown(value)}; expected a string or an integer")
    if (
        isinstance(value, str)
        and not value.isprintable()
        and any("\ud800" <= char <= "\udfff" for char in value)
    ):
        raise DataError("id holds a lone surrogate")
    return value


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
