"""What all three commands share."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

COMMANDS = ("server", "client", "sim")


@pytest.mark.parametrize("command", COMMANDS)
def test_version_and_help_answer_at_once(command: str) -> None:
    """Neither loads rich, which alone would double the time, nor anything larger."""
    code = (
        f"import sys; from cropkt_{command}.cli import main\n"
        "for asked in ('--version', '--help'):\n"
        "    sys.argv = ['cropkt', asked]\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'flwr', 'numpy', 'httpx', 'rich'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *help_, loaded = ran.stdout.splitlines()
    assert first == f"cropkt {version('cropkt')}, Flower {version('flwr')}"
    assert any(f"cropkt-{command} " in line for line in help_)  # an example
    assert any("--version" in line for line in help_)
    assert loaded == "[]"
