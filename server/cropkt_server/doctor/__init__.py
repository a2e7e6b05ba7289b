"""`cropkt-server doctor`: what would stop a study at night, said by day. It asks no other machine.

A study that runs meanwhile is only looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cropkt.checkup import Finding, failed, ok, part, skipped
from cropkt.errors import CropktError
from cropkt_server.doctor.machine import check_machine
from cropkt_server.doctor.records import check_records
from cropkt_server.runtime import startable_host
from cropkt_server.settings import load_settings


def examine(folder: Path) -> Iterator[Finding]:
    """Yield what the check-up of one study folder finds, a finding a check."""
    try:
        settings = load_settings(folder)
        host = startable_host(settings, folder)
    except CropktError as error:
        yield replace(failed("study.yaml", error), part="settings")
        for name in ("machine", "records"):
            yield replace(skipped("all of it", "study.yaml cannot be used"), part=name)
        return
    said = f"study {settings.name} at {host}, {settings.study.endpoint}"
    yield replace(ok("study.yaml", said), part="settings")
    yield from part("machine", lambda: check_machine(folder, settings, host))
    yield from part("records", lambda: check_records(folder, settings))
