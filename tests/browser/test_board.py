"""The board in a real browser: it follows the study, by keyboard, on a phone, in the dark."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cropkt_server import lock
from cropkt_server.board.app import ACTIONS
from cropkt_server.catalogue import read_experts
from cropkt_server.roster import Roster
from cropkt_server.settings import Settings, save_settings
from cropkt_server.status import read_status
from cropkt_server.store import Store

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

SOON = 15_000  # milliseconds, several polls
DESKTOP = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 844}
ODD = "<script>alert(1)</script>"  # a site's name
SMALLEST = 24  # CSS pixels of a target, WCAG 2.2


@pytest.fixture
def page(board_study: Path, serve: Callable[..., Any], visit: Callable[..., Page]) -> Page:
    return visit(serve(board_study).url)


def crash(folder: Path) -> None:
    """Let the row that is under way fail."""
    with closing(Store(folder)) as store:
        (task,) = [task for task in store.tasks() if task.state == "sent"]
        store.failed(task, "out of memory")


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.id"))


def press_until(page: Page, key: str, wanted: str, most: int = 80) -> None:
    """Press a key until an element is focused, as somebody without a mouse does."""
    for _ in range(most):
        page.keyboard.press(key)
        if focused(page) == wanted:
            return
    pytest.fail(f"{most} times {key} do not reach {wanted}")


def test_the_token_leaves_the_address(page: Page) -> None:
    assert "token" not in page.url
    assert page.title() == "eye · cropkt board"
    assert "token" not in str(page.evaluate("document.cookie"))  # nor can a script see the cookie
    assert page.evaluate("document.cookie") == ""


def test_a_site_named_script_is_text(page: Page) -> None:
    row = page.get_by_role("rowheader", name=ODD, exact=False).first
    assert row.is_visible()
    assert page.locator("script").count() == 2  # htmx and ours


def test_it_follows_the_study_and_leaves_focus_scroll_and_cards_alone(
    page: Page, board_study: Path
) -> None:
    page.set_viewport_size({"width": 500, "height": 700})
    page.locator("summary").first.click()
    page.locator("#tasks-table").focus()
    page.evaluate("document.getElementById('tasks-table').scrollLeft = 37")
    page.evaluate("scrollTo(0, 300)")
    where = page.evaluate("scrollY")
    crash(board_study)
    page.get_by_text("out of memory").first.wait_for(timeout=SOON)
    page.wait_for_function(
        "document.querySelector('#tasks .down')?.textContent.includes('crashed')", timeout=SOON
    )
    assert focused(page) == "tasks-table"
    assert page.evaluate("document.getElementById('tasks-table').scrollLeft") == 37
    assert page.locator("details").first.get_attribute("open") is not None
    assert abs(page.evaluate("scrollY") - where) < 250  # what grew above is all that moved
    with closing(Roster(board_study)) as roster:
        roster.revoke("amc")
    page.locator("#sites tr", has_text="amc").get_by_text("revoked").first.wait_for(timeout=SOON)
    assert focused(page) == "tasks-table"


def test_a_focused_button_stays_focused_while_its_row_changes(
    page: Page, board_study: Path
) -> None:
    button = page.locator("#sites tr", has_text="amc").get_by_role("button")
    button.focus()
    name = focused(page)
    assert name.startswith("revoke-")
    crash(board_study)
    page.locator("#sites tr", has_text="amc").get_by_text("out of memory").wait_for(timeout=SOON)
    assert focused(page) == name


@dataclass(frozen=True)
class Asked:
    """A button of the board, the question that it asks, and what it does."""

    button: str  # selector
    title: str
    says: str  # once it is done
    changes: dict[str, Any]  # of `told`
    paused: bool = False


BUTTONS = {
    "pause": Asked("#pause", "Pause the study?", "paused", {"study": "paused"}),
    "resume": Asked("#resume", "Resume the study?", "resumed", {"study": "stopped"}, paused=True),
    "retry": Asked(
        "#tasks button", "Retry this task?", f"again: describe/{ODD}", {"failed": set()}
    ),
    "revoke-site": Asked(
        "#sites tr:has-text('amc') button",
        "Revoke the site amc?",
        "amc is cut off",
        {"amc": "revoked"},
    ),
    "revoke-expert": Asked(
        "#experts li:has-text('of amc') button",
        "Revoke the expert SKCM of amc?",
        "SKCM of amc",
        {"revoked": {"amc"}},
    ),
}


def told(folder: Path) -> dict[str, Any]:
    """Return what the buttons may change: the study, its failed rows, sites and experts."""
    status = read_status(folder)
    return {
        "study": status.state,
        "failed": set(status.failed),
        "revoked": {expert.site for expert in read_experts(folder) if expert.revoked},
        **{site.site: site.state for site in status.sites},
    }


@pytest.mark.parametrize("asked", BUTTONS.values(), ids=BUTTONS)
def test_every_button_asks_first_and_obeys_the_keyboard_alone(
    asked: Asked, board_study: Path, serve: Callable[..., Any], visit: Callable[..., Page]
) -> None:
    with closing(Store(board_study)) as store:
        store.pause(asked.paused)
    before, page = told(board_study), visit(serve(board_study).url)
    name = str(page.locator(asked.button).get_attribute("id"))
    press_until(page, "Tab", name)
    dialog = page.get_by_role("dialog")
    for cancel in ("Enter", "Escape"):
        page.keyboard.press("Enter")
        dialog.wait_for()
        assert dialog.get_by_role("heading").inner_text() == asked.title
        assert page.evaluate("document.activeElement.textContent") == "Cancel"
        page.keyboard.press(cancel)
        dialog.wait_for(state="hidden")
        assert focused(page) == name
        assert told(board_study) == before
    page.keyboard.press("Enter")
    dialog.wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    dialog.get_by_role("heading", name="Done", exact=True).wait_for()
    assert asked.says in dialog.inner_text()
    assert page.evaluate("document.activeElement.textContent") == "Close"
    assert told(board_study) == before | asked.changes
    page.keyboard.press("Enter")
    dialog.wait_for(state="hidden")
    page.locator(f"#{name}").wait_for(state="detached", timeout=SOON)


def test_no_button_is_left_out(page: Page) -> None:
    asked = page.evaluate("[...document.querySelectorAll('button[hx-get]')].map(b => b.outerHTML)")
    kinds = {re.search(r"/ask/([a-z-]+)", html)[1] for html in asked}  # type: ignore[index]
    assert kinds | {"resume"} == set(ACTIONS) == set(BUTTONS)


def test_pause_and_retry(page: Page, board_study: Path) -> None:
    page.get_by_role("button", name="Pause study").click()
    page.get_by_role("dialog").get_by_role("button", name="Pause").click()
    page.get_by_role("dialog").get_by_text("paused").wait_for()
    page.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Resume study").wait_for(timeout=SOON)
    assert read_status(board_study).state == "paused"
    page.get_by_role("button", name="Retry").click()
    page.get_by_role("dialog").get_by_role("button", name="Retry").click()
    page.get_by_role("dialog").get_by_text("again: describe/").wait_for()
    assert read_status(board_study).failed == {}


def test_who_is_gone_is_said(
    board_study: Path, serve: Callable[..., Any], visit: Callable[..., Page]
) -> None:
    served = serve(board_study)
    with lock.locked(board_study):
        page = visit(served.url)
        assert page.get_by_text("no answer since").count() == 0
    page.get_by_text("The coordinator is gone: no answer since").wait_for(timeout=SOON)
    assert page.locator("#lost").is_hidden()
    served.stop()
    page.get_by_text("No answer from the board since").wait_for(timeout=SOON)


def test_a_board_that_hangs_is_told_from_one_that_answers(
    board_study: Path, start: Callable[..., Any], visit: Callable[..., Page]
) -> None:
    url, process = start(board_study)
    page = visit(url)
    process.send_signal(signal.SIGSTOP)
    page.get_by_text("No answer from the board since").wait_for(timeout=2 * SOON)
    process.send_signal(signal.SIGCONT)
    page.locator("#lost").wait_for(state="hidden", timeout=SOON)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("study", ["empty", "running", "failed"])
def test_everybody_can_read_and_reach_it(
    board_study: Path,
    tmp_path: Path,
    serve: Callable[..., Any],
    visit: Callable[..., Page],
    study: str,
    size: dict[str, int],
    scheme: str,
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    folder = board_study
    if study == "empty":
        folder = tmp_path / "empty"
        folder.mkdir()
        save_settings(Settings(name="eye", host="hub.example.org:8443"), folder)
    elif study == "failed":
        crash(folder)
        with closing(Store(folder)) as store:
            store.close_study()
    page = visit(serve(folder).url, viewport=size, color_scheme=scheme)
    for details in page.locator("details").all():
        details.evaluate("(card) => { card.open = true; }")
    if to := os.environ.get("CROPKT_SCREENSHOTS"):
        name = f"{study}-{'phone' if size is PHONE else 'desktop'}-{scheme}.png"
        page.screenshot(path=Path(to) / name, full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    for button in page.get_by_role("button").all():
        box = button.bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) >= SMALLEST
    page.get_by_role("button", name="Retry" if study == "failed" else "Pause").first.click()
    page.get_by_role("dialog").wait_for()
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
