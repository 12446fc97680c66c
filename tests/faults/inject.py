"""Faults made inside this process: damaged files, a disk that is full at the n-th write, values that are not finite."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.checkpoint import store
from dsv3_jax.training import trainer

DAMAGES = ("bit flip", "truncated", "missing", "manifest bit flip", "manifest missing", "emptied", "swapped")


def link_copy(source: Path, target: Path) -> None:
    """A copy of a folder whose files are links: to change one, replace it."""
    shutil.copytree(source, target, copy_function=os.link)


def _rewrite(file: Path, content: bytes) -> None:
    file.unlink()  # the link, not the file that others share
    file.write_bytes(content)


def damage(step: Path, kind: str, rng: random.Random) -> str:
    """Damage a step folder (of links); says what was done."""
    files = sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size > 0)
    manifest = step / "manifest.json"
    if kind == "manifest missing":
        manifest.unlink()
        return "manifest.json missing"
    # A byte of the step is as likely as any other.
    file = (
        manifest if kind.startswith("manifest") else rng.choices(files, [f.stat().st_size for f in files])[0]
    )
    if kind in ("missing", "truncated", "emptied"):
        file = rng.choice(files)
    content = file.read_bytes()
    name = str(file.relative_to(step))
    if kind == "missing":
        file.unlink()
    elif kind == "truncated":
        _rewrite(file, content[: rng.randrange(len(content))])
    elif kind == "emptied":
        _rewrite(file, b"")
    elif kind == "swapped":
        others = [f for f in files if f.stat().st_size == len(content) and f.read_bytes() != content]
        if not others:
            return damage(step, "bit flip", rng)
        _rewrite(file, rng.choice(others).read_bytes())
    else:
        at, bit = rng.randrange(len(content)), rng.randrange(8)
        _rewrite(file, content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
        name += f" byte {at} bit {bit}"
    return f"{kind}: {name}"


class FullDisk:
    """From the `after`-th write of a chunk on, the disk is full (a write puts half of its bytes there first)."""

    def __init__(self, after: int) -> None:
        self.after, self.writes, self.refused = after, 0, 0

    def __enter__(self) -> FullDisk:
        self._real = store.os.pwrite
        store.os.pwrite = self._write  # type: ignore[attr-defined]
        return self

    def __exit__(self, *_: object) -> None:
        store.os.pwrite = self._real  # type: ignore[attr-defined]

    def _write(self, fd: int, data: Any, at: int) -> int:
        self.writes += 1
        if self.writes <= self.after:
            return self._real(fd, data, at)
        self.refused += 1
        self._real(fd, data[: len(data) // 2], at)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def not_finite_at(steps: tuple[int, ...], value: float = float("nan")) -> Iterator[None]:
    """Runs of this process meet a weight that is not finite in these steps, so neither loss nor gradients are."""
    real = trainer.make_train_step

    def make(*arguments: Any) -> Any:
        inner = real(*arguments)

        def step(state: Any, batch: Any) -> Any:
            bad = jnp.isin(state.step + 1, jnp.array(steps))
            norm = state.params["final_norm_D"]
            poisoned = state.replace(
                params={**state.params, "final_norm_D": jnp.where(bad, jnp.float32(value), norm)}
            )
            after, metrics = inner(poisoned, batch)
            # The step left its input as it was; what it was given is taken back.
            kept = jnp.where(bad, norm, after.params["final_norm_D"])
            return after.replace(params={**after.params, "final_norm_D": kept}), metrics

        return step

    trainer.make_train_step = make  # type: ignore[assignment]
    try:
        yield
    finally:
        trainer.make_train_step = real  # type: ignore[assignment]


def all_finite(tree: Any) -> bool:
    """Whether every element of a tree of arrays is finite."""
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree))
