from __future__ import annotations

import contextlib
import errno
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cropkt.errors import ConfigError
from cropkt.files import disk_full, make_private, replace_file, write_atomically

KILLED = """
import os, signal, sys
from pathlib import Path
from cropkt.files import write_atomically

def write(file):
    file.write(b"half of the new con")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

write_atomically(Path(sys.argv[1]), write)
"""


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    write_atomically(path, lambda file: file.write(b"old"))
    ended = subprocess.run([sys.executable, "-c", KILLED, path], check=False, cwd=os.getcwd())
    assert ended.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    write_atomically(path, lambda file: file.write(b"new"))  # what was left behind is no obstacle
    assert path.read_bytes() == b"new"


def test_an_error_in_the_middle_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    path.write_bytes(b"old")

    def write(file) -> None:
        file.write(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_are_made_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.bin"
    replace_file(path, b"content")
    assert path.read_bytes() == b"content"
    assert list(path.parent.iterdir()) == [path]


def test_secrets_are_for_their_owner_only(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        write_atomically(tmp_path / "secret", lambda file: file.write(b""))
        replace_file(tmp_path / "public", b"")
        write_atomically(tmp_path / "public", lambda file: file.write(b""))  # narrows, too
        replace_file(tmp_path / "open", b"")
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"secret": 0o600, "public": 0o600, "open": 0o644}


def test_making_a_database_private_leaves_its_locks(tmp_path: Path) -> None:
    path = tmp_path / "some.sqlite"
    make_private(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    command = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('BEGIN')"
    command = command.replace("BEGIN", "BEGIN EXCLUSIVE")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        make_private(path)  # as whoever opens it once more in this process does
        done = subprocess.run([sys.executable, "-c", command, path], capture_output=True, text=True)
    assert "database is locked" in done.stderr


def test_a_full_disk_is_found_behind_other_errors(tmp_path: Path) -> None:
    def behind() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise ConfigError("file", "cannot be used") from None

    with pytest.raises(ConfigError) as wrapped:
        behind()
    assert disk_full(wrapped.value)
    assert not disk_full(OSError(errno.EACCES, "Permission denied"))
    with contextlib.closing(sqlite3.connect(tmp_path / "small.sqlite")) as database:
        database.execute("CREATE TABLE wide (text TEXT)")
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(sqlite3.OperationalError) as caught:
            database.execute("INSERT INTO wide VALUES (?)", ("x" * 100_000,))
        assert disk_full(caught.value)
        with pytest.raises(sqlite3.OperationalError) as caught:
            database.execute("SELECT * FROM nothing")
        assert not disk_full(caught.value)
