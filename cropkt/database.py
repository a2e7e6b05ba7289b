"""Our own SQLite files: for their owner alone, durable, of a known schema, changed as a whole."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from cropkt.errors import ConfigError
from cropkt.files import make_private


def opened(
    path: Path, steps: Sequence[str], *, wait: float, wal: bool = True
) -> sqlite3.Connection:
    """Return a connection to a database, made or brought up to date if it has to be.

    What was committed survives a kill at any time. Any thread may use the connection, one at a
    time; a transaction begins only where `transaction` says so.

    Args:
        path: of the file.
        steps: the SQL that leads from each schema to the next; how many were taken is the file's
            user_version.
        wait: seconds for another process that writes.
        wal: whether readers go on while somebody writes.

    Raises:
        ConfigError: a newer cropkt wrote it.
    """
    make_private(path)  # SQLite would make it readable for others
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=wait)
    try:
        if wal:
            database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        _check_known(path, database, steps)
        if _version(database) < len(steps):
            _migrate(database, steps)
    except BaseException:
        database.close()
        raise
    return database


def problem_with(path: Path, steps: Sequence[str] | None = None) -> str:
    """Return what is wrong with a database, which is only looked at; nothing if it is whole.

    Args:
        path: of the file.
        steps: as in `opened`; None for a file of somebody else's schema.
    """
    if not path.is_file():
        return "no such file"
    try:
        with closing(_looking(path, wait=10)) as database:
            version = _version(database)
            (first,) = database.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.Error as error:
        return f"cannot be read ({error})"
    if first != "ok":
        return f"is damaged ({' '.join(str(first).split())})"
    if steps is not None and version == 0:
        return "is empty"
    return "" if steps is None else _too_new(version, steps)


def reading(path: Path, steps: Sequence[str], *, wait: float) -> sqlite3.Connection:
    """Return a connection that sees a database as it should be by now, and changes no byte of it.

    A file that is not there reads as an empty database. One of an older schema is copied into
    memory as it is at this moment, and brought up to date there.

    Args:
        path: of the file.
        steps: as of `opened`.
        wait: seconds for another process that writes.

    Raises:
        ConfigError: a newer cropkt wrote it.
    """
    if not path.exists():
        return _in_memory(None, steps)
    database = _looking(path, wait=wait)
    try:
        _check_known(path, database, steps)
        old = _version(database) < len(steps)
        return _in_memory(database, steps) if old else database
    except BaseException:
        database.close()
        raise


def _looking(path: Path, *, wait: float) -> sqlite3.Connection:
    """Return a connection that cannot write."""
    address = f"{path.absolute().as_uri()}?mode=ro"
    return sqlite3.connect(
        address, uri=True, isolation_level=None, check_same_thread=False, timeout=wait
    )


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Let all that the block writes happen, or nothing of it; nobody else writes meanwhile."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield database
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def _check_known(path: Path, database: sqlite3.Connection, steps: Sequence[str]) -> None:
    if problem := _too_new(_version(database), steps):
        raise ConfigError(path, problem, "Use the cropkt that wrote it, or a newer one")


def _too_new(version: int, steps: Sequence[str]) -> str:
    """Return what is wrong with a schema of that number; nothing if these steps lead to it."""
    known = len(steps)
    return f"has schema {version}, this cropkt knows {known}" if version > known else ""


def _in_memory(source: sqlite3.Connection | None, steps: Sequence[str]) -> sqlite3.Connection:
    """Return a copy of a database, or an empty one, brought up to date; close the source."""
    copy = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    if source is not None:
        source.backup(copy)
        source.close()
    _migrate(copy, steps)
    return copy


def _migrate(database: sqlite3.Connection, steps: Sequence[str]) -> None:
    with transaction(database):
        for step in steps[_version(database) :]:  # another process may have been faster
            for statement in filter(str.strip, step.split(";")):
                database.execute(statement)
        database.execute(f"PRAGMA user_version = {len(steps)}")


def _version(database: sqlite3.Connection) -> int:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    return int(version)
