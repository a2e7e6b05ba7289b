"""The coordinator's process: from `start` until the study is over and its sites know it."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.logging import RichHandler

from cropkt.errors import ConfigError, DiskFullError, StudyError
from cropkt.files import disk_full
from cropkt_server.lock import locked
from cropkt_server.readiness import tell_ready
from cropkt_server.settings import Settings, load_settings
from cropkt_server.status import nothing_to_transfer

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

    from cropkt.report.schema import Results
    from cropkt_server.superlink import SuperLink

log = logging.getLogger("cropkt.server")

LOG_NAME, REPORT = "server.log", "report"
POLL = 1.0  # seconds between looks at the grid
LARGE = 1 << 20  # bytes
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of glibc's malloc.h
_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def start(folder: Path, *, linger: float, board: int | None = None) -> None:
    """Run the study in `folder` until it is finished; a finished one only says so.

    Args:
        folder: the study's.
        linger: seconds to go on telling the sites that the study is over.
        board: port of a board beside it; None: without one.

    Raises:
        StudyError: it finished, but rows failed or sites are missing.
        CropktError: it cannot run.
        KeyboardInterrupt: it was interrupted; SystemExit(143) for SIGTERM.
    """
    settings = load_settings(folder)
    host = startable_host(settings, folder)
    with locked(folder), _signals():
        console = Console(highlight=False)
        open_log(folder, console)
        settle_environment(folder)
        settle_memory()
        try:
            with _board(folder, board, console):
                _run(folder, settings, host, console, linger)
        except Exception as error:
            if not disk_full(error):
                raise
            fix = "Free some, then start it again: it goes on where it was"
            raise DiskFullError(folder, "no space is left on its disk", fix) from error


def deployed_host(settings: Settings, folder: Path) -> str:
    """Return "name:port" of a deployed study.

    Raises:
        ConfigError: these are a simulation's settings.
    """
    path = folder / "study.yaml"
    if settings.sites:
        fix = "Remove sites, and invite them with cropkt-server invite"
        raise ConfigError(path, "sites: only a simulation names its sites here", fix)
    if settings.host is None:
        raise ConfigError(path, "host: is missing", "Write host: NAME:PORT")
    return settings.host


def startable_host(settings: Settings, folder: Path) -> str:
    """Return "name:port" of a study that says all it must before it starts.

    Raises:
        ConfigError: it does not, or these are a simulation's settings.
    """
    host = deployed_host(settings, folder)
    if not settings.study.encoder:
        fix = "Write the name that every site.yaml has, such as UNI2-h"
        raise ConfigError(folder / "study.yaml", "study.encoder: is empty", fix)
    return host


def settle_environment(folder: Path) -> None:
    """Set what Flower reads from the environment, before its import: it tells nobody anything."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
    os.environ["FLWR_HOME"] = str((folder / "flower").resolve())


def settle_memory() -> None:
    """Let large buffers go back to the system when they are freed; glibc would keep many."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(_M_ARENA_MAX, 2)


def _run(folder: Path, settings: Settings, host: str, console: Console, linger: float) -> None:
    from cropkt_server.app import app, opened  # Flower loads here, in a settled environment
    from cropkt_server.progress import shown
    from cropkt_server.superlink import serving

    flower = logging.getLogger("flwr")
    flower.handlers.clear()  # it would write over the bars, in colours, and twice
    flower.setLevel(logging.WARNING)
    with opened(folder) as (study, _):  # refuses other settings before a port is opened
        _check_name(study.store.meta("name"), settings, folder)
        study.store.set_meta("name", settings.name)
        over = study.store.closed

    def main(grid: Grid, context: Context) -> None:
        """Run the study, report it, and tell the sites."""
        try:
            if not over:
                with shown(folder, console, say=log.info):
                    app(grid=grid, context=context)
            _finish(folder, superlink, console)
        finally:
            if superlink.says_closed:
                _linger(grid, linger, until_gone=not over)

    with serving(
        folder,
        study=settings.name,
        host=host,
        listen=settings.listen,
        port=settings.port,
        config=settings.study,
    ) as superlink:
        where = f"{settings.listen}, port {superlink.port}"
        tell_ready()
        _tell(console, f"study {settings.name} listens on {where}, for sites that ask for {host}")
        superlink.run_server_app(main, {"study": str(folder), "poll": POLL})


def _board(
    folder: Path, port: int | None, console: Console
) -> contextlib.AbstractContextManager[None]:
    """Return what shows a board beside the study; its address, with its token, goes to no log."""
    if port is None:
        return contextlib.nullcontext()
    from cropkt_server.board.process import beside

    return beside(folder, port, lambda line: console.print(line, soft_wrap=True))


def _check_name(before: str | None, settings: Settings, folder: Path) -> None:
    if before not in (None, settings.name):
        raise ConfigError(
            folder / "study.yaml",
            f"name was {before} when this study began and is {settings.name} now",
            "Set it back: the sites enrolled under that name",
        )


def _finish(folder: Path, superlink: SuperLink, console: Console) -> None:
    """Write and show the report; then the study is over, here and for the sites.

    Raises:
        StudyError: not everything was done.
    """
    from cropkt.report.tables import summary_lines, summary_table
    from cropkt.report.write import write_report
    from cropkt_server.app import opened
    from cropkt_server.results import results

    with opened(folder) as (study, _):
        found, late, bank = results(study), study.late(), study.bank()
        (folder / REPORT).mkdir(exist_ok=True)
        paths = write_report(found, folder / REPORT)
        study.store.close_study()
        superlink.say_closed()
    console.print(summary_table(found))
    lines = list(summary_lines(found))
    if late:
        names = ", ".join(late)
        lines.append(f"Too late for the other targets, which were not scored again: {names}.")
    lines.append(f"The report lies in {folder / REPORT}: {', '.join(p.name for p in paths)}.")
    for line in lines:
        _tell(console, line)
    if problem := _problem(found, bank):
        raise StudyError("study", problem)


def _problem(found: Results, bank: tuple[str, ...]) -> str:
    """Return what keeps the study from having succeeded, in one line; nothing if it did."""
    rows = [f"{row['row']} ({row.get('cause', '')})" for row in found["failed"]]
    if rows:
        return f"it finished, but {len(rows)} rows failed or are missing: {'; '.join(rows)}"
    lack = nothing_to_transfer(len(bank))
    return f"it finished, but {lack}" if lack else ""


def _tell(console: Console, line: str) -> None:
    """Log a line, and show it on a terminal, where only warnings of the log are shown."""
    log.info("%s", line)
    if console.is_terminal:
        console.print(line, soft_wrap=True)


def _linger(grid: Grid, seconds: float, *, until_gone: bool) -> None:
    """Keep answering, so that every site learns that the study is over."""
    end = time.monotonic() + seconds
    log.info("the study is over; telling its sites for up to %.0f s", seconds)
    while time.monotonic() < end and not (until_gone and not list(grid.get_node_ids())):
        time.sleep(min(POLL, max(0.0, end - time.monotonic())))


def open_log(folder: Path, console: Console) -> None:
    """Send the log to `server.log`, and to standard error or around the bars of a terminal."""
    file = _PrivateFile(folder / LOG_NAME, maxBytes=5_000_000, backupCount=5)
    file.setFormatter(logging.Formatter(_FORMAT))
    screen: logging.Handler
    if console.is_terminal:
        screen = RichHandler(console=console, show_path=False)
        screen.addFilter(lambda record: record.levelno >= logging.WARNING)
    else:
        screen = logging.StreamHandler(sys.stderr)
        screen.setFormatter(logging.Formatter(_FORMAT))
    screen.addFilter(
        lambda record: record.name.startswith("cropkt") or record.levelno >= logging.ERROR
    )
    logging.basicConfig(level=logging.INFO, handlers=[file, screen], force=True)
    for name in ("alembic", "httpx", "httpcore", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)


class _PrivateFile(RotatingFileHandler):
    """A rotating file that only its owner may read, and whose failures stop nobody."""

    def _open(self) -> TextIO:  # type: ignore[override]
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        return open(descriptor, "a", encoding="utf-8", errors="backslashreplace")

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the record: on a full disk there is nowhere to say so."""


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, once: ending must not be cut off half-way."""

    def leave(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        log.info("stopping; the next start goes on where this one was")
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {n: signal.signal(n, leave) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
