"""The page of one run, or of several seeds of one study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cropkt.errors import UsageError
from cropkt.report.page import write_page
from cropkt.report.runs import read_runs


def write(folders: Sequence[Path], out: Path | None) -> Path:
    """Write the report of some runs; return the path of its page.

    Raises:
        UsageError: a folder that is no run, runs of different studies, or no place to write to.
        DataError: results that cannot be read.
    """
    if out is None and len(folders) > 1:
        raise UsageError("--out", "several runs need a folder for their report", "Name one")
    runs = read_runs(folders)
    return write_page(runs, folders[0] if out is None else out)[0]
