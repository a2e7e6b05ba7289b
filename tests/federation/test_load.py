"""A coordinator's memory and wire, as `benchmarks/bench_federation.py` measures them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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


def test_experts_for_every_site_cross_in_bounded_memory_and_little_more_than_their_bytes(
    tmp_path: Path,
) -> None:
    found = measured(tmp_path, "bank", "--sites", "12")
    experts = 12 * (1 + 11 + 11) * 4.8  # each gives one, and receives the others twice
    assert experts < found["weights, MB"] < found["wire, MB"] < 1.1 * found["weights, MB"]
    assert found["peak memory, MB"] < 1500


def test_many_sites_that_share_cancers_are_all_served(tmp_path: Path) -> None:
    found = measured(tmp_path, "load", "--sites", "24", "--cancers", "6")
    assert found["peak memory, MB"] < 1000
    assert {len(found[f"{kind}, latency, s"]) for kind in ("describe", "evaluate")} == {2}
