"""What a process tells its starter, and what is heard of one that says nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cropkt_server.readiness import readiness

SAYS = "import sys; sys.path[:] = {path!r}; from cropkt_server.readiness import *\n{code}"


@pytest.mark.parametrize(
    ("code", "heard"),
    [
        ("tell_ready()", None),
        ("import time; time.sleep(0.3); tell_ready(); time.sleep(60)", None),
        (
            "from cropkt.errors import UsageError\nwith telling_why():\n raise UsageError('a','b')",
            "a: b.",
        ),
        ("raise SystemExit(3)", ""),
    ],
)
def test_a_process_is_heard(code: str, heard: str | None) -> None:
    with readiness() as listening:
        child = subprocess.Popen(
            [sys.executable, "-c", SAYS.format(path=sys.path, code=code)],
            env={**os.environ, **listening.environment},
            stderr=subprocess.DEVNULL,
        )
        try:
            assert listening.wait(child) == heard
        finally:
            child.kill()
            child.wait()
