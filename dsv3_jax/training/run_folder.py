"""The folder of a run: config.yaml metrics.jsonl report.html tokenizer/ checkpoints/<step>/, and who may write it."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from dsv3_jax.config import RunConfig, dump_yaml, from_mapping, load_yaml, to_mapping
from dsv3_jax.errors import ConfigError
from dsv3_jax.parallel import from_first

CONFIG, METRICS, REPORT = "config.yaml", "metrics.jsonl", "report.html"
TOKENIZER, HF, TENSORBOARD = "tokenizer", "hf", "tensorboard"
_OURS = {CONFIG, METRICS, REPORT, TOKENIZER, HF, TENSORBOARD, "checkpoints", ".lock"}
# What a restart may change; everything else would make it another run.
# Devices are not part of it: a run goes on with the same bits restored, whatever mesh they are cut over.
_MAY_DIFFER = (
    "training.steps",
    "training.watchdog_minutes",
    "training.spike_guard",
    "checkpoint.",
    "logging.",
    "run.",
    "mesh.",
    "moe.",
    "distributed.",
    "data.verify",
    "data.workers",
    "lora.base",  # the same weights may lie elsewhere; other weights are refused by their checksum
)


class RunFolder:
    """A run's folder, locked for this process until `close`.

    path: the folder; resumed: whether it already holds a run.
    """

    def __init__(self, cfg: RunConfig) -> None:
        """Open `cfg.run.dir`, or make runs/<name>-<time>.

        Raises ConfigError when the folder holds something else, a run with another config (naming the key), or is
        in use.
        """
        named = cfg.run.dir is not None
        self.path = Path(cfg.run.dir) if cfg.run.dir is not None else _new_name(cfg.run.name)
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run.dir {self.path}: not a folder")
        if named and self.path.is_dir():
            foreign = sorted({child.name for child in self.path.iterdir()} - _OURS)
            if foreign and not (self.path / CONFIG).is_file():
                raise ConfigError(f"run.dir {self.path}: not a run folder (no {CONFIG}, but {foreign[0]!r})")
        self._made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except PermissionError as error:
            raise ConfigError(f"run.dir {self.path}: cannot be made ({error.strerror})") from None
        self._lock = _lock(self.path / ".lock")
        self.resumed = (self.path / CONFIG).is_file()
        if self.resumed:
            try:
                self._compare(cfg)
            except ConfigError:
                self._lock.close()
                raise

    def _compare(self, cfg: RunConfig) -> None:
        saved = _flat(to_mapping(from_mapping(RunConfig, load_yaml(self.path / CONFIG))))
        now = _flat(to_mapping(cfg))
        for key in sorted(saved.keys() | now.keys()):
            free = any(key.startswith(name) if name.endswith(".") else key == name for name in _MAY_DIFFER)
            if saved.get(key) != now.get(key) and not free:
                names = ", ".join(name if not name.endswith(".") else f"{name}*" for name in _MAY_DIFFER)
                raise ConfigError(
                    f"{self.path} is a run with {key} = {saved.get(key)!r}, not {now.get(key)!r}; on resume only "
                    f"{names} may differ (a new run needs another run.dir)"
                )

    def save_config(self, cfg: RunConfig) -> None:
        """Write the resolved config; from then on the folder holds a run."""
        cfg = dataclasses.replace(
            cfg,
            run=dataclasses.replace(cfg.run, dir=str(self.path)),
            distributed=dataclasses.replace(
                cfg.distributed, cluster="auto", coordinator_address=None, num_processes=None, process_id=None
            ),
        )
        write_whole(self.path / CONFIG, dump_yaml(to_mapping(cfg)))

    def close(self) -> None:
        """Give the lock back; a new folder in which no run was begun is removed."""
        if self._made and not (self.path / CONFIG).exists():
            (self.path / ".lock").unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()
        self._lock.close()


class FollowedFolder:
    """A run's folder in the processes that write nothing there: process 0 has opened it."""

    def __init__(self, path: Path, resumed: bool) -> None:
        """Raises ConfigError when the folder is not there: it must be on a disk that all processes share."""
        self.path, self.resumed = path, resumed
        if not path.is_dir():
            raise ConfigError(
                f"run.dir {path}: made by process 0, but not there for this process; expected a folder on a shared disk"
            )

    def save_config(self, cfg: RunConfig) -> None:
        """Nothing: process 0 does it."""

    def close(self) -> None:
        """Nothing."""


def open_run_folder(cfg: RunConfig) -> RunFolder | FollowedFolder:
    """The run's folder: opened and locked by process 0, followed by the others. Raises as `RunFolder` does."""
    opened: list[RunFolder] = []

    def make() -> list[Any]:
        opened.append(RunFolder(cfg))
        return [str(opened[0].path.absolute()), opened[0].resumed]

    path, resumed = from_first("run folder", make)
    return opened[0] if opened else FollowedFolder(Path(path), resumed)


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is either the old or the new one."""
    temporary = path.with_name(f".{path.name}.writing")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _new_name(name: str) -> Path:
    base = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, count = base, 1
    while path.exists():
        count += 1
        path = base.with_name(f"{base.name}-{count}")
    return path


def _lock(path: Path) -> IO[bytes]:
    file = open(path, "wb")  # noqa: SIM115  the lock lives as long as the file is open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"run.dir {path.parent}: another process is training in this folder") from None
    return file


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
