"""Text to token shards: `python -m dsv3_jax.training.prepare SRC… DST --tokenizer bytes|deepseek|bpe:N|DIR`.

SRC is a file, a folder, or a named source (dsv3_jax/training/sources.py); DST a folder that does not exist yet.
Everything is written to a hidden folder beside DST, flushed to disk and renamed, so DST is complete or absent.
"""

from __future__ import annotations

import argparse
import difflib
import fcntl
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from shutil import rmtree
from typing import Any, NoReturn

import numpy as np

from dsv3_jax.errors import ConfigError, DataError, run_main
from dsv3_jax.text.bpe import train_bpe
from dsv3_jax.text.tokenizer import Tokenizer
from dsv3_jax.training.shards import FORMAT, ShardWriter, dtype_name, read_index
from dsv3_jax.training.sources import NAMED_SOURCES, Document, find_files, read_files

SHARD_TOKENS = 100_000_000
RECIPE = 1  # raised when the same source would give other tokens: caches are then made anew


def load_tokenizer(name: str, documents: Callable[[], Iterable[Document]]) -> Tokenizer:
    """The tokenizer "bytes", "deepseek", "bpe:N" (N ids, trained on the documents), or that of a folder.

    Raises ConfigError if there is none or it cannot encode text.
    """
    if name == "bytes":
        return Tokenizer.bytes()
    if name == "deepseek":
        return Tokenizer.deepseek()
    if name.startswith("bpe:"):
        if not name[4:].isdecimal():
            raise ConfigError(f"--tokenizer {name}: expected bpe:N with the number of ids, such as bpe:1024")
        return train_bpe((document.text for document in documents()), int(name[4:]))
    tokenizer = Tokenizer.load(name)
    if tokenizer is None:
        raise ConfigError(f"--tokenizer {name}: not bytes, deepseek, bpe:N or a folder with a tokenizer.json")
    if not tokenizer.can_encode:
        raise ConfigError(
            f"--tokenizer {name}: only tiktoken.model is there, which is not supported for text"
        )
    return tokenizer


def prepare(
    documents: Iterable[Document],
    dst: str | Path,
    tokenizer: Tokenizer,
    *,
    tokenizer_name: str = "",
    source: str = "",
    val_fraction: float = 0.0,
    shard_tokens: int = SHARD_TOKENS,
    force: bool = False,
) -> dict[str, Any]:
    """Tokenise documents into the data folder `dst`; returns its index.

    `val_fraction` of the documents, chosen by the hash of their text (so equal texts stay together and the choice
    does not depend on order), make the split "validation". Empty documents are left out. `force` replaces an empty
    folder or an older data folder, which stays until the new one is complete.
    Raises ConfigError for an existing `dst` or wrong settings, DataError naming the origin of a bad document.
    """
    dst = Path(dst)
    _check_settings(tokenizer, val_fraction, shard_tokens)
    _check_target(dst, force)
    with _temporary_beside(dst) as temporary:
        writers = {
            split: ShardWriter(temporary, split, tokenizer.vocab_size, shard_tokens)
            for split in ("train", "validation")
        }
        tokens = count = 0
        for ids, document in encode_documents(documents, tokenizer):
            split = "validation" if hash_fraction(document) < val_fraction else "train"
            writers[split].add(ids)
            tokens, count = tokens + len(ids), count + 1
        if not count:
            raise DataError(f"{source or 'the source'}: no text in it")
        index = {
            "format": FORMAT,
            "dtype": dtype_name(tokenizer.vocab_size),
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": {"name": tokenizer_name or tokenizer.origin, "sha256": tokenizer.sha256},
            "source": source,
            "recipe": RECIPE,
            "val_fraction": val_fraction,
            "documents": count,
            "tokens": tokens,
            "shards": [entry for writer in writers.values() for entry in writer.close()],
        }
        tokenizer.save(temporary / "tokenizer")
        (temporary / "index.json").write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", "utf-8")
        _commit(temporary, dst, force)
    return index


def _check_settings(tokenizer: Tokenizer, val_fraction: float, shard_tokens: int) -> None:
    if not 0 <= val_fraction < 1:
        raise ConfigError(f"--val-fraction {val_fraction}: expected 0 <= fraction < 1")
    if shard_tokens < 1:
        raise ConfigError(f"--shard-tokens {shard_tokens}: expected a positive number")
    check_ends(tokenizer)


def check_ends(tokenizer: Tokenizer) -> None:
    """ConfigError for a tokenizer without BOS or EOS."""
    if tokenizer.bos_id is None or not tokenizer.eos_ids:
        raise ConfigError(
            f"{tokenizer.origin}: names no bos_token or no eos_token, which stand around a document"
        )


def _check_target(dst: Path, force: bool) -> None:
    if not dst.exists():
        return
    if not force:
        raise ConfigError(f"{dst} exists; --force replaces it")
    if not dst.is_dir() or (any(dst.iterdir()) and not (dst / "index.json").is_file()):
        raise ConfigError(
            f"{dst} is not a folder of token shards; --force replaces only those and empty folders"
        )


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[tuple[np.ndarray, Document]]:
    """Ids (BOS, text, EOS) of each document that is not empty, tokenised in blocks on all cores.

    Raises DataError naming the origin of a document that is not text.
    """
    bos, eos = np.asarray([tokenizer.bos_id], np.int32), np.asarray(tokenizer.eos_ids[:1], np.int32)
    remaining = iter(documents)
    while block := list(islice(remaining, 256)):
        kept = [document for document in block if document.text]
        for document in kept:
            utf8_bytes(document)
        for document, ids in zip(
            kept, tokenizer.encode_batch([document.text for document in kept]), strict=True
        ):
            yield np.concatenate([bos, ids, eos]), document


def utf8_bytes(document: Document) -> bytes:
    """DataError naming the origin of a text that has no UTF-8."""
    try:
        return document.text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(document.text[error.start])
        raise DataError(f"{document.origin}: lone surrogate U+{code:04X} in the text") from None


def hash_fraction(document: Document) -> float:
    """A number in [0, 1) that follows from the text: below `val_fraction` it is held out."""
    return int.from_bytes(hashlib.sha256(utf8_bytes(document)).digest()[:8], "big") / 2**64


# --- complete or absent ------------------------------------------------------------------------------------


@contextmanager
def _temporary_beside(dst: Path) -> Iterator[Path]:
    """A new hidden folder beside `dst`, removed if it is still there at the end.

    Its owner holds a lock on its `.lock` while it lives, so that folders of killed processes can be told and removed.
    """
    dst.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{dst.name}.tmp-"
    for other in dst.parent.glob(f"{prefix}*"):
        _remove_abandoned(other)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=dst.parent))
    temporary.chmod(0o777 & ~_umask())
    with open(temporary / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield temporary
        finally:
            rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _remove_abandoned(folder: Path) -> None:
    try:
        with open(folder / ".lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            rmtree(folder, ignore_errors=True)
    except FileNotFoundError:  # just being made, or just gone
        return
    except BlockingIOError:  # at work
        return


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _commit(temporary: Path, dst: Path, force: bool) -> None:
    (temporary / ".lock").unlink()
    for path in sorted(temporary.rglob("*"), reverse=True):
        _fsync(path)
    _fsync(temporary)
    if not force:
        try:
            os.rename(temporary, dst)
        except OSError as error:
            if dst.exists():  # made by someone else in the meantime
                raise ConfigError(f"{dst} exists; --force replaces it") from error
            raise
    else:
        old = Path(tempfile.mkdtemp(prefix=f".{dst.name}.old-", dir=dst.parent))
        if dst.exists():
            os.rename(dst, old)
        os.rename(temporary, dst)
        rmtree(old)
    _fsync(dst.parent)


# --- the cache of named sources ----------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where named sources are prepared: $DSV3_CACHE, or dsv3_jax in $XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("DSV3_CACHE"):
        return Path(named)
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "dsv3_jax"
    try:
        return Path.home() / ".cache" / "dsv3_jax"
    except RuntimeError:
        raise ConfigError("this user has no home folder for a cache; name one with DSV3_CACHE") from None


def prepare_default(
    name: str, cache_dir: str | Path | None = None, *, tokenizer: str = "bytes", val_fraction: float = 0.01
) -> Path:
    """The data folder of a named source, made on first use.

    Of processes that ask at once one makes it and the others wait; what a killed one left is made anew.
    Raises ConfigError for an unknown name or a cache folder that cannot be written.
    """
    if name not in NAMED_SOURCES:
        near = difflib.get_close_matches(name, NAMED_SOURCES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"data.source {name!r} is neither a folder nor one of {', '.join(NAMED_SOURCES)}{hint}"
        )
    documents = NAMED_SOURCES[name]
    folder = Path(cache_dir) if cache_dir is not None else cache_folder()
    # A trained tokenizer follows from its name and the source; one that is there already is told by its content.
    trained = tokenizer.startswith("bpe:")
    label = tokenizer.replace(":", "") if trained else load_tokenizer(tokenizer, documents).sha256[:8]
    python = ".".join(map(str, sys.version_info[:3]))
    dst = folder / f"{name}-{label}-{val_fraction:g}-py{python}-{RECIPE}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / f".{dst.name}.lock", "wb")  # noqa: SIM115  closed below
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror}); name another cache with DSV3_CACHE"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if dst.exists():
            try:
                read_index(dst)
                return dst
            except DataError as error:
                print(f"{error}; preparing it anew", file=sys.stderr)
                rmtree(dst)
        print(f"preparing {name} once, in {dst}", file=sys.stderr)
        prepare(
            documents(),
            dst,
            load_tokenizer(tokenizer, documents),
            tokenizer_name=tokenizer,
            source=name,
            val_fraction=val_fraction,
        )
    return dst


# --- command line ------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.format_usage().strip()}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m dsv3_jax.training.prepare",
        description="Tokenise text into shards for training.",
        allow_abbrev=False,
    )
    names = ", ".join(NAMED_SOURCES)
    parser.add_argument(
        "src", nargs="+", metavar="SRC", help=f".txt .md .rst .py .jsonl, a folder of them, or {names}"
    )
    parser.add_argument("dst", metavar="DST", help="folder to make")
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="bytes, deepseek, bpe:N (N ids, trained on SRC), or a folder with a tokenizer.json",
    )
    parser.add_argument("--val-fraction", type=float, default=0.0, help="share of documents held out")
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, help="tokens a shard")
    parser.add_argument("--force", action="store_true", help="replace an older data folder")
    parsed, unknown = parser.parse_known_args(arguments)
    flags = [flag for flag in unknown if flag.startswith("-")]
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches((flags or unknown)[0].split("=")[0], known, 1)
        parser.error(
            f"unknown argument {(flags or unknown)[0]}" + (f"; did you mean {near[0]}?" if near else "")
        )
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    parsed = _parse(arguments)
    paths = [source for source in parsed.src if source not in NAMED_SOURCES]
    files = find_files(paths)
    named = [source for source in parsed.src if source in NAMED_SOURCES]

    def documents() -> Iterator[Document]:
        for name in named:
            yield from NAMED_SOURCES[name]()
        yield from read_files(files)

    index = prepare(
        documents(),
        parsed.dst,
        load_tokenizer(parsed.tokenizer, documents),
        tokenizer_name=parsed.tokenizer,
        source=" ".join(map(str, parsed.src)),
        val_fraction=parsed.val_fraction,
        shard_tokens=parsed.shard_tokens,
        force=parsed.force,
    )
    held_out = sum(entry["documents"] for entry in index["shards"] if entry["split"] == "validation")
    print(
        f"{parsed.dst}: {index['documents']:,} documents ({held_out:,} held out), {index['tokens']:,} tokens, "
        f"{len(index['shards'])} shards"
    )
    return 0


if __name__ == "__main__":
    run_main(main)
