"""The board: who may see it, what it shows, that it writes nothing, and what its buttons do."""

from __future__ import annotations

import hashlib
import re
import sqlite3
import time
from contextlib import closing
from html import unescape
from importlib.resources import files
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from cropkt_server import lock
from cropkt_server.board import views
from cropkt_server.board.app import ACTIONS, board
from cropkt_server.board.guard import CSRF_HEADER, csrf_of
from cropkt_server.board.observer import FRESH, Observer
from cropkt_server.cli import app as commands
from cropkt_server.roster import Roster
from cropkt_server.settings import Settings, save_settings
from cropkt_server.status import read_status
from cropkt_server.store import Store, Task
from cropkt_server.words import site_words

TOKEN = "a token of this test"
ODD = "<script>alert(1)</script>"
HTMX = "d6fdc75f204e6bdefa99b69bf1e6d4ac69b8a364f77929f45c13476b4000f717"  # htmx.org 2.0.11


def client_of(folder: Path, **options: str) -> TestClient:
    app = board(folder, token=TOKEN, host=options.get("host", "127.0.0.1"), port=8765)
    return TestClient(app, base_url="http://127.0.0.1:8765", follow_redirects=False)


@pytest.fixture
def stranger(board_study: Path) -> TestClient:
    return client_of(board_study)


@pytest.fixture
def client(stranger: TestClient) -> TestClient:
    assert stranger.get("/", params={"token": TOKEN}).status_code == 303
    return stranger


def do(client: TestClient, action: str, what: str = "") -> str:
    answer = client.post(
        f"/do/{action}", data={"what": what}, headers={CSRF_HEADER: csrf_of(TOKEN)}
    )
    assert answer.status_code == 200
    assert answer.headers["HX-Trigger"] == "changed"
    return unescape(answer.text)


@pytest.mark.parametrize(
    "path", ["/", "/part/sites", "/ask/pause", "/static/htmx.min.js", "/palette.css", "/nothing"]
)
def test_nothing_is_shown_without_the_token(stranger: TestClient, path: str) -> None:
    for _ in range(2):
        answer = stranger.get(path)
        assert answer.status_code == 401
        assert "lumc" not in answer.text
        stranger.cookies.set("cropkt-board-8765", "0" * 64)


@pytest.mark.parametrize("token", ["", "x", TOKEN[:-1], TOKEN + " ", "\u00e9"])
def test_a_wrong_token_opens_nothing(stranger: TestClient, token: str) -> None:
    answer = stranger.get("/", params={"token": token})
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers


def test_the_token_is_exchanged_for_a_cookie_that_scripts_cannot_read(
    stranger: TestClient,
) -> None:
    answer = stranger.get("/", params={"token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert TOKEN not in answer.headers["set-cookie"]
    page = stranger.get("/")
    assert page.status_code == 200
    assert TOKEN not in page.text


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8765", "127.0.0.1.evil.example:8765", "10.0.0.5:8765", ""],
)
def test_a_foreign_name_does_not_point_here(client: TestClient, host: str) -> None:
    for path in ("/", f"/?token={TOKEN}", "/part/sites"):
        answer = client.get(path, headers={"Host": host})
        assert answer.status_code == 421
        assert "lumc" not in answer.text


@pytest.mark.parametrize("host", ["localhost:8765", "127.0.0.1:9999", "[::1]:8765", "LOCALHOST"])
def test_a_tunnel_to_this_machine_does(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"Host": host}).status_code == 200


def test_where_it_listens_everywhere_any_address_will_do_but_no_name(board_study: Path) -> None:
    client = client_of(board_study, host="0.0.0.0")
    client.get("/", params={"token": TOKEN})
    assert client.get("/", headers={"Host": "192.168.7.3:8765"}).status_code == 200
    assert client.get("/", headers={"Host": "hub.example.org:8765"}).status_code == 421


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {CSRF_HEADER: ""},
        {CSRF_HEADER: csrf_of("another token")},
        {CSRF_HEADER: csrf_of(TOKEN), "Origin": "http://evil.example"},
        {CSRF_HEADER: csrf_of(TOKEN), "Origin": "http://127.0.0.1:8000"},
        {CSRF_HEADER: csrf_of(TOKEN), "Origin": "null"},
        {CSRF_HEADER: csrf_of(TOKEN), "Sec-Fetch-Site": "same-site"},
    ],
)
def test_only_its_own_page_may_act(
    client: TestClient, board_study: Path, headers: dict[str, str]
) -> None:
    for action, what in (("pause", ""), ("revoke-site", "lumc")):
        answer = client.post(f"/do/{action}", data={"what": what}, headers=headers)
        assert answer.status_code == 403
    assert read_status(board_study).state == "stopped"
    with closing(Roster(board_study, read_only=True)) as roster:
        assert all(site.revoked_at is None for site in roster.sites())


def test_a_question_changes_nothing_and_an_action_is_no_question(
    client: TestClient, board_study: Path
) -> None:
    for action in ACTIONS:
        assert client.get(f"/ask/{action}", params={"what": "lumc"}).status_code == 200
        assert client.get(f"/do/{action}", params={"what": "lumc"}).status_code == 405
    assert read_status(board_study).state == "stopped"


def test_every_answer_is_hardened(client: TestClient) -> None:
    for path in ("/", "/part/log", "/static/board.js", "/nothing", "/?token=wrong"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in headers


def test_no_script_or_style_is_in_the_page_and_nothing_is_fetched_elsewhere(
    client: TestClient,
) -> None:
    page = client.get("/").text
    assert not re.search(r"<script(?![^>]*\ssrc=)", page)
    assert not re.search(r"<style|\sstyle=|\son\w+=", page)
    assert set(re.findall(r'(?:src|href|hx-get|hx-post)="([^"#])', page)) == {"/"}
    for name in ("board.js", "board.css"):
        assert "://" not in client.get(f"/static/{name}").text


def test_htmx_is_the_published_file_with_its_licence() -> None:
    static = files("cropkt_server.board").joinpath("static")
    assert hashlib.sha256(static.joinpath("htmx.min.js").read_bytes()).hexdigest() == HTMX
    assert static.joinpath("htmx.LICENSE.txt").read_text().startswith("Zero-Clause BSD")


def test_a_site_named_script_shows_as_text(client: TestClient) -> None:
    page = client.get("/").text
    assert ODD not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "crashed &lt;b&gt;there&lt;/b&gt;" in page
    assert "&lt;0.0.0.0&gt;" in page
    asked = client.get("/ask/revoke-site", params={"what": ODD}).text
    assert ODD not in asked
    assert ODD in unescape(asked)


def test_the_board_says_what_status_says(client: TestClient, board_study: Path) -> None:
    page = " ".join(unescape(re.sub(r"<[^>]+>", " ", client.get("/").text)).split())
    status = read_status(board_study)
    assert len(status.sites) == 4
    for site in status.sites:
        words = site_words(site)
        for said in (words.state, words.presence, words.given, words.rows, words.traffic):
            assert said in page, said
    for row, cause in status.failed.items():
        assert row.partition("/")[0] in page
        assert cause in page
    for cause in status.missing.values():
        assert f"missing: {cause}" in page
    assert ".61" in page  # transfer of SKCM to UVM
    assert "+0.040" in page  # the gain of UVM


def test_a_study_that_is_over_with_sites_missing_says_no_success(
    client: TestClient, board_study: Path
) -> None:
    with closing(Store(board_study)) as store:
        store.close_study()
        store.set_meta("decided/bank", '["SKCM", "UVM"]')
    page = client.get("/").text
    assert "is over, but not complete: 1 row failed, 1 site is missing" in page
    assert "this study has not succeeded" in page
    assert "finished" not in page.replace("until the study is finished", "")


def test_a_coordinator_that_is_gone_is_said_so(client: TestClient, board_study: Path) -> None:
    with lock.locked(board_study):
        assert "no answer since" not in client.get("/part/head").text
    client = client_of(board_study)
    client.get("/", params={"token": TOKEN})
    assert "The coordinator is gone: no answer since 2" in client.get("/part/head").text


def test_looking_changes_no_byte(client: TestClient, board_study: Path) -> None:
    def state() -> dict[str, tuple[bytes, int]]:
        paths = [p for p in board_study.rglob("*") if p.is_file() and p.stat().st_size]
        return {
            str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in paths if "-shm" not in p.name
        }

    before = state()
    client.get("/")
    for name in views.PARTS:
        assert client.get(f"/part/{name}").status_code == 200
    assert state() == before


def test_it_neither_waits_for_a_writer_nor_keeps_one_waiting(
    client: TestClient, board_study: Path
) -> None:
    with closing(sqlite3.connect(board_study / "study.sqlite", isolation_level=None)) as writer:
        writer.execute("PRAGMA busy_timeout = 0")
        writer.execute("BEGIN IMMEDIATE")
        assert client.get("/").status_code == 200
        writer.execute("UPDATE task SET cause = 'seen' WHERE state = 'failed'")
        writer.execute("COMMIT")


def test_a_part_is_sent_again_only_when_it_has_changed(
    client: TestClient, board_study: Path
) -> None:
    text = client.get("/part/tasks").text
    (seen,) = re.findall(r"/part/tasks\?seen=(\w+)", text)
    assert client.get(f"/part/tasks?seen={seen}").status_code == 204
    with closing(Store(board_study)) as store:
        (task,) = [task for task in store.tasks() if task.state == "sent"]
        store.failed(task, "out of memory")
    time.sleep(FRESH)
    answer = client.get(f"/part/tasks?seen={seen}")
    assert answer.status_code == 200
    assert "out of memory" in answer.text


def test_what_does_not_fit_together_for_a_moment_leaves_the_last_view(
    board_study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = Observer(board_study)
    before = observer.results()
    (reply,) = (board_study / "replies").glob("evaluate~*")
    reply.unlink()
    with closing(Store(board_study)) as store:
        store.set_meta("x", "y")
    monkeypatch.setattr("cropkt_server.board.observer.time.monotonic", lambda: 1e9)
    assert observer.results() is before


def test_buttons_do_what_commands_do(client: TestClient, board_study: Path) -> None:
    assert "paused" in do(client, "pause")
    assert read_status(board_study).state == "paused"
    assert "resumed" in do(client, "resume")
    assert read_status(board_study).state == "stopped"
    row = f"describe/{ODD}"
    assert f"again: {row}" in do(client, "retry", row)
    assert read_status(board_study).failed == {}
    assert f"{row} has not failed" in do(client, "retry", row)
    assert "amc is cut off" in do(client, "revoke-site", "amc")
    assert {s.site: s.state for s in read_status(board_study).sites}["amc"] == "revoked"
    with closing(Store(board_study, read_only=True)) as store:
        hash_ = store.bank.experts()[0].signed.hash
    assert f"revoked {hash_[:16]} UVM of lumc" in do(client, "revoke-expert", hash_)
    with closing(Store(board_study, read_only=True)) as store:
        assert store.bank.revoked() == {hash_}


def test_the_commands_say_the_same(client: TestClient, board_study: Path) -> None:
    for command, action in (("pause", "pause"), ("resume", "resume")):
        said = CliRunner().invoke(commands, [command, str(board_study)]).stdout.strip()
        assert said in do(client, action)
    row = f"describe/{ODD}"
    told = do(client, "retry", row)
    with closing(Store(board_study)) as store:
        store.failed(Task(kind="describe", site=ODD), "again")
    said = CliRunner().invoke(commands, ["retry", str(board_study), "--row", row]).stdout
    for line in said.splitlines():
        assert line in told


@pytest.mark.parametrize(
    ("action", "what", "says"),
    [
        ("revoke-site", "nobody", "nobody is not in the roster"),
        ("revoke-expert", "0" * 64, "no expert has this hash"),
        ("revoke-expert", "", "8 characters are the least"),
        ("retry", "describe/lumc", "describe/lumc has not failed"),
    ],
)
def test_what_cannot_be_done_is_said(client: TestClient, action: str, what: str, says: str) -> None:
    assert says in do(client, action, what)


def test_unknown_parts_actions_and_long_forms_are_refused(client: TestClient) -> None:
    headers = {CSRF_HEADER: csrf_of(TOKEN)}
    assert client.get("/part/../../etc").status_code == 404
    assert client.get("/part/keys").status_code == 404
    assert client.get("/static/../app.py").status_code == 404
    assert client.post("/do/delete", headers=headers).status_code == 404
    assert client.post("/do/retry", content=b"x" * 5000, headers=headers).status_code == 413


def test_a_simulation_is_shown_and_left_alone(tmp_path: Path) -> None:
    save_settings(Settings(name="sim", sites=("a",)), tmp_path)
    client = client_of(tmp_path)
    client.get("/", params={"token": TOKEN})
    page = client.get("/").text
    assert "is a simulation" in page
    assert "<button" not in page
    assert "only a simulation names its sites" in do(client, "pause")
    assert {path.name for path in tmp_path.iterdir()} == {"study.yaml"}
