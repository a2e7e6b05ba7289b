"""The page of a study, from its files alone, whether it runs or not."""

from __future__ import annotations

from pathlib import Path

from cropkt.report.page import write_page
from cropkt.report.runs import one_run
from cropkt_server.reading import reading
from cropkt_server.results import results
from cropkt_server.runtime import REPORT


def write(folder: Path, out: Path | None) -> Path:
    """Write the report of a study; return the path of its page.

    Raises:
        ConfigError: there is no study, or this version does not know its settings.
    """
    with reading(folder) as study:
        found = results(study)
    return write_page(one_run(found), folder / REPORT if out is None else out)[0]
