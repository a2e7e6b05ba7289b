"""The ledger: append-only, chained, signed; whatever was changed is found and named."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cropkt.errors import ConfigError
from cropkt.files import write_private
from cropkt_client import ledger as module
from cropkt_client.enrol import Enrolment, Keys
from cropkt_client.ledger import (
    COLUMNS,
    HEAD_NAME,
    TABLE_NAME,
    Entry,
    Ledger,
    Row,
    fingerprint,
    public_key,
    recipient,
)

ROWS = 6
OPENING = "DROP TRIGGER egress_stays; DROP TRIGGER egress_is_kept;"


def entry(number: int = 1, **changes: object) -> Entry:
    values: dict[str, object] = {
        "study": "eye",
        "task": f"fit_expert/leiden/UVM/{number}",
        "message": "train.expert",
        "recipient": "ab" * 32,
        "bytes": 5000 + number,
        "sha256": f"{number:064x}",
        "checked": "fields; counts rounded to 5",
        "approved": "by the policy",
        "epsilon": number / 4,
    }
    return Entry(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six rows, written once."""
    folder = tmp_path_factory.mktemp("ledger")
    for number in range(1, ROWS + 1):
        Ledger(folder).append(entry(number))
    return folder


@pytest.fixture
def state(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "state")


@pytest.fixture
def ledger(state: Path) -> Ledger:
    return Ledger(state)


def problems(state: Path) -> list[str]:
    return Ledger(state).problems(public_key(state))


def change(state: Path, script: str) -> None:
    """Do to the table what a user of this machine could."""
    database = sqlite3.connect(state / TABLE_NAME)
    database.executescript(OPENING + script)
    database.close()


def test_rows_are_chained_and_whole(ledger: Ledger, state: Path) -> None:
    rows = ledger.rows()
    assert [row.number for row in rows] == list(range(1, ROWS + 1))
    assert [row.previous for row in rows[1:]] == [row.hash for row in rows[:-1]]
    assert {k: v for k, v in asdict(rows[2]).items() if k in asdict(entry())} == asdict(entry(3))
    assert not problems(state)
    assert ledger.knows(f"{3:064x}", 5003)
    assert not ledger.knows(f"{3:064x}", 5004)
    for name in (TABLE_NAME, HEAD_NAME):
        assert (state / name).stat().st_mode & 0o077 == 0


def test_an_empty_ledger_is_whole(tmp_path: Path) -> None:
    Keys.of(tmp_path)
    assert not problems(tmp_path)
    assert Ledger(tmp_path).rows() == []


@pytest.mark.parametrize("statement", ["UPDATE egress SET task = 'x'", "DELETE FROM egress"])
def test_the_table_refuses_changes(state: Path, statement: str) -> None:
    database = sqlite3.connect(state / TABLE_NAME)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        database.execute(statement)
    database.close()


@pytest.mark.parametrize("column", [name for name in COLUMNS if name != "number"])
@pytest.mark.parametrize("row", [1, 4, ROWS])
def test_a_flipped_byte_is_found_in_any_column(state: Path, column: str, row: int) -> None:
    key, before = public_key(state), getattr(Ledger(state).rows()[row - 1], column)
    if isinstance(before, str):
        places = range(0, len(before), max(1, len(before) // 5))
        after: list[object] = [flipped(before, place) for place in [*places, len(before) - 1]]
    else:
        after = [before + 1, None] if column == "epsilon" else [before ^ 1]
    database = sqlite3.connect(state / TABLE_NAME, isolation_level=None)
    database.executescript(f"PRAGMA synchronous = OFF; {OPENING}")
    for value in after:
        database.execute(f"UPDATE egress SET {column} = ? WHERE number = ?", (value, row))
        found = Ledger(state).problems(key)
        assert any(f"row {row}" in text for text in found), (column, value)
    database.execute(f"UPDATE egress SET {column} = ? WHERE number = ?", (before, row))
    database.close()
    assert not problems(state)


def flipped(text: str, place: int) -> str:
    return text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]


def test_a_flipped_bit_of_the_file_is_found(state: Path) -> None:
    """The same, below SQLite: every byte of one row's text, one bit each."""
    path = state / TABLE_NAME
    whole = path.read_bytes()
    start = whole.index(b"fit_expert/leiden/UVM/3")
    for place in range(start, start + 300, 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(bytes(damaged))
        assert any("row 3" in text for text in problems(state)), place
    path.write_bytes(whole)
    assert not problems(state)


def test_a_file_that_is_no_table_is_found(state: Path) -> None:
    (state / TABLE_NAME).write_bytes(b"SQLite format 3\0" + bytes(4000))
    (problem,) = problems(state)
    assert "cannot be used" in problem


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("number = 3", "row 3 is missing"),
        ("number IN (2, 3, 4)", "rows 2 to 4 are missing"),
        ("number = 1", "row 1 is missing"),
        ("number = 6", "row 6 is missing at the end"),
        ("number > 3", "rows 4 to 6 are missing at the end"),
        ("number > 0", "rows 1 to 6 are missing at the end"),
    ],
)
def test_a_missing_row_is_named(state: Path, gone: str, said: str) -> None:
    change(state, f"DELETE FROM egress WHERE {gone}")
    assert said in problems(state)


def test_a_missing_row_is_named_though_the_rest_was_renumbered(state: Path) -> None:
    change(
        state,
        "DELETE FROM egress WHERE number = 3;"
        "UPDATE egress SET number = number - 1 WHERE number > 3;",
    )
    found = problems(state)
    assert "row 3 does not follow row 2" in found
    assert "row 3 was row 4: rows were reordered" in found
    assert "row 6 is missing at the end" in found


@pytest.mark.parametrize("pair", [(2, 3), (1, 6), (5, 6)])
def test_a_reordered_pair_is_named(state: Path, pair: tuple[int, int]) -> None:
    one, two = pair
    change(
        state,
        f"UPDATE egress SET number = 99 WHERE number = {one};"
        f"UPDATE egress SET number = {one} WHERE number = {two};"
        f"UPDATE egress SET number = {two} WHERE number = 99;",
    )
    found = problems(state)
    assert f"row {one} was row {two}: rows were reordered" in found
    assert f"row {two} was row {one}: rows were reordered" in found


def test_a_row_signed_by_another_key_is_named(state: Path) -> None:
    """Whoever has no key can make hashes that agree, but no signature."""
    row = replace(Ledger(state).rows()[3], bytes=1)
    row = replace(row, hash=row.digest())
    forged = base64.b64encode(
        Ed25519PrivateKey.generate().sign(module._ROW + row.hash.encode())
    ).decode()
    change(
        state,
        f"UPDATE egress SET bytes = 1, hash = '{row.hash}', signature = '{forged}' "
        "WHERE number = 4",
    )
    assert "row 4: its signature is not this site's" in problems(state)
    assert "row 5 does not follow row 4" in problems(state)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda head: head.unlink(), f"{HEAD_NAME} is missing"),
        (lambda head: head.write_text("{}"), f"{HEAD_NAME} is damaged"),
        (lambda head: head.write_text('{"rows": "6"}'), f"{HEAD_NAME} is damaged"),
        (
            lambda head: head.write_text(head.read_text().replace('"rows": 6', '"rows": 5')),
            "not signed",
        ),
    ],
)
def test_a_count_that_was_tampered_with_is_found(
    state: Path, damage: Callable[[Path], object], said: str
) -> None:
    damage(state / HEAD_NAME)
    assert any(said in text for text in problems(state))


def test_a_count_that_was_put_back_is_found(ledger: Ledger, state: Path) -> None:
    before = (state / HEAD_NAME).read_bytes()
    ledger.append(entry(7))
    (state / HEAD_NAME).write_bytes(before)
    assert not problems(state)  # as a crash between row and count leaves it
    ledger.append(entry(8))
    (state / HEAD_NAME).write_bytes(before)
    assert f"{HEAD_NAME} is older than the table: it was put back" in problems(state)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: change(state, "DELETE FROM egress WHERE number > 4"),
        lambda state: (state / TABLE_NAME).unlink(),
        lambda state: (state / HEAD_NAME).unlink(),
    ],
)
def test_a_ledger_that_misses_rows_takes_no_more(
    ledger: Ledger, state: Path, damage: Callable[[Path], object]
) -> None:
    damage(state)
    with pytest.raises(ConfigError, match="its last rows are not those that were written"):
        ledger.append(entry(7))
    assert problems(state)


def test_a_crash_before_the_first_row_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / TABLE_NAME).touch()  # made, and then the power went
    ledger = Ledger(tmp_path)
    assert ledger.rows() == []
    ledger.append(entry())
    assert not problems(tmp_path)


def test_a_row_is_on_disk_before_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What SQLite does to be sure of it is its own affair: that it is asked to is ours."""
    said: list[str] = []
    connect = sqlite3.connect

    def traced(*args: object, **kwargs: object) -> sqlite3.Connection:
        database = connect(*args, **kwargs)  # type: ignore[call-overload]
        database.set_trace_callback(said.append)
        return database  # type: ignore[no-any-return]

    monkeypatch.setattr(sqlite3, "connect", traced)
    Ledger(tmp_path).append(entry())
    insert = next(i for i, text in enumerate(said) if text.startswith("INSERT"))
    assert "PRAGMA synchronous = EXTRA" in said[:insert]
    assert said[insert + 1] == "COMMIT"
    assert not [text for text in said if "synchronous" in text and "EXTRA" not in text]


CHILD = """
import sys
from pathlib import Path
from cropkt_client.ledger import Entry, Ledger
for number in range(12):
    Ledger(Path(sys.argv[1])).append(Entry(
        study="eye", task=f"t/{sys.argv[2]}/{number}", message="train.expert", recipient="r",
        bytes=1, sha256="0", checked="c", approved="a"))
"""


def test_two_processes_write_one_ledger(tmp_path: Path) -> None:
    Keys.of(tmp_path)
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), str(n)]) for n in range(2)
    ]
    assert [child.wait(100) for child in children] == [0, 0]
    rows = Ledger(tmp_path).rows()
    assert len(rows) == 24
    assert len({row.task for row in rows}) == 24
    assert not problems(tmp_path)


def test_a_process_killed_at_any_time_leaves_a_whole_ledger(tmp_path: Path) -> None:
    Keys.of(tmp_path)
    for round_ in range(2):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), str(round_)])
        before = len(Ledger(tmp_path).rows())
        while len(Ledger(tmp_path).rows()) < before + 3:
            assert child.poll() is None
        child.kill()
        child.wait()
        assert not problems(tmp_path)


def test_nobody_makes_the_key_that_is_to_verify(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"signing\.key: no such file"):
        public_key(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_recipient_is_whom_the_site_enrolled_with(tmp_path: Path) -> None:
    assert recipient(tmp_path) == ("simulation", "simulation")
    key = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    Enrolment(
        study="eye",
        site="leiden",
        cancers=(),
        coordinator_key=base64.b64encode(key).decode(),
        bundle="0" * 64,
        host="localhost:1",
    ).save(tmp_path)
    assert recipient(tmp_path) == ("eye", fingerprint(key))
    write_private(tmp_path / "enrolment.json", b"{")
    with pytest.raises(ConfigError, match="damaged"):
        recipient(tmp_path)


def test_the_digest_is_over_every_column_but_itself() -> None:
    values = {**asdict(entry()), "number": 1, "time": "t", "previous": "p"}
    row = Row(**values)
    assert set(COLUMNS) == {*values, "hash", "signature"}
    expected = hashlib.sha256(b"cropkt ledger row\n" + json.dumps(values, sort_keys=True).encode())
    assert row.digest() == expected.hexdigest()
