"""What the three commands share: how they answer at once, and end with one line to look up."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version

import pytest
import typer

from cropkt import __version__
from cropkt.console import TRACEBACK, fail, one_line
from cropkt.errors import CohortError


def ended(raises: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> tuple[str, int]:
    """Return the line and the exit code of a command that raises."""
    with pytest.raises(typer.Exit) as end, one_line("cropkt-sim"):
        raises()
    (line,) = capsys.readouterr().err.splitlines()
    return line, end.value.exit_code


def test_our_errors_end_with_the_name_to_look_up(capsys: pytest.CaptureFixture[str]) -> None:
    def raises() -> None:
        raise CohortError("labels.csv", "3 patients stand twice", "Keep one row each")

    line = "cropkt-sim: labels.csv: 3 patients stand twice. Keep one row each. [CohortError]"
    assert ended(raises, capsys) == (line, 65)


def test_a_fault_names_the_place_and_leaves_its_text_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises() -> None:
        raise KeyError("Jane Doe")

    line, code = ended(raises, capsys)
    assert code == 70
    assert "KeyError at console.py" in line
    assert "test_console.py" in line
    assert f"cropkt {__version__}, Python " in line
    assert "Jane" not in line
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(KeyError, match="Jane"), one_line("cropkt-sim"):
        raises()


def test_a_command_that_has_said_all_itself_ends_as_it_wants(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def raises() -> None:
        fail("cropkt-sim", "enough", 3)

    assert ended(raises, capsys) == ("cropkt-sim: enough", 3)


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (errno.EACCES, "cropkt-sim: study.yaml: Permission denied. [OSError]"),
        (
            errno.ENOSPC,
            "cropkt-sim: study.yaml: no space is left on a disk. Free some, and try again. "
            "[DiskFullError]",
        ),
    ],
)
def test_what_the_system_says_names_the_file(
    number: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises() -> None:
        raise OSError(number, os.strerror(number), "study.yaml")

    assert ended(raises, capsys) == (line, 74)


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
