"""How much memory and disk a machine has, and which GPU driver, asked without torch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_MEMORY = Path("/proc/meminfo")
_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
"""Of a container, with what is used: cgroups of version 2 and 1."""
SHARED = Path("/dev/shm")


def memory() -> tuple[int, int] | None:
    """Return (available, total) bytes of memory for this process; None if the system hides it."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
        available, total = (
            int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal")
        )
    except (OSError, KeyError, ValueError):
        return None
    for limit, used in _LIMITS:
        try:
            most, now = int(limit.read_text()), int(used.read_text())
        except (OSError, ValueError):  # no container, or one without a limit
            continue
        total, available = min(total, most), min(available, max(0, most - now))
    return available, total


def driver() -> str | None:
    """Return the version of the NVIDIA driver; None if there is none that answers."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    try:
        said = subprocess.run(
            [command, "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(said.stdout.split()), None)
