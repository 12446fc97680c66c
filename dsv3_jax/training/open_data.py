"""From `data.source` or `data.mixture` to datasets, held-out rows and their tokenizer."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsv3_jax.config import RunConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.text import Tokenizer
from dsv3_jax.training.data import TokenDataset
from dsv3_jax.training.mixture import MixedEvaluation, Mixture
from dsv3_jax.training.prepare import check_ends, load_tokenizer, prepare_default
from dsv3_jax.training.rows import Dataset, Evaluation
from dsv3_jax.training.sources import NAMED_SOURCES
from dsv3_jax.training.text_dataset import HeldOut, TextDataset
from dsv3_jax.training.text_files import find_text
from dsv3_jax.training.text_streams import SUFFIXES

Say = Callable[[str], None]


@dataclass(frozen=True)
class Opened:
    """What a run reads.

    Attributes:
      train: rows to train on.
      validation: held-out rows, or None.
      tokenizer: that the ids are of; None for shards that came without one.
      notes: what the user should know.
    """

    train: Dataset
    validation: Evaluation | None
    tokenizer: Tokenizer | None
    notes: tuple[str, ...] = ()


def open_data(cfg: RunConfig, init_tokenizer: Path | None) -> Opened:
    """Everything `data` names.

    Args:
      init_tokenizer: that of the weights the run starts from, which text is then tokenised with.
    Raises:
      ConfigError: an unknown source; sources of different tokenizers. DataError: damaged data.
    """
    if not cfg.data.mixture:
        opened = _open_source(cfg, cfg.data.source, init_tokenizer)
    else:
        opened = _open_mixture(cfg, init_tokenizer)
    theirs = None if init_tokenizer is None else Tokenizer.load(init_tokenizer)
    if opened.tokenizer is not None and theirs is not None and opened.tokenizer.sha256 != theirs.sha256:
        raise ConfigError(
            f"{opened.train.origin} was tokenised with another tokenizer ({opened.tokenizer.origin}) than that of "
            f"init.checkpoint ({theirs.origin})"
        )
    return opened


def _open_mixture(cfg: RunConfig, init_tokenizer: Path | None) -> Opened:
    names = [part.source for part in cfg.data.mixture]
    weights = [part.weight for part in cfg.data.mixture]
    opened = [_open_source(cfg, name, init_tokenizer) for name in names]
    ours = {part.tokenizer.sha256: part for part in reversed(opened) if part.tokenizer is not None}
    if len(ours) > 1:
        told = "; ".join(
            f"{part.train.origin}: {part.tokenizer.origin}" for part in ours.values() if part.tokenizer
        )
        raise ConfigError(f"the sources of data.mixture were tokenised with different tokenizers ({told})")
    held_out = [
        (part.validation, weight)
        for part, weight in zip(opened, weights, strict=True)
        if part.validation is not None
    ]
    return Opened(
        train=Mixture(names, [part.train for part in opened], weights),
        validation=MixedEvaluation([v for v, _ in held_out], [w for _, w in held_out], cfg.training.seq_len)
        if held_out
        else None,
        tokenizer=next(iter(ours.values())).tokenizer if ours else None,
        notes=tuple(note for part in opened for note in part.notes),
    )


def _open_source(cfg: RunConfig, source: str, init_tokenizer: Path | None) -> Opened:
    is_folder = Path(source).is_dir()
    if source in NAMED_SOURCES and not is_folder:
        name = cfg.data.tokenizer if init_tokenizer is None else str(init_tokenizer)
        folder = prepare_default(source, tokenizer=name, val_fraction=cfg.data.val_fraction)
        return _open_shards(cfg, folder, [] if init_tokenizer is None else [f"tokenizer: {name}"])
    wants = cfg.data.loader
    if wants == "shards" or (wants == "auto" and is_folder and (Path(source) / "index.json").is_file()):
        if not is_folder:
            raise ConfigError(_unknown(source))
        return _open_shards(cfg, Path(source), [])
    paths = find_text(source)
    if paths:
        return _open_text(cfg, source, paths, init_tokenizer)
    if is_folder and wants == "auto":
        return _open_shards(cfg, Path(source), [])  # which says what is missing
    raise ConfigError(_unknown(source))


def _unknown(source: str) -> str:
    parent = Path(source).parent
    near = [*NAMED_SOURCES]
    if parent.is_dir():
        near += [str(parent / child.name) for child in parent.iterdir()]
    close = difflib.get_close_matches(source, near, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return (
        f"data source {source!r}: expected a folder of token shards, text ({', '.join(SUFFIXES)}: a file, folder or "
        f"pattern), or one of {', '.join(NAMED_SOURCES)}{hint}"
    )


def _open_shards(cfg: RunConfig, folder: Path, notes: list[str]) -> Opened:
    seq_len, vocab_size = cfg.training.seq_len, cfg.model.vocab_size
    data = TokenDataset(folder, seq_len=seq_len, vocab_size=vocab_size, verify=cfg.data.verify)
    notes = [*notes, *data.notes]
    validation = None
    if any(entry["split"] == "validation" for entry in data.index["shards"]):
        validation = TokenDataset(
            folder, seq_len=seq_len, vocab_size=vocab_size, split="validation", verify=cfg.data.verify
        )
    else:
        notes.append(f"note: {folder} holds no validation data; there will be no evaluation on it")
    return Opened(data, validation, Tokenizer.load(folder / "tokenizer"), tuple(notes))


def _open_text(cfg: RunConfig, source: str, paths: list[Path], init_tokenizer: Path | None) -> Opened:
    name = cfg.data.tokenizer if init_tokenizer is None else str(init_tokenizer)
    if name.startswith("bpe:"):
        raise ConfigError(
            f"data.tokenizer {name} is learned from all of the text, which {source} is read without; make token shards "
            f"of it (python -m dsv3_jax.training.prepare {source} DST --tokenizer {name}) or name another tokenizer"
        )
    tokenizer = load_tokenizer(name, lambda: ())
    check_ends(tokenizer)
    dataset = TextDataset(
        source,
        paths,
        tokenizer,
        seq_len=cfg.training.seq_len,
        vocab_size=cfg.model.vocab_size,
        text_key=cfg.data.text_key,
        val_fraction=cfg.data.val_fraction,
        workers=cfg.data.workers,
    )
    return Opened(dataset, HeldOut(dataset) if cfg.data.val_fraction else None, tokenizer)
