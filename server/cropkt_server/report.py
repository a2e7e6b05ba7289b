"""The page of a study, from its files alone, whether it runs or not."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from cropkt.config import parse_study
from cropkt.report.page import write_page
from cropkt.report.runs import one_run
from cropkt_server.findings import Findings
from cropkt_server.membership import Enrolled, Member, Named
from cropkt_server.results import results
from cropkt_server.runtime import REPORT
from cropkt_server.settings import Settings, load_settings
from cropkt_server.study import Study


class _Reader(Study):
    """What a study has found so far; unlike a study, it changes no row."""

    def __init__(self, folder: Path, settings: Settings, members: tuple[Member, ...]) -> None:
        Findings.__init__(self, folder, settings.study, read_only=True)
        self._members = members
        began = self.store.meta("config")
        if began is not None:  # what was done counts, not what study.yaml says since
            self.config = parse_study(json.loads(began), str(folder))


def write(folder: Path, out: Path | None) -> Path:
    """Write the report of a study; return the path of its page.

    Raises:
        ConfigError: there is no study, or this version does not know its settings.
    """
    with reading(folder) as study:
        found = results(study)
    return write_page(one_run(found), folder / REPORT if out is None else out)[0]


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[Study]:
    """Open what a study has found so far; nothing in its folder changes.

    Raises:
        ConfigError: there is no study, or this version does not know its settings.
    """
    settings = load_settings(folder)
    membership = Named(settings.sites) if settings.sites else Enrolled(folder, read_only=True)
    try:
        members = membership.members()
    finally:
        if isinstance(membership, Enrolled):
            membership.close()
    study = _Reader(folder, settings, members)
    try:
        yield study
    finally:
        study.store.close()
