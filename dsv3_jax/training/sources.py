"""Documents: from files the user names, and from the Python installation itself.

Files: .txt .md .rst .py are one document each, .jsonl one a line (an object with a string "text"); folders are
walked in sorted order, hidden names left out.

Named sources need no network; what they hold depends a little on the Python version:
    python-docs     the docstrings of the standard library and the language reference of `pydoc_data`: English
                    with short examples. The demo's data: about 2.2 MB, the best samples of a model this small.
    python-stdlib   the source files of the standard library without its tests: about 12 MB of code.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dsv3_jax.errors import ConfigError, DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Document(NamedTuple):
    """A text and where it is from, for messages: `file` or `file:line`."""

    origin: str
    text: str


def find_files(sources: Sequence[str | Path]) -> list[Path]:
    """The readable files among `sources`, folders walked. ConfigError for a missing path or an unknown kind."""
    suffixes = (*TEXT_SUFFIXES, ".jsonl")
    found: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = sorted(
                path
                for path in source.rglob("*")
                if path.suffix in suffixes
                and path.is_file()
                and not any(part.startswith(".") for part in path.relative_to(source).parts)
            )
            if not inside:
                raise DataError(f"{source}: no {', '.join(suffixes)} file in this folder")
            found += inside
        elif not source.exists():
            names = ", ".join(NAMED_SOURCES)
            raise ConfigError(f"{source}: no such file or folder (named sources are {names})")
        elif source.suffix not in suffixes:
            raise ConfigError(f"{source}: unknown kind of file, expected one of {', '.join(suffixes)}")
        else:
            found.append(source)
    return found


def utf8(data: bytes, path: Path, first_line: int = 1) -> str:
    """Text of a file from line `first_line` on. DataError naming file and line."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line}: not UTF-8 ({error.reason}, byte 0x{data[error.start]:02x})"
        ) from None


def read_files(paths: Sequence[Path]) -> Iterator[Document]:
    """The documents of the files. DataError naming file and line for what cannot be read."""
    for path in paths:
        if path.suffix != ".jsonl":
            yield Document(str(path), utf8(path.read_bytes(), path))
            continue
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Document(
                        f"{path}:{number}", json_text(utf8(line, path, number), f"{path}:{number}")
                    )


def json_text(line: str, origin: str, key: str = "text") -> str:
    """The string under `key` of a line of jsonl. DataError naming its origin."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{origin}: not valid JSON ({error})") from None
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        raise DataError(f'{origin}: expected an object with a string "{key}", found {line.strip()[:60]}')
    return value[key]


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path for path in root.rglob("*.py") if not _LEFT_OUT.intersection(path.relative_to(root).parts)
    )


def _stdlib_source(path: Path) -> str | None:
    """A standard library file as text, or None for one that is empty or, on purpose, not valid Python."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
    except (SyntaxError, UnicodeDecodeError):
        return None
    return text if text.strip() else None


def python_stdlib() -> Iterator[Document]:
    """Source files of the standard library, without tests and the tables among the codecs."""
    for path in _stdlib_files():
        if path.parent.name in ("encodings", "pydoc_data"):
            continue
        text = _stdlib_source(path)
        if text is not None:
            yield Document(str(path), text.expandtabs())


def _tidy(text: str) -> str:
    """No trailing blanks, at most one empty line in a row, one newline at the end."""
    lines = "\n".join(line.rstrip() for line in text.expandtabs().splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip() + "\n"


def python_docs() -> Iterator[Document]:
    """Docstrings of the standard library and the language reference.

    A document is the docstring of a module or of a top-level function, or those of a class and its methods.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name, topic in sorted(topics.items()):
        if topic not in seen:  # some stand under two names
            seen.add(topic)
            yield Document(f"pydoc_data.topics[{name!r}]", _tidy(topic))
    for path in _stdlib_files():
        source = _stdlib_source(path)
        tree = None if source is None else _parsed(source)
        if tree is None:
            continue
        groups: list[list[ast.AST]] = [[tree], *(list(ast.walk(node)) for node in tree.body)]
        for group in groups:
            found = [
                _tidy(inspect.cleandoc(docstring))
                for node in group
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and (docstring := ast.get_docstring(node, clean=False))
            ]
            new = [docstring for docstring in dict.fromkeys(found) if docstring not in seen]
            seen.update(new)
            joined = "\n".join(new)
            if len(joined) >= 40:  # a few words alone teach nothing
                yield Document(f"{path}:{getattr(group[0], 'lineno', 1)}", joined)


def _parsed(source: str) -> ast.Module | None:
    """The syntax tree, or None: lib2to3 keeps files of Python 2."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old files
        try:
            return ast.parse(source)
        except SyntaxError:
            return None


NAMED_SOURCES: dict[str, Callable[[], Iterator[Document]]] = {
    "python-docs": python_docs,
    "python-stdlib": python_stdlib,
}
