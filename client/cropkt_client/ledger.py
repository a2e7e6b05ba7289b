"""What left this hospital: an append-only table, each row chained to the last and signed.

A row is committed and on disk before its message goes. The number of rows is kept, signed, in a
second file, so that rows cut off the end are missed too; a ledger that misses some takes no more.
What cannot be seen from here alone: both files removed, or put back together as they were. Exported
copies show that.

The files are `<state>/ledger.sqlite` and `<state>/ledger.head`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from cropkt.database import transaction
from cropkt.errors import ConfigError
from cropkt.files import make_private, write_private
from cropkt_client.enrol import Enrolment, Keys

TABLE_NAME, HEAD_NAME = "ledger.sqlite", "ledger.head"
SIMULATION = "simulation"  # study and recipient of a site that never enrolled
_FIRST = "0" * 64  # what the first row follows
_ROW, _HEAD = b"cropkt ledger row\n", b"cropkt ledger head\n"
_PATIENCE = 60.0  # seconds to wait for the other process that writes
_SCHEMA = (
    "CREATE TABLE egress (number INTEGER PRIMARY KEY, time TEXT NOT NULL, study TEXT NOT NULL, "
    "task TEXT NOT NULL, message TEXT NOT NULL, recipient TEXT NOT NULL, bytes INTEGER NOT NULL, "
    "sha256 TEXT NOT NULL, checked TEXT NOT NULL, approved TEXT NOT NULL, epsilon REAL, "
    "previous TEXT NOT NULL, hash TEXT NOT NULL, signature TEXT NOT NULL) STRICT",
    "CREATE TRIGGER egress_stays BEFORE UPDATE ON egress "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER egress_is_kept BEFORE DELETE ON egress "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What is recorded of one message that leaves."""

    study: str
    task: str
    message: str  # its type, such as train.expert or failure
    recipient: str  # SHA-256 of the coordinator's public key
    bytes: int  # of the payload, as `cropkt.wire.payload` measures it
    sha256: str
    checked: str
    approved: str
    epsilon: float | None = None  # spent on the cohort so far


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Entry):
    """An entry in its place."""

    number: int
    time: str  # UTC
    previous: str  # hash of the row before
    hash: str = ""
    signature: str = ""

    def digest(self, number: int | None = None) -> str:
        """Return the hash that this row should have, at its own or another number."""
        values = asdict(self)
        del values["hash"], values["signature"]
        if number is not None:
            values["number"] = number
        return hashlib.sha256(_ROW + json.dumps(values, sort_keys=True).encode()).hexdigest()


COLUMNS = (
    *("number", "time", "study", "task", "message", "recipient", "bytes", "sha256"),
    *("checked", "approved", "epsilon", "previous", "hash", "signature"),
)


@checked_dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))
class Head:
    """How many rows there are, signed."""

    rows: int
    hash: str  # of the last row
    signature: str


class Ledger:
    """The ledger in a site's state folder; any process may append.

    Args:
        state: the folder, which also holds the site's keys and its enrolment.
    """

    def __init__(self, state: Path) -> None:
        self._state = state
        self._table, self._head = state / TABLE_NAME, state / HEAD_NAME

    def append(self, entry: Entry) -> Row:
        """Write a row; it is on disk when this returns.

        Raises:
            ConfigError: the table or a key is damaged. OSError: the disk does not take it.
        """
        key = Keys.of(self._state).signing
        self._make()
        with self._writing() as database:
            number, digest = self._end(database)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            row = Row(**asdict(entry), number=number + 1, time=now, previous=digest)
            row = replace(row, hash=row.digest())
            signed = base64.b64encode(key.sign(_ROW + row.hash.encode())).decode()
            row = replace(row, signature=signed)
            values = [getattr(row, name) for name in COLUMNS]
            marks = ", ".join("?" * len(COLUMNS))
            database.execute(f"INSERT INTO egress ({', '.join(COLUMNS)}) VALUES ({marks})", values)
        with self._writing() as database:  # in here, no other process counts less
            self._write_head(*_last(database))
        return row

    def knows(self, sha256: str, size: int) -> bool:
        """Return whether a payload is in the ledger."""
        query = "SELECT 1 FROM egress WHERE sha256 = ? AND bytes = ? LIMIT 1"
        return bool(self._found(query, sha256, size))

    def rows(self) -> list[Row]:
        """Return all rows, unverified.

        Raises:
            ConfigError: the table is damaged.
        """
        found = self._found(f"SELECT {', '.join(COLUMNS)} FROM egress ORDER BY number")
        return [Row(**dict(zip(COLUMNS, values, strict=True))) for values in found]

    def head(self) -> Head | None:
        """Return the signed count, unverified; None if there is none, or it is damaged."""
        with contextlib.suppress(OSError, ValueError):
            return TypeAdapter(Head).validate_json(self._head.read_bytes())
        return None

    def problems(self, key: Ed25519PublicKey) -> list[str]:
        """Return what is wrong with the ledger, named row by row; nothing if it is whole."""
        try:
            rows, head = self.rows(), self.head()
        except ConfigError as error:
            return [str(error)]
        return list(_problems(rows, head, key, self._head.exists()))

    def _make(self) -> None:
        """Make the files, the first time."""
        self._state.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Made here first: SQLite would make it readable for others.
        make_private(self._table)
        with self._writing() as database:
            if not _exists(database):
                if not self._head.exists():
                    self._write_head(0, _FIRST)
                for statement in _SCHEMA:
                    database.execute(statement)

    def _end(self, database: sqlite3.Connection) -> tuple[int, str]:
        """Return number and hash of the last row, if it is the one that was counted."""
        (number, digest), head = _last(database), self.head()
        if head is None or head.rows > number or (head.rows == number and head.hash != digest):
            fix = "Nothing leaves until that is cleared up: cropkt-client ledger verify"
            raise ConfigError(self._table, "its last rows are not those that were written", fix)
        return number, digest

    def _write_head(self, rows: int, digest: str) -> None:
        key = Keys.of(self._state).signing
        signed = base64.b64encode(key.sign(_head_text(rows, digest))).decode()
        text = json.dumps({"rows": rows, "hash": digest, "signature": signed}) + "\n"
        write_private(self._head, text.encode())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Hold the table; what the block did is on disk after it, or undone."""
        with self._reading() as database:
            database.execute("PRAGMA synchronous = EXTRA")
            with transaction(database):
                yield database

    def _found(self, query: str, *values: str | int) -> list[tuple[Any, ...]]:
        if not self._table.exists():
            return []
        with self._reading() as database:
            return database.execute(query, values).fetchall() if _exists(database) else []

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        try:
            database = sqlite3.connect(self._table, timeout=_PATIENCE, isolation_level=None)
            with contextlib.closing(database):
                # A flipped byte may be no UTF-8: it is to be found by its hash, not to stop us.
                database.text_factory = lambda raw: raw.decode(errors="surrogateescape")
                yield database
        except sqlite3.DatabaseError as error:
            fix = "If the disk is not full, keep the file as it is: an exported copy has its rows"
            raise ConfigError(self._table, f"cannot be used ({error})", fix) from None


def recipient(state: Path) -> tuple[str, str]:
    """Return the study that a site works for, and its coordinator's fingerprint."""
    if not (state / "enrolment.json").exists():
        return SIMULATION, SIMULATION
    enrolment = Enrolment.load(state)
    return enrolment.study, fingerprint(base64.b64decode(enrolment.coordinator_key))


def fingerprint(key: bytes) -> str:
    """Return the SHA-256 of a raw public key."""
    return hashlib.sha256(key).hexdigest()


def public_key(state: Path) -> Ed25519PublicKey:
    """Return the key that verifies a site's ledger.

    Raises:
        ConfigError: there is none, and one made now would verify nothing.
    """
    if not (state / "keys" / "signing.key").exists():
        fix = "Give the --config of the site whose ledger it is"
        raise ConfigError(state / "keys" / "signing.key", "no such file", fix)
    return Keys.of(state).signing.public_key()


def _problems(
    rows: list[Row], head: Head | None, key: Ed25519PublicKey, has_head: bool
) -> Iterator[str]:
    previous, expected = _FIRST, 1
    for row in rows:
        if row.number > expected:
            yield _absent(expected, row.number - 1)
        elif row.previous != previous:
            yield f"row {row.number} does not follow row {row.number - 1}"
        yield from _damage(row, len(rows), key)
        previous, expected = row.hash, row.number + 1
    count = rows[-1].number if rows else 0
    if head is None:
        if count or has_head:
            state = "damaged" if has_head else "missing"
            yield f"{HEAD_NAME} is {state}: rows after row {count} may have been removed"
    elif not _signed(head.signature, _head_text(head.rows, head.hash), key):
        yield f"{HEAD_NAME} is not signed with this site's key"
    elif head.rows > count:
        yield f"{_absent(count + 1, head.rows)} at the end"
    elif count - head.rows > 1:  # a crash between row and head leaves one
        yield f"{HEAD_NAME} is older than the table: it was put back"
    elif head.rows and not any((r.number, r.hash) == (head.rows, head.hash) for r in rows):
        yield f"row {head.rows} is not the one that {HEAD_NAME} counted"


def _damage(row: Row, rows: int, key: Ed25519PublicKey) -> Iterator[str]:
    """Yield what is wrong within a row."""
    digest = row.digest()
    by_content = _signed(row.signature, _ROW + digest.encode(), key)
    if digest == row.hash:
        if not by_content:
            yield f"row {row.number}: its signature is not this site's"
    elif by_content:
        yield f"row {row.number}: its hash was changed"
    elif moved := [n for n in range(1, rows + 2) if row.digest(n) == row.hash]:
        yield f"row {row.number} was row {moved[0]}: rows were reordered"
    elif _signed(row.signature, _ROW + row.hash.encode(), key):
        yield f"row {row.number}: its content was changed after it was signed"
    else:
        yield f"row {row.number}: content, hash and signature do not belong together"


def _absent(first: int, last: int) -> str:
    return f"row {first} is missing" if first == last else f"rows {first} to {last} are missing"


def _signed(signature: str, text: bytes, key: Ed25519PublicKey) -> bool:
    try:
        raw = base64.b64decode(signature, validate=True)
        key.verify(raw, text)
    except (InvalidSignature, ValueError):
        return False
    return base64.b64encode(raw).decode() == signature  # some bits of the text decode to nothing


def _head_text(rows: int, digest: str) -> bytes:
    return _HEAD + f"{rows} {digest}".encode()


def _last(database: sqlite3.Connection) -> tuple[int, str]:
    query = "SELECT number, hash FROM egress ORDER BY number DESC LIMIT 1"
    found = database.execute(query).fetchone()
    return (int(found[0]), str(found[1])) if found else (0, _FIRST)


def _exists(database: sqlite3.Connection) -> bool:
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'egress'"
    return database.execute(query).fetchone() is not None
