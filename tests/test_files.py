from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cropkt.files import replace_file, write_atomically

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
