import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cropkt.cancers import Cancer
from cropkt.errors import ConfigError, UsageError
from cropkt_server.roster import EnrolledSite, EnrolmentRefusedError, Roster

UVM, SKCM = Cancer("UVM"), Cancer("SKCM")


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def roster(tmp_path: Path, clock: Clock) -> Iterator[Roster]:
    roster = Roster(tmp_path, clock=clock)
    yield roster
    roster.close()


def invited(roster: Roster, site: str = "A") -> str:
    return roster.invite(site, [UVM, SKCM, UVM], expires=Clock.now + 100)


def enrolled(
    roster: Roster, token: str, *, site: str = "A", key: str = "key", node: int = 2**64 - 1
) -> tuple[EnrolledSite, int | None]:
    return roster.enrol(
        token=token,
        site=site,
        node_key=key,
        signing_key="signing",
        register=lambda _key, _name: node,
    )


def refused(roster: Roster, token: str, **kwargs: str) -> str:
    with pytest.raises(EnrolmentRefusedError) as caught:
        enrolled(roster, token, **kwargs)  # type: ignore[arg-type]
    return caught.value.code


def test_enrols_once(roster: Roster) -> None:
    token = invited(roster)
    site, before = enrolled(roster, token)
    assert (site.name, site.cancers, site.node_id, before) == ("A", (UVM, SKCM), 2**64 - 1, None)
    assert roster.sites() == [site]
    assert roster.site_of(2**64 - 1) == "A"
    assert roster.site_of_key("key") == ("A", False)
    assert refused(roster, token, key="other") == "used"
    assert roster.sites() == [site]


def test_a_lost_answer_may_be_asked_for_again(roster: Roster, clock: Clock) -> None:
    token = invited(roster)
    site, _ = enrolled(roster, token)
    assert enrolled(roster, token, node=5) == (site, None)
    clock.now += 200
    assert refused(roster, token) == "used"


def test_refuses_what_was_never_made(roster: Roster) -> None:
    invited(roster)
    assert refused(roster, "x" * 43) == "unknown"
    assert roster.sites() == []


def test_refuses_an_expired_invite(roster: Roster, clock: Clock) -> None:
    token = invited(roster)
    clock.now += 100
    assert refused(roster, token) == "expired"
    assert roster.sites() == []


def test_refuses_another_site(roster: Roster) -> None:
    assert refused(roster, invited(roster), site="B") == "site"


def test_a_new_invite_replaces_an_unused_one(roster: Roster) -> None:
    first, second = invited(roster), invited(roster)
    assert refused(roster, first) == "revoked"
    enrolled(roster, second)
    third = invited(roster)  # for new keys
    assert refused(roster, third) == "site"  # the same key again
    again, before = enrolled(roster, third, key="new", node=7)
    assert (again.node_id, before) == (7, 2**64 - 1)
    assert [site.node_id for site in roster.sites()] == [7]
    assert roster.site_of_key("key") is None


def test_a_key_belongs_to_one_site(roster: Roster) -> None:
    enrolled(roster, invited(roster))
    assert refused(roster, invited(roster, "B"), site="B") == "site"


def test_revocation(roster: Roster) -> None:
    token, other = invited(roster), invited(roster, "B")
    enrolled(roster, token)
    roster.revoke("A")
    assert roster.site_of(2**64 - 1) is None
    assert roster.site_of_key("key") == ("A", True)
    assert refused(roster, token) == "revoked"  # nor with the keys it enrolled with
    assert roster.revoke("B") is None
    assert refused(roster, other, site="B") == "revoked"
    with pytest.raises(UsageError, match="C is not in the roster"):
        roster.revoke("C")
    back, before = enrolled(roster, invited(roster), key="new", node=7)
    assert (back.revoked_at, before) == (None, 2**64 - 1)


def test_a_failed_registration_leaves_the_invite_open(roster: Roster) -> None:
    token = invited(roster)

    def fail(_key: str, _name: str) -> int:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        roster.enrol(token=token, site="A", node_key="k", signing_key="s", register=fail)
    assert roster.sites() == []
    enrolled(roster, token)


def test_many_at_once_enrol_one(roster: Roster) -> None:
    token, outcomes = invited(roster), list[str]()

    def attempt(number: int) -> None:
        try:
            enrolled(roster, token, key=f"key {number}", node=number)
            outcomes.append("enrolled")
        except EnrolmentRefusedError as refusal:
            outcomes.append(refusal.code)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["enrolled"] + 7 * ["used"]


def test_another_process_sees_it_at_once(roster: Roster, tmp_path: Path) -> None:
    other = Roster(tmp_path)
    enrolled(roster, invited(roster))
    assert other.site_of_key("key") == ("A", False)
    other.revoke("A")
    assert roster.site_of_key("key") == ("A", True)
    other.close()


def test_keeps_no_token_and_is_private(roster: Roster, tmp_path: Path) -> None:
    token = invited(roster)
    enrolled(roster, token)
    files = list(tmp_path.iterdir())
    assert len(files) == 3  # the database, its log and the log's index
    for file in files:
        assert token.encode() not in file.read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_refuses_invites_that_cannot_be(roster: Roster, clock: Clock) -> None:
    with pytest.raises(UsageError, match="no cancer"):
        roster.invite("A", [], expires=clock.now + 1)
    with pytest.raises(UsageError, match="expired already"):
        roster.invite("A", [UVM], expires=clock.now)
    assert roster.invitations() == []


def test_refuses_a_newer_schema(tmp_path: Path) -> None:
    Roster(tmp_path).close()
    database = sqlite3.connect(tmp_path / "roster.sqlite")
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(ConfigError, match="schema 99"):
        Roster(tmp_path)


def test_a_command_beside_the_coordinator_leaves_its_log_alone(tmp_path: Path) -> None:
    """A coordinator opens its roster more than once; another process comes and goes."""
    command = (
        "import sys; from pathlib import Path; from cropkt_server.roster import Roster; "
        "Roster(Path(sys.argv[1])).close()"
    )
    with closing(Roster(tmp_path)) as roster, closing(Roster(tmp_path)):
        subprocess.run([sys.executable, "-c", command, tmp_path], check=True, timeout=60)
        roster.invite("lumc", [Cancer.UVM], time.time() + 60)
        with closing(sqlite3.connect(tmp_path / "roster.sqlite")) as other:
            assert other.execute("SELECT site FROM invite").fetchall() == [("lumc",)]
