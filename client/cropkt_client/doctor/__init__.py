"""`cropkt-client doctor`: what would go wrong at night, said by day.

Its output stays with whoever runs it, on site: it holds counts, and no id, file name or time of a
patient.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cropkt.checkup import Finding, failed, ok, part, skipped
from cropkt.errors import CropktError
from cropkt_client.doctor.connection import Connection
from cropkt_client.settings import read_settings


def examine(
    config: Path,
    *,
    device: str = "auto",
    probe: float = 20.0,
    full: bool = False,
    splits: Sequence[Path] = (),
) -> Iterator[Finding]:
    """Yield what the check-up of one site finds, a finding a check.

    Args:
        config: its `site.yaml`.
        device: where it will train: auto, cuda[:i], cpu or mps.
        probe: seconds that the trial of training may take; 0: none.
        full: read every slide, however long that takes.
        splits: files of the folds of other work on these patients.
    """
    logging.getLogger("cropkt").addHandler(logging.NullHandler())  # children's words are no finding
    config = config.resolve()
    try:
        settings = read_settings(config)
    except CropktError as error:
        yield replace(failed("site.yaml", error), part="settings")
        for name in ("connection", "compute", "data"):
            yield replace(skipped("all of it", "site.yaml cannot be read"), part=name)
        return
    served = " ".join(settings.cancers)
    yield replace(ok("site.yaml", f"site {settings.site}, cancers {served}"), part="settings")
    connection = Connection(settings, (config.parent / settings.state).resolve())
    yield from part("connection", connection.checks)
    known = connection.known
    study = known.config if known and known.config else None

    from cropkt_client.doctor.cohort import Cohorts  # torch loads here
    from cropkt_client.doctor.compute import Compute
    from cropkt_client.doctor.folds import minima, other_splits

    fewest = minima(settings).minimum_patients
    compute = Compute(config, connection.state, device, fewest=fewest)
    yield from part("compute", compute.checks)
    data = Cohorts(config, study, full=full)
    yield from part("data", data.checks)
    if splits:
        yield from part("data", lambda: [other_splits(splits)])
    yield from part("time", lambda: compute.probe(data.usable, data.study, probe))
