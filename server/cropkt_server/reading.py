"""What a study has found so far, from its files alone; nothing in its folder changes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from cropkt.config import parse_study
from cropkt_server.findings import Findings
from cropkt_server.membership import Enrolled, Member, Named
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
