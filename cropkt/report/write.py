"""The report of a study as files: the numbers, two tables and two figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from cropkt.errors import DataError
from cropkt.files import replace_file
from cropkt.report.figures import draw_gain, draw_transfer
from cropkt.report.schema import Results
from cropkt.report.tables import write_per_cancer_csv, write_transfer_csv


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write `results.json`, `transfer.csv`, `per_cancer.csv`, `transfer.png` and `gain.png`.

    Each file is replaced whole, and equal results give equal bytes. Nothing is written if the
    results hold a number that JSON cannot.

    Returns:
        The paths of the files, in the order above.

    Raises:
        DataError: a NaN or an infinity among the results; the message says where.
        OSError: the folder cannot be written.
    """
    numbers = canonical_json(results)
    paths = [folder / "results.json"]
    replace_file(paths[0], numbers)
    for name, write in (
        ("transfer.csv", write_transfer_csv),
        ("per_cancer.csv", write_per_cancer_csv),
        ("transfer.png", draw_transfer),
        ("gain.png", draw_gain),
    ):
        paths.append(folder / name)
        write(results, paths[-1])
    return paths


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
