"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, mode: int = 0o600) -> None:
    """Let `write` fill a file that appears under `path` complete and on disk, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, must survive a crash
    finally:
        os.close(folder)


def disk_full(error: BaseException | None) -> bool:
    """Return whether an error, or one behind it, says that a disk takes no more."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(error, sqlite3.Error):
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the lowest byte is the kind
            if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
                return True
        error = error.__cause__ or error.__context__
    return False


def make_private(path: Path) -> None:
    """Make an empty file that only its owner may read, if there is none of that name.

    One that is there is not even opened: when a process closes any descriptor of a file, the
    kernel drops all its locks on it, SQLite's among them, and the next process that closes the
    database would take the log of the last transactions away.
    """
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    write_atomically(path, lambda file: file.write(content))


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that others may read, whole or not at all."""
    write_atomically(path, lambda file: file.write(content), mode=0o644)
