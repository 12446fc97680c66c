"""User-facing errors and the exit codes of every command.

0 done; 1 a bug (traceback); 2 flags, config, unknown architecture, existing output; 65 content of data,
checkpoints or input lines; 74 storage; 75 no progress, or another process of the run was lost; 76 training steps that
could not be applied. No failure exits 0.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import NoReturn

_STORAGE_ERRNOS = {errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EFBIG}


LOST = 75  # exit code of a hang and of a process whose peers are gone: starting again may help


class UserError(ValueError):
    """A problem the user can mend; the message names the value and what was expected."""

    exit_code = 1


class ConfigError(UserError):
    """Wrong flag, config key or value, unknown architecture, or an output that exists (exit 2)."""

    exit_code = 2


class DataError(UserError):
    """Wrong content of data, checkpoints or input lines (exit 65)."""

    exit_code = 65


class StorageError(UserError):
    """The disk is full, read-only or failing (exit 74)."""

    exit_code = 74


def storage_error(error: BaseException) -> OSError | None:
    """The storage `OSError` in an exception's chain, or None. Libraries wrap a full disk in their own types."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in _STORAGE_ERRNOS:
            return current
        text = str(current)
        if "No space left on device" in text or "RESOURCE_EXHAUSTED: Error writing" in text:
            return OSError(errno.ENOSPC, text)
        current = current.__cause__ or current.__context__
    return None


def tell(error: BaseException, who: str = "") -> int | None:
    """Say on stderr in one line what ended a command; the exit code, or None for a bug, which is left to be shown.

    Args:
      who: put before the message, where several processes write to one terminal.
    """
    if isinstance(error, UserError):
        print(f"error: {who}{error}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        print(f"{who}interrupted", file=sys.stderr)
        return 130
    if (storage := storage_error(error)) is not None:
        print(
            f"error: {who}storage: {storage.strerror or storage} ({storage.filename or 'while writing'})",
            file=sys.stderr,
        )
        return StorageError.exit_code
    return None


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's main function and turn its outcome into an exit code and one clear line on stderr."""
    try:
        code = main() or 0
    except (Exception, KeyboardInterrupt) as error:
        told = tell(error)
        if told is None:
            raise
        code = told
    sys.stdout.flush()
    sys.exit(code)
