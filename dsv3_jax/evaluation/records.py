"""Task files: JSON lines or text for the items, YAML for what goes with them. Every error names the file and line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3_jax.config import load_yaml, nearest
from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.evaluation.prompts import TEXT, Part, Prompt
from dsv3_jax.inference.inputs import parse_object

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """A record and where it is from, such as "questions.jsonl: line 3"."""

    fields: Record
    where: str


@dataclasses.dataclass(frozen=True)
class Spec:
    """A YAML task file, or what a task has without one.

    Attributes:
      task: the kind: perplexity, multiple_choice, exact_match or code.
      name: what results are called; by default that of the file.
      data: the items' file, beside the YAML file; `shots_data` that of the examples, by default the items themselves.
      fields: where an item's fields are in a record: for `prompt`, `test` and `program` a template over the record's
        keys such as "Q: {question}\\nA:", for the others a key.
      shots: examples before each prompt, `separator` between them, `delimiter` between a prompt and its answer.
      stop, max_new_tokens: of answers.
      pattern: regular expression whose last match in the answer (its first group, if it has one) is what counts.
      ignore_case: of exact match.
      seed: of which examples are shown.
    """

    task: str
    name: str
    data: Path | None = None
    shots_data: Path | None = None
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shots: int = 0
    separator: str = "\n\n"
    delimiter: str = " "
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    pattern: str | None = None
    ignore_case: bool = False
    seed: int = 0


_TYPES: dict[str, tuple[type, ...]] = {
    "task": (str,),
    "name": (str,),
    "data": (str,),
    "shots_data": (str,),
    "fields": (dict,),
    "shots": (int,),
    "separator": (str,),
    "delimiter": (str,),
    "stop": (list,),
    "max_new_tokens": (int,),
    "pattern": (str,),
    "ignore_case": (bool,),
    "seed": (int,),
}


def read_spec(path: Path, kinds: Sequence[str]) -> Spec:
    """The task of a YAML file. Raises ConfigError naming file and key."""
    values = load_yaml(path)
    for key, value in values.items():
        if key not in _TYPES:
            raise ConfigError(f"{path}: unknown key {key!r}; {nearest(str(key), list(_TYPES))}")
        wrong = not isinstance(value, _TYPES[key]) or (isinstance(value, bool) and _TYPES[key] == (int,))
        if wrong or (isinstance(value, int) and value < 0):
            raise ConfigError(f"{path}: {key} is {value!r}; expected {_TYPES[key][0].__name__}")
    for key in ("task", "data"):
        if key not in values:
            raise ConfigError(f"{path}: {key} is missing")
    if values["task"] not in kinds:
        raise ConfigError(f"{path}: task is {values['task']!r}; {nearest(values['task'], kinds)}")
    if "pattern" in values:
        try:
            re.compile(values["pattern"])
        except re.error as error:
            raise ConfigError(f"{path}: pattern {values['pattern']!r}: {error}") from None
    for what in ("fields", "stop"):
        inside = values.get(what, [])
        inside = [*inside, *inside.values()] if isinstance(inside, dict) else inside
        if not all(isinstance(item, str) and item for item in inside):
            raise ConfigError(f"{path}: {what} is {values[what]!r}; expected strings")
    folder = path.parent
    made: dict[str, Any] = {"name": path.stem, **values, "stop": tuple(values.get("stop", ()))}
    for key in ("data", "shots_data"):
        if key in values:
            made[key] = folder / values[key]
    return Spec(**made)


def read_rows(path: Path, *, text: bool = False) -> list[Row]:
    """Records of a .jsonl file; with `text` also a .txt file, which is one record {"text": ...}.

    Raises ConfigError for a file that is not there or of another kind, DataError for a line that is no JSON object and
    for a file without records.
    """
    kinds = (".jsonl", ".txt") if text else (".jsonl",)
    if path.suffix.lower() not in kinds:
        raise ConfigError(f"{path}: expected a file that ends in {' or '.join(kinds)}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    data = data.removeprefix(b"\xef\xbb\xbf")
    if path.suffix.lower() == ".txt":
        try:
            content = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}"
            ) from None
        rows = [Row({"text": content}, str(path))] if content.strip() else []
    else:
        rows = []
        for number, line in enumerate(data.split(b"\n"), 1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            try:
                rows.append(Row(parse_object(line), where))
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
    if not rows:
        raise DataError(f"{path}: no records; at least one is needed")
    return rows


class Fields:
    """Takes an item's fields out of a record, with errors that name the line and the key."""

    def __init__(self, row: Row, names: Mapping[str, str]) -> None:
        self.row, self._names = row, names

    def error(self, message: str) -> DataError:
        """An error about this record."""
        return DataError(f"{self.row.where}: {message}")

    def value(self, field: str, default: Any = None) -> Any:
        """A field's value, or the default where the record has none."""
        return self.row.fields.get(self._names.get(field, field), default)

    def text(self, field: str, *, empty: bool = False) -> str:
        """A string: the template of the field filled in, or the record's own key."""
        template = self._names.get(field)
        if template is not None and "{" in template:
            return self._fill(field, template)
        key = template or field
        value = self.row.fields.get(key)
        if not isinstance(value, str) or (not value and not empty):
            raise self.error(f"{key} is {_shown(value)}; expected a {'' if empty else 'non-empty '}string")
        return value

    def prompt(self, field: str = "prompt") -> Prompt:
        """A string, or a list of parts {"type": "text", "text": ...}; other types are for models that read them."""
        value = self.value(field)
        if not isinstance(value, list):
            return (Part(TEXT, self.text(field, empty=True)),)
        parts = []
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if not isinstance(kind, str) or kind not in part or set(part) != {"type", kind}:
                raise self.error(f'a part of {field} is {_shown(part)}; expected {{"type": TYPE, TYPE: ...}}')
            if kind == TEXT and not isinstance(part[TEXT], str):
                raise self.error(f"the text of a part of {field} is {_shown(part[TEXT])}; expected a string")
            parts.append(Part(kind, part[kind]))
        return tuple(parts)

    def texts(self, field: str, least: int) -> tuple[str, ...]:
        """A list of non-empty strings; a single string is a list of one."""
        value = self.value(field)
        value = [value] if isinstance(value, str) else value
        good = isinstance(value, list) and all(isinstance(text, str) and text for text in value)
        if not good or len(value) < least:
            raise self.error(f"{field} is {_shown(value)}; expected {least} or more non-empty strings")
        return tuple(value)

    def index(self, field: str, count: int) -> int:
        """An integer below `count`."""
        value = self.value(field)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            raise self.error(f"{field} is {_shown(value)}; expected an integer from 0 to {count - 1}")
        return value

    def name(self, at: int) -> str:
        """The record's id, or its number."""
        value = self.value("id", at)
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise self.error(f"id is {_shown(value)}; expected a string or an integer")
        return str(value)

    def _fill(self, field: str, template: str) -> str:
        def one(found: re.Match[str]) -> str:
            value = self.row.fields.get(found[1])
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise self.error(
                    f"{found[1]} is {_shown(value)}; the template of {field} needs a text or a number"
                )
            return str(value)

        return re.sub(r"\{(\w+)\}", one, template)


def check_names(items: Iterable[tuple[str, str]]) -> None:
    """Raises DataError when two items (name, where) have one name."""
    seen: dict[str, str] = {}
    for name, where in items:
        if name in seen:
            raise DataError(f"{where}: the id {name!r} was given before ({seen[name]})")
        seen[name] = where


def _shown(value: Any) -> str:
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
