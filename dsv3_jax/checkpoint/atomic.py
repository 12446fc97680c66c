"""A folder that appears whole or not at all: written beside its place, fsynced, then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsv3_jax.checkpoint.layout import kind_of
from dsv3_jax.errors import ConfigError, StorageError

_MANY_FILES = 2000
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
_SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _SYNC_FILE_RANGE is not None:
    _SYNC_FILE_RANGE.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def check_target(dst: Path, force: bool) -> None:
    """Raises ConfigError unless `dst` may be written.

    It may when it does not exist; with `force` also when it is an empty folder or recognisably a checkpoint.
    """
    if not os.path.lexists(dst):
        return
    if not force:
        raise ConfigError(f"{dst} exists; give --force to replace it")
    if dst.is_symlink() or not dst.is_dir():
        raise ConfigError(f"{dst} is not a folder: --force replaces only an empty folder or a checkpoint")
    if kind_of(dst) not in ("native", "hf") and any(dst.iterdir()):
        raise ConfigError(f"{dst} is not empty and not a checkpoint: --force does not replace it")


def make_parent(dst: Path) -> None:
    """Make the folder that will hold `dst`. Raises StorageError when it cannot be made or written."""
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise StorageError(
            f"{dst}: its parent folder cannot be made ({error.strerror}: {error.filename})"
        ) from error
    if not os.access(dst.parent, os.W_OK | os.X_OK):
        raise StorageError(f"{dst.parent}: no permission to write there")


def check_apart(src: Path, dst: Path) -> None:
    """Raises ConfigError when replacing `dst` would take `src` with it: the same folder, or one that holds it."""
    source, target = Path(os.path.realpath(src)), Path(os.path.realpath(dst))
    if source == target:
        raise ConfigError(f"{dst}: source and destination are the same folder")
    if target in source.parents:
        raise ConfigError(f"{dst}: the destination holds the source {src}")


def check_free(folder: Path, needed: int, what: str) -> None:
    """Raises StorageError when the disk that holds `folder` has not `needed` bytes (and 1 % for metadata) free."""
    free = shutil.disk_usage(folder).free
    if free < needed * 1.01:
        raise StorageError(f"{folder}: {what} needs {needed:,} bytes, but only {free:,} are free")


def on_disk(nbytes: int) -> int:
    """What a file of `nbytes` takes, in blocks of 4 KiB."""
    return -(-nbytes // 4096) * 4096


def fsync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def start_flush(fd: int, offset: int, nbytes: int) -> None:
    """Have the disk begin with a range that was written, so that the flush at the end finds little left to do.

    Only a hint: nothing is promised before `fsync`, and where the call is missing nothing happens.
    """
    if _SYNC_FILE_RANGE is not None:
        _SYNC_FILE_RANGE(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


def fsync_tree(folder: Path, threads: int = 16) -> None:
    """Flush every file and folder below `folder`, and `folder` itself."""
    paths = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    folders = [Path(root) for root, _, _ in os.walk(folder, topdown=False)]
    if not _flushed_at_once(paths):
        fsync_files(paths, threads)
        fsync_files(folders, threads)


def fsync_files(paths: Sequence[Path], threads: int = 16) -> None:
    """Flush these files (or folders), all of one file system."""
    if not _flushed_at_once(paths):
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fsync, paths))


def _flushed_at_once(paths: Sequence[Path]) -> bool:
    return len(paths) > _MANY_FILES and _syncfs(paths[0].parent)


def _syncfs(folder: Path) -> bool:
    """Flush the whole file system in one go; False where that call is missing.

    A flush per file costs 0.4-4 ms each on a disk with a journal, and a full-size model has 45,000 files.
    """
    try:
        syncfs = ctypes.CDLL(None, use_errno=True).syncfs
    except AttributeError:
        return False
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(fd)
    return True


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step. False where kernel or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(b))


def commit(built: Path, dst: Path, replaced: Path) -> None:
    """Give the complete, fsynced folder `built` the name `dst`.

    An existing `dst` is kept under the name `replaced` (on the same disk); removing it is the caller's.
    """
    if not os.path.lexists(dst):
        os.rename(built, dst)
    elif _exchange(built, dst):
        os.rename(built, replaced)
    else:
        os.rename(dst, replaced)
        os.rename(built, dst)
    fsync(dst.parent)


@contextlib.contextmanager
def atomic_folder(
    dst: Path | str, *, force: bool = False, finish: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """A new folder to fill, which becomes `dst` when the block ends and disappears when it raises.

    Args:
      finish: called with the folder after the block, before it is flushed and renamed (a manifest).
    Raises:
      ConfigError: `dst` exists (see `check_target`).
      OSError: the disk is full or failing; nothing is left behind and an old `dst` is untouched.
    """
    dst = Path(os.path.abspath(dst))
    check_target(dst, force)
    make_parent(dst)
    work = dst.parent / f".{dst.name}.writing-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    built = work / "built"
    built.mkdir(parents=True)
    try:
        yield built
        if finish is not None:
            finish(built)
        fsync_tree(built)
        commit(built, dst, work / "replaced")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def remove_leftovers(folder: Path | str) -> list[Path]:
    """Removes what killed writers left in `folder`; returns what was removed. Only for a folder one process owns."""
    found = sorted(path for path in Path(folder).glob(".*.writing-*") if path.is_dir())
    for path in found:
        shutil.rmtree(path)
    return found
