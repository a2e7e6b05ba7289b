"""What a doctor finds: one finding a check, how findings are shown, the exit code they make.

No text of an error that cropkt did not write itself is ever shown: it may name a patient.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import typer

from cropkt.errors import CropktError

Word = Literal["ok", "warn", "fail", "skipped"]
SOON = 30  # days before its end in which a certificate is warned of
DAY = 86_400.0  # seconds
LITTLE_DISK, TOO_LITTLE_DISK = 10e9, 1e9  # bytes
_COLOURS: dict[Word, str] = {"ok": "green", "warn": "yellow", "fail": "red", "skipped": "dim"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    word: Word
    found: str
    fix: str = ""
    part: str = ""  # of the check-up: connection, compute, ...

    @property
    def line(self) -> str:
        """All of it as one line of printable characters."""
        fix = f". {self.fix}" if self.fix else ""
        return f"{self.word:<7} {self._title}: {_printable(self.found)}{_printable(fix)}"

    @property
    def _title(self) -> str:
        return f"{self.part}: {self.check}" if self.part else self.check


def ok(check: str, found: str) -> Finding:
    """Return that all is well."""
    return Finding(check, "ok", found)


def warn(check: str, found: str, fix: str) -> Finding:
    """Return that something will cost time or quality, and what to do."""
    return Finding(check, "warn", found, fix)


def fail(check: str, found: str, fix: str) -> Finding:
    """Return that something will fail, and what to do."""
    return Finding(check, "fail", found, fix)


def skipped(check: str, because: str) -> Finding:
    """Return that a check could not run."""
    return Finding(check, "skipped", because)


def failed(check: str, error: CropktError) -> Finding:
    """Return what an error says, with where it says that."""
    where = f"{error.where}: " if error.where else ""
    return fail(check, f"{where}{error.problem}", error.fix)


def until(check: str, ends: Iterable[tuple[str, float, str]]) -> Finding:
    """Judge how long certificates are still valid.

    Args:
        check: its name.
        ends: whose, the last second (unix), and the fix.
    """
    days = [(whose, end, (end - time.time()) / DAY, fix) for whose, end, fix in ends]
    for whose, _, left, fix in days:
        if left < SOON:
            return warn(check, f"{whose} ends in {left:.0f} days", fix)
    told = (f"{whose} {time.strftime('%Y-%m-%d', time.gmtime(end))}" for whose, end, *_ in days)
    return ok(check, f"valid until: {', '.join(told)}")


def disk(folder: Path, fix: str) -> Finding:
    """Write a file where a folder is or will be, and look how much room is left."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"cropkt")
            file.flush()
        free = shutil.disk_usage(there).free
    except OSError as error:
        why = error.strerror or type(error).__name__
        return fail("disk", f"{there} cannot be written ({why})", f"Let this user write. {fix}")
    text = f"{free / 1e9:.1f} GB free for {folder}"
    if free < TOO_LITTLE_DISK:
        return fail("disk", text, fix)
    return warn("disk", text, fix) if free < LITTLE_DISK else ok("disk", text)


def part(name: str, checks: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield the findings of one part of a check-up; one that breaks off ends with a finding."""
    last = ""
    try:
        for finding in checks():
            last = finding.check
            yield replace(finding, part=name)
    except CropktError as error:
        yield replace(failed("all of it", error), part=name)
    except Exception as error:
        found = f"the checks broke off after {last!r} ({type(error).__name__})"
        yield Finding("all of it", "fail", found, "Report this as a fault of cropkt", name)


def show(findings: Iterable[Finding], *, as_json: bool) -> int:
    """Print findings as they come, or at the end as one JSON list; return 1 if one says fail."""
    words: Counter[Word] = Counter()
    if as_json:
        listed = list(findings)
        words.update(finding.word for finding in listed)
        typer.echo(json.dumps([asdict(finding) for finding in listed]))
        return int(words["fail"] > 0)
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for finding in findings:
        words[finding.word] += 1
        if console.is_terminal:
            line = Text.assemble(
                (f"{finding.word:<8}", _COLOURS[finding.word]),
                (f"{finding._title}: ", "bold"),
                _printable(finding.found),
                ("\n        " + _printable(finding.fix) if finding.fix else "", "italic"),
            )
            console.print(line)
        else:
            typer.echo(finding.line)
    whole = ", ".join(f"{words[word]} {word}" for word in _COLOURS if words[word])
    typer.echo(whole or "nothing was checked")
    return int(words["fail"] > 0)


def _printable(text: str) -> str:
    """Return a text whose other characters, which a coordinator may have sent, are blanks."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
