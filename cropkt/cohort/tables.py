"""Text tables: CSV, TSV or semicolons, plain or gzipped, every cell as text.

Nothing is interpreted here: "NA" is a valid tissue source site, so no word stands for a gap.
"""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from cropkt.errors import OutcomeTableError


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TextTable:
    """Cells by column name in lower case; `rows` are (row number, cells), the header is row 1."""

    columns: tuple[str, ...]
    rows: tuple[tuple[int, dict[str, str]], ...]


def read_table(path: Path) -> TextTable:
    """Read a table whose first line is its header; the separator is the header's commonest.

    Raises:
        OutcomeTableError: not a readable text table, a column name twice, a row of another
            length than the header, or no row at all.
    """
    try:
        with _open(path) as file:
            first = file.readline()
            file.seek(0)
            separator = max(",\t;", key=first.count)
            records = list(csv.reader(file, delimiter=separator, strict=True))
    except FileNotFoundError as error:
        raise OutcomeTableError(path, "no such file", "Give the path of the table") from error
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise OutcomeTableError(
            path, "not a readable text table", "Save it as CSV or TSV in UTF-8"
        ) from error
    columns = tuple(name.strip().lower() for name in records[0]) if records else ()
    named = [name for name in columns if name]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise OutcomeTableError(path, f"columns {twice} appear twice", "Keep one of each")
    rows = []
    for number, cells in enumerate(records[1:], start=2):
        if not cells:
            continue  # a blank line
        if len(cells) != len(columns):
            raise OutcomeTableError(
                f"{path} row {number}",
                f"{len(cells)} cells under {len(columns)} columns",
                "Quote cells that hold the separator",
            )
        rows.append((number, dict(zip(columns, map(str.strip, cells), strict=True))))
    if not rows:
        raise OutcomeTableError(path, "the table is empty", "It needs a header and a row")
    return TextTable(columns=columns, rows=tuple(rows))


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")
