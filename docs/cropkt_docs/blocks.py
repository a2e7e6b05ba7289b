"""The fenced blocks of the documentation, and what their labels say is done with them.

The words behind a block's language are its label; renderers show none of it:

    ```console run               every command is run, and its output compared
    ```sh slow                   the same, by `make test-docs` alone
    ```sh run code=3             the last command ends with this code
    ```sh run until=token        each stays: it is interrupted once it has printed this word
    ```sh run given=hospital     before it, the test lays down what GIVEN says
    ```console shown=root        never run, for one of the reasons in SHOWN
    ```text                      no commands

Blocks of one page are run one after another in one shell, in an empty folder. In a `console` block
a line that begins with `$ ` is a command, and lines until the next one are its output: numbers in
it may differ, a line `...` stands for any lines, and a block without output compares nothing. A
command may go on over lines that end with a backslash. In a `sh` block every line is a command.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHOWN = {
    "root": "needs root: it sets up a machine",
    "engine": "needs a container engine",
    "network": "needs a machine beyond this one, or downloads",
    "gpu": "needs a GPU",
}
GIVEN = {
    "study": "a study that nobody has enrolled in, `study`",
    "hospital": "an enrolled hospital with practice data, `site.yaml`, whose coordinator runs",
    "released": "a hospital to which a study released a model, with new slides and an expert",
    "published": "published checkpoints for features of width 24",
    "tcga_cdr": "a small table in the form of TCGA-CDR, `tcga_cdr.csv`",
}
PROGRAMS = ("console", "sh", "bash", "shell", "python")  # languages whose blocks need a label
PLAIN = ("text", "yaml", "mermaid", "ini", "toml", "csv", "json", "dockerfile")

_FENCE = re.compile(r"^(?P<fence>`{3,}|~{3,})(?P<info>[^`]*)$")


class LabelError(ValueError):
    """A block's label says nothing, or something that nobody knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command, and what it prints; None: not compared."""

    command: str
    output: str | None
    code: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block of a page."""

    page: str  # path from the root
    line: int
    language: str
    label: str  # run, slow, or shown
    reason: str  # of `shown`: a key of SHOWN
    code: int
    text: str
    given: str = ""  # a key of GIVEN
    until: str = ""  # what a command that stays prints

    @property
    def where(self) -> str:
        """Page and line."""
        return f"{self.page}:{self.line}"

    def steps(self) -> list[Step]:
        """Return the commands of a block."""
        if self.language == "python":
            return [Step(command=self.text, output=None, code=self.code)]
        found: list[tuple[list[str], list[str]]] = []
        lines, prompt = iter(self.text.splitlines()), "$ " if self.language == "console" else ""
        for line in lines:
            if line.startswith(prompt):
                command = [line.removeprefix(prompt)]
                while command[-1].endswith("\\"):
                    command.append(next(lines))
                found.append((command, []))
            elif found:
                found[-1][1].append(line)
            else:
                raise LabelError(f"{self.where}: output before the first `$ `")
        compared = any(output for _, output in found)
        last = len(found) - 1
        return [
            Step(
                command="\n".join(command),
                output="\n".join(output) if compared else None,
                code=self.code if i == last or self.until else 0,
            )
            for i, (command, output) in enumerate(found)
        ]


def pages() -> list[Path]:
    """Return every Markdown page for people."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    return [*found, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page that hold commands.

    Raises:
        LabelError: a block has no language or label, or one that nobody knows.
    """
    name, inside = page.relative_to(ROOT).as_posix(), ""
    start, info, text = 0, "", list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = _FENCE.match(line.strip()) if not inside or line.strip() == inside else None
        if fence and not inside:
            inside, info, start, text = fence["fence"], fence["info"].strip(), number, []
        elif fence:
            inside = ""
            if block := _block(name, start, info, "\n".join(text)):
                yield block
        elif inside:
            text.append(line)
    if inside:
        raise LabelError(f"{name}:{start}: a block that never ends")


def _block(page: str, line: int, info: str, text: str) -> Block | None:
    kind, *words = info.split() or [""]
    where = f"{page}:{line}"
    if kind in PLAIN:
        return None
    if kind not in PROGRAMS:
        raise LabelError(f"{where}: name the block's language, {kind!r} is not known")
    options = dict(word.partition("=")[::2] for word in words)
    code = int(options.pop("code", "0"))
    given, until = options.pop("given", ""), options.pop("until", "")
    if len(options) != 1:
        raise LabelError(f"{where}: label the block run, slow or shown=REASON")
    ((label, reason),) = options.items()
    if label not in ("run", "slow", "shown") or (label == "shown") != (reason in SHOWN):
        raise LabelError(f"{where}: {label}={reason} is no label; see cropkt_docs/blocks.py")
    if given and given not in GIVEN:
        raise LabelError(f"{where}: nobody knows how to give {given}")
    return Block(
        page=page,
        line=line,
        language=kind,
        label=label,
        reason=reason,
        code=code,
        text=text,
        given=given,
        until=until,
    )
