"""`python -m cropkt_docs.transcript`: follow the README in a fresh clone, and keep what it prints.

Writes `docs/transcripts/first-hour.md`, with the seconds since the first command on the left. It
installs cropkt, and takes a quarter of an hour or more.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cropkt_docs.blocks import ROOT, blocks
from cropkt_docs.shell import Shell, bare

PAGE = ROOT / "docs" / "transcripts" / "first-hour.md"
HOME = "/home/you/cropkt"  # stands for the folder of the clone
INSTALLED = ".venv/bin/cropkt-sim run"  # what make prints when the installation is over


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the terminal."""

    seconds: float  # since the first command
    text: str

    @property
    def typed(self) -> bool:
        """Whether somebody typed it."""
        return self.text.startswith("$ ")


def commands() -> list[str]:
    """Return what the README has its reader type, from the demo to the last of two hospitals."""
    return [
        step.command if block.language == "console" else bare(step.command).rstrip()
        for block in blocks(ROOT / "README.md")
        if block.label == "slow" and not block.given
        for step in block.steps()
    ]


def record(folder: Path) -> Iterator[Line]:
    """Type the commands in `folder`; yield what is typed and printed as it comes."""
    began, shell = time.monotonic(), Shell(folder, COLUMNS="128")
    with contextlib.closing(shell):
        for command in commands():
            for part in f"$ {command}".splitlines():
                yield Line(time.monotonic() - began, part)
            for line in shell.lines(command):
                yield Line(time.monotonic() - began, line.rstrip().replace(str(folder), HOME))
            if shell.code:
                raise SystemExit(f"{command}: ended with {shell.code}")


def page(lines: Sequence[Line], load: float) -> str:
    """Return the page.

    Args:
        lines: of the terminal.
        load: of the machine before the first command.
    """
    installed = next(line.seconds for line in lines if line.text.startswith(INSTALLED))
    federated = next(line.seconds for line in lines if line.text.startswith("$ mkdir practice"))
    shown = next(line.seconds for line in lines if line.text.startswith("$ . .venv"))
    reported = next(line.seconds for line in lines if line.text.endswith("report.html"))
    text = "\n".join(f"{line.seconds:7.1f}  {line.text}".rstrip() for line in lines)
    return f"""\
# A newcomer's first hour

What the commands of the [README](../../README.md) printed in a fresh clone, typed by
`python -m cropkt_docs.transcript` without a pause, with seconds since the first on the left.
{os.cpu_count()} cores, with a load of {load:.1f} before the first command.

| | took | aim |
|---|---|---|
| `make demo`, installing | {installed:.0f} s | |
| from the install's end to the demo's result | {shown - installed:.0f} s | 5 minutes |
| two hospitals, from the first command to the report | {reported - federated:.0f} s | 10 minutes |

```text
{text}
```
"""


def main() -> None:
    """Write the page."""
    load, lines = os.getloadavg()[0], list[Line]()
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "cropkt"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        for line in record(clone):
            sys.stderr.write(f"{line.seconds:7.1f}  {line.text}\n")
            lines.append(line)
    PAGE.write_text(page(lines, load), encoding="utf-8")


if __name__ == "__main__":
    main()
