"""A coordinator's work, memory and wire, under the load of `benchmarks/bench_federation.py`."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cropkt.config import StudyConfig
from cropkt.messages import REPLIES, load
from cropkt_server.store import read_tasks

pytestmark = pytest.mark.timeout(1200)
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_federation.py"


def measured(folder: Path, *arguments: str) -> dict[str, Any]:
    """Return the figures of a run whose coordinator finished with every row done."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *arguments, "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return dict(found)


def history(study: Path) -> dict[str, list[tuple[str, str]]]:
    """Return what became of each site's rows, as (row, state) in the order in which it did."""
    site_of = {task.id: task.site for task in read_tasks(study)}
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    with closing(sqlite3.connect(study / "study.sqlite")) as database:
        for row, state in database.execute("SELECT id, state FROM trace ORDER BY rowid"):
            found[site_of[row]].append((row, state))
    return found


def test_experts_for_every_site_cross_in_bounded_memory_and_little_more_than_their_bytes(
    tmp_path: Path,
) -> None:
    found = measured(tmp_path, "bank", "--sites", "12")
    expert = 4e-6 * StudyConfig().shape.parameters  # MB
    experts = 12 * (1 + 11 + 11) * expert  # each gives one, and receives the others twice
    assert found["weights, MB"] == pytest.approx(experts)
    assert experts < found["wire, MB"] < 1.1 * experts
    assert found["peak memory, MB"] < 1500
    assert found["tries beyond the first"] == 0


def test_many_sites_that_share_cancers_are_asked_each_thing_once_and_one_after_the_other(
    tmp_path: Path,
) -> None:
    kept = tmp_path / "kept"
    found = measured(tmp_path, "load", "--sites", "24", "--cancers", "6", "--keep", str(kept))
    assert found["peak memory, MB"] < 1000
    kinds = ["describe", *2 * ["fit_expert"], "score_sources", *2 * ["fit_router"], "evaluate"]
    of_sites = history(kept / "study")
    assert len(of_sites) == 24
    for site, changes in of_sites.items():
        asked = [row for row, state in changes if state == "sent"]
        assert [row.partition("/")[0] for row in asked] == kinds, site
        # A row is done when its reply is stored; only then is its site sent the next one.
        assert changes == [(row, state) for row in asked for state in ("sent", "done")], site
    stored = [load(path, expected=REPLIES) for path in (kept / "study" / "replies").glob("*.npz")]
    rows = [row for changes in of_sites.values() for row, state in changes if state == "done"]
    assert sorted(reply.task for reply in stored) == sorted(rows)
