"""JSON bodies, read stricter than Python does: what a later stage could choke on is refused here."""

from __future__ import annotations

import json
import math
from typing import Any

from dsv3_jax.serving.api_errors import bad_request

MAX_DEPTH = 64
"""Deepest nesting of arrays and objects; a tool's JSON schema is the deepest thing a client has to send."""
_INTEGER_DIGITS = 19
_NOT_JSON = "the body is not valid JSON"


class _Refused(Exception):
    """Why a number or an object is refused."""


def parse_json(raw: bytes) -> dict[str, Any]:
    """The object in a body.

    Refused with a 400: bytes that are not UTF-8, NaN and infinities, numbers beyond float64 or int64, a key given
    twice, lone surrogates, nesting beyond `MAX_DEPTH`, and whatever is not an object.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise bad_request(f"{_NOT_JSON}: it is not UTF-8", code="invalid_json") from None
    try:
        value = json.loads(
            text, parse_constant=_constant, parse_float=_float, parse_int=_int, object_pairs_hook=_object
        )
    except _Refused as refused:
        raise bad_request(f"{_NOT_JSON}: {refused}", code="invalid_json") from None
    except RecursionError:
        raise bad_request(f"{_NOT_JSON}: nested too deeply", code="invalid_json") from None
    except json.JSONDecodeError as error:  # its message may quote nothing but Python's own words
        where = f"line {error.lineno}, column {error.colno}"
        raise bad_request(f"{_NOT_JSON} ({where})", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object", code="invalid_json")
    _check_depth(value)
    if "\\u" in text:  # no other way to write a surrogate in UTF-8
        _check_surrogates(value)
    return value


def _constant(_: str) -> None:
    raise _Refused("NaN and Infinity are no JSON numbers")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused("a number is too large")
    return value


def _int(text: str) -> int:
    if len(text) > _INTEGER_DIGITS:  # a sign counts as a digit: no int64 is lost but those below -10**18
        raise _Refused("an integer is too large")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Refused("an object has a key twice")
    return found


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise bad_request(f"{_NOT_JSON}: nested deeper than {MAX_DEPTH}", code="invalid_json")
        level = [child for parent in level for child in _children(parent) if isinstance(child, (dict, list))]


def _check_surrogates(value: Any) -> None:
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            if not item.isascii() and any("\ud800" <= char <= "\udfff" for char in item):
                raise bad_request(f"{_NOT_JSON}: a string has a lone surrogate", code="invalid_json")
        elif isinstance(item, dict):
            todo += [*item, *item.values()]
        elif isinstance(item, list):
            todo += item
