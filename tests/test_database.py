from __future__ import annotations

import contextlib
import sqlite3
import threading
from pathlib import Path

import pytest

from cropkt.database import opened, reading, transaction
from cropkt.errors import ConfigError

FIRST = "CREATE TABLE one (x INTEGER); CREATE TABLE two (x INTEGER)"
SECOND = "ALTER TABLE one ADD COLUMN y INTEGER DEFAULT 7"


def fails_after_a_row(database: sqlite3.Connection) -> None:
    database.execute("INSERT INTO one VALUES (1)")
    database.execute("NO SQL")


def rows(database: sqlite3.Connection) -> list[tuple[int, ...]]:
    return database.execute("SELECT * FROM one").fetchall()


@pytest.mark.parametrize("wal", [True, False])
def test_it_is_for_its_owner_alone_and_durable(tmp_path: Path, wal: bool) -> None:
    path = tmp_path / "a.sqlite"
    with contextlib.closing(opened(path, [FIRST], wait=1, wal=wal)) as database:
        assert path.stat().st_mode & 0o777 == 0o600
        mode = database.execute("PRAGMA journal_mode").fetchone()
        assert mode == ("wal" if wal else "delete",)
        assert database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_an_older_file_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    with contextlib.closing(opened(path, [FIRST], wait=1)) as database:
        database.execute("INSERT INTO one VALUES (1)")
    with contextlib.closing(opened(path, [FIRST, SECOND], wait=1)) as database:
        assert rows(database) == [(1, 7)]
    with pytest.raises(ConfigError, match="has schema 2, this cropkt knows 1"):
        opened(path, [FIRST], wait=1)


def test_a_step_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    opened(path, [FIRST], wait=1).close()
    with pytest.raises(sqlite3.OperationalError):
        opened(path, [FIRST, f"{SECOND}; NO SQL"], wait=1)
    with contextlib.closing(opened(path, [FIRST], wait=1)) as database:
        database.execute("INSERT INTO one VALUES (1)")
        assert rows(database) == [(1,)]


def test_what_fails_is_undone_and_the_next_transaction_begins(tmp_path: Path) -> None:
    with contextlib.closing(opened(tmp_path / "a.sqlite", [FIRST], wait=1)) as database:
        with pytest.raises(sqlite3.OperationalError), transaction(database) as db:
            fails_after_a_row(db)
        with transaction(database) as db:
            db.execute("INSERT INTO one VALUES (2)")
        assert rows(database) == [(2,)]


def test_many_may_make_it_at_once(tmp_path: Path) -> None:
    path, problems = tmp_path / "a.sqlite", list[Exception]()

    def make() -> None:
        try:
            opened(path, [FIRST], wait=30, wal=False).close()
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_a_reader_sees_what_was_committed_and_cannot_write(tmp_path: Path) -> None:
    path = tmp_path / "a #1.sqlite"
    with (
        contextlib.closing(opened(path, [FIRST], wait=1)) as writer,
        contextlib.closing(reading(path, [FIRST], wait=1)) as reader,
    ):
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("INSERT INTO one VALUES (1)")
        assert rows(reader) == []
        writer.execute("COMMIT")
        assert rows(reader) == [(1,)]
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.execute("INSERT INTO one VALUES (2)")


def test_a_reader_sees_an_older_file_as_a_new_one_and_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    with contextlib.closing(opened(path, [FIRST], wait=1)) as database:
        database.execute("INSERT INTO one VALUES (1)")
    before = path.read_bytes()
    with contextlib.closing(reading(path, [FIRST, SECOND], wait=1)) as database:
        assert rows(database) == [(1, 7)]
    assert path.read_bytes() == before
    opened(path, [FIRST, SECOND], wait=1).close()
    with pytest.raises(ConfigError, match="has schema 2, this cropkt knows 1"):
        reading(path, [FIRST], wait=1)


def test_a_reader_makes_no_file(tmp_path: Path) -> None:
    with contextlib.closing(reading(tmp_path / "a.sqlite", [FIRST, SECOND], wait=1)) as database:
        assert rows(database) == []
    assert not list(tmp_path.iterdir())
