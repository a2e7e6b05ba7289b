"""What a study leaves when it ends: its numbers, tables and two figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from cropkt.errors import DataError
from cropkt.files import replace_file
from cropkt.report.canvas import png
from cropkt.report.csv_files import csv_files
from cropkt.report.gain_plot import draw_gain
from cropkt.report.heat_map import draw_transfer
from cropkt.report.schema import Results


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write `results.json`, the CSV files, `transfer.png` and `gain.png`.

    Each file is replaced whole, and equal results give equal bytes. Nothing is written if the
    results hold a number that JSON cannot.

    Returns:
        The paths of the files, in the order above.

    Raises:
        DataError: a NaN or an infinity among the results; the message says where.
        OSError: the folder cannot be written.
    """
    files = {"results.json": canonical_json(results), **csv_files(results)}
    for name, draw in (("transfer.png", draw_transfer), ("gain.png", draw_gain)):
        files[name] = png(draw(results))
    for name, content in files.items():
        replace_file(folder / name, content)
    return [folder / name for name in files]


def canonical_json(results: Results) -> bytes:
    """Return the results as UTF-8 JSON with sorted keys, one value a line.

    Raises:
        DataError: a NaN or an infinity among the results; the message says where.
    """
    for where in _not_finite(results, ()):
        raise DataError(
            "results", f"{where} is not a finite number", "Write null where nothing is estimable"
        )
    text = json.dumps(results, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    return f"{text}\n".encode()


def _not_finite(value: object, path: tuple[str, ...]) -> Iterator[str]:
    """Yield where NaN and infinities are, as `targets.UVM.arms.local.se`."""
    if isinstance(value, float) and not math.isfinite(value):
        yield ".".join(path)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _not_finite(inner, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _not_finite(inner, (*path, str(index)))
