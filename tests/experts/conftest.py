"""What a computation costs a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

WATCH = """
import pathlib, sys, torch
torch.set_num_threads(1)
torch.mm(torch.ones(64, 64), torch.ones(64, 64))
def resident(name):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
def start():
    global before
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
def stop():
    sys.stdout.write(str(resident("VmHWM") - before))
"""


@pytest.fixture(scope="session")
def peak_of() -> Callable[[str], int]:
    """Return a function that runs code in a child and gives the bytes of its peak.

    The peak of resident memory (VmHWM) between the code's calls of `start()` and `stop()`, above
    what was resident at the start.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux tells the peak of resident memory")

    def run(code: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", WATCH + code], capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    return run
