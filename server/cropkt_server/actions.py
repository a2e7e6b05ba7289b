"""What a coordinator does to a study beside its process; the commands and the board say the same.

Each yields the lines that tell what was done, and checks first that the study is a deployed one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cropkt_server.bank import Bank
from cropkt_server.lock import running
from cropkt_server.roster import Roster
from cropkt_server.runtime import deployed_host
from cropkt_server.settings import load_settings
from cropkt_server.store import Store, Task


def pause(folder: Path) -> Iterator[str]:
    """Send nothing new; what is under way is still taken in."""
    with opened_store(folder) as store:
        store.pause(True)
    yield "paused"


def resume(folder: Path) -> Iterator[str]:
    """Go on after a pause."""
    with opened_store(folder) as store:
        store.pause(False)
    yield "resumed"


def retry(folder: Path, *, site: str | None = None, row: str | None = None) -> Iterator[str]:
    """Make failed rows due again, of a site, of one name, or all; open a finished study."""
    with opened_store(folder) as store:
        again = store.retry(site, row)
        if row is not None and not again:
            yield f"{row} has not failed"
            return
        if not again:
            yield "no row has failed"
        yield from reopened(store, again)


def revoke_site(folder: Path, site: str) -> Iterator[str]:
    """Cut a hospital off, at once; what it gave before stays."""
    _check_deployed(folder)
    with contextlib.closing(Roster(folder)) as roster:
        enrolled = roster.revoke(site)
    yield f"{site} is cut off" if enrolled else f"the invite of {site} is void"


def revoke_expert(folder: Path, beginning: str) -> Iterator[str]:
    """Take an expert back, by the beginning of its hash, and what was made from it."""
    from cropkt_server.catalogue import revoked_in_words  # torch loads here

    _check_deployed(folder)
    with contextlib.closing(Bank(folder)) as bank:
        yield from revoked_in_words(bank, bank.revoke(beginning))


def reopened(store: Store, again: list[Task]) -> Iterator[str]:
    """Open the study for rows that are due again."""
    for task in again:
        yield f"again: {task.id}"
    if store.closed:
        store.close_study(False)
        yield "the study is open again"
    if not running(store.folder):
        yield "it does not run: start it"


def _check_deployed(folder: Path) -> None:
    deployed_host(load_settings(folder), folder)


@contextlib.contextmanager
def opened_store(folder: Path) -> Iterator[Store]:
    """Open the table of a study that is a deployed one."""
    _check_deployed(folder)
    store = Store(folder)
    try:
        yield store
    finally:
        store.close()
