"""A real Chromium, and a board that it can reach."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn

from cropkt_server.board.app import board
from cropkt_server.public import listening

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

GONE = (
    "Failed to load resource: net::ERR_CONNECTION",
    "htmx:sendError",
    "htmx:afterRequest",
    "htmx:timeout",
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def _without(what: str) -> None:
    """Skip, or fail where a browser is required."""
    if os.environ.get("CROPKT_BROWSER") == "required":
        pytest.fail(f"{what}, and CROPKT_BROWSER=required")
    pytest.skip(what)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = os.environ.get("CROPKT_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        _without("no Chromium is installed (Debian: apt install chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _without("Playwright is not installed: pip install cropkt[browser]")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path)
        yield found
        found.close()


@dataclass
class Served:
    """A board that listens."""

    url: str  # with its token
    server: uvicorn.Server
    thread: threading.Thread

    def stop(self) -> None:
        """Cut every connection and listen no more."""
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)


@pytest.fixture
def serve() -> Iterator[Callable[[Path], Served]]:
    """Return what serves the board of a study folder from a thread."""
    served: list[Served] = []

    def serve(folder: Path) -> Served:
        listener = listening("127.0.0.1", 0)
        port = listener.getsockname()[1]
        app = board(folder, token="secret", host="127.0.0.1", port=port)
        config = uvicorn.Config(app, lifespan="off", ws="none", loop="asyncio", log_config=None)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        served.append(Served(f"http://127.0.0.1:{port}/?token=secret", server, thread))
        return served[-1]

    yield serve
    for each in served:
        each.stop()


@pytest.fixture
def start() -> Iterator[Callable[[Path], tuple[str, subprocess.Popen[str]]]]:
    """Return what starts the board of a study folder as a process, and its address."""
    begun: list[subprocess.Popen[str]] = []

    def begin(folder: Path) -> tuple[str, subprocess.Popen[str]]:
        command = "from cropkt_server.cli import main; main()"
        arguments = [sys.executable, "-c", command, "board", str(folder), "--port", "0"]
        begun.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True))
        assert begun[-1].stdout is not None
        return begun[-1].stdout.readline().strip(), begun[-1]

    yield begin
    for process in begun:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Return what opens an address in a window of its own; anything odd in it fails the test."""
    pages: list[Any] = []
    odd: list[str] = []

    def visit(url: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        page = context.new_page()
        origin = url.partition("/?")[0]

        def asked(request: Any) -> None:
            if not request.url.startswith((f"{origin}/", "data:")):
                odd.append(f"asked for {request.url}")

        def said(message: Any) -> None:
            gone = message.text.startswith(GONE)
            if message.type in ("error", "warning") and not gone:
                odd.append(f"console: {message.text}")

        page.on("request", asked)
        page.on("pageerror", lambda error: odd.append(f"error {error}"))
        page.on("dialog", lambda dialog: odd.append(f"dialog {dialog.message}"))
        page.on("console", said)
        page.goto(url)
        page.wait_for_selector("#clock:not(:empty)")
        pages.append(context)
        return page

    yield visit
    for context in pages:
        context.close()
    assert not odd
