"""Every command of the documentation is run, and prints what the page says it prints."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import pytest

from cropkt_docs import transcript
from cropkt_docs.blocks import ROOT, SHOWN, Block, LabelError, Step, blocks, pages
from cropkt_docs.shell import Shell

BLOCKS = [block for page in pages() for block in blocks(page)]
IN_SOURCE = ("README.md", "CONTRIBUTING.md")  # pages to be followed in the source tree


def by_page(*, slow: bool) -> list[tuple[str, list[Block]]]:
    """Return the blocks to run of every page that has some, slow ones among them or none."""
    chosen = [block for block in BLOCKS if block.label != "shown"]
    found = [(page, list(mine)) for page, mine in groupby(chosen, key=lambda block: block.page)]
    return [
        (page, mine) for page, mine in found if any(one.label == "slow" for one in mine) == slow
    ]


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    (home := tmp_path / "home").mkdir()
    place = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    one = Shell(tmp_path, PATH=place, HOME=str(home), COLUMNS="120")
    yield one
    one.close()


def plain(text: str) -> list[str]:
    """Return lines whose words with digits and whose spaces are all alike."""
    words = (line.split() for line in text.replace(str(Path.home()), "~").splitlines())
    return [" ".join("#" if re.search(r"\d", word) else word for word in line) for line in words]


def agrees(told: str, printed: str) -> bool:
    """Return whether what a page shows is what was printed; `...` stands for any lines."""
    pattern = "".join(
        r"(?:.*\n)*" if line == "..." else re.escape(line) + r"\n" for line in plain(told)
    )
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in plain(printed))) is not None


def follow(shell: Shell, mine: Sequence[Block]) -> None:
    """Do what a page says."""
    for block in mine:
        for step in block.steps():
            _follow(shell, block, step)


def _follow(shell: Shell, block: Block, step: Step) -> None:
    command = step.command
    if block.language == "python":
        command = f"python - <<'PYTHON'\n{command}\nPYTHON"
    printed, code = shell.run(command)
    said = f"{block.where}: $ {step.command}\n{printed}"
    assert code == step.code, said
    if step.output is not None:
        assert agrees(step.output, printed), f"{said}\nthe page shows:\n{step.output}"


def name(value: object) -> str:
    """Return how a test of a page is called."""
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("page", "mine"), by_page(slow=False), ids=name)
def test_the_commands_of_a_page(page: str, mine: list[Block], shell: Shell) -> None:
    follow(shell, mine)


@pytest.mark.docs
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("page", "mine"), by_page(slow=True), ids=name)
def test_the_longer_commands_of_a_page(
    page: str, mine: list[Block], shell: Shell, tmp_path: Path
) -> None:
    if page in IN_SOURCE:
        shell.run(f"cd {source_tree(tmp_path)}")
    follow(shell, mine)


def source_tree(folder: Path) -> Path:
    """Copy the source tree, with this environment as its `.venv`; return the copy."""
    if not (Path(sys.prefix) / ".installed-run").exists():
        pytest.skip("`make demo` would install: run this with make test-docs")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    copy = folder / "source"
    for path in filter(None, listed.stdout.split("\0")):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, copy / path)  # with its time, or make would install again
    (copy / ".venv").symlink_to(sys.prefix)
    return copy


def test_the_transcript_shows_what_the_readme_has_its_reader_type() -> None:
    lines = [line[9:] for line in transcript.PAGE.read_text().splitlines()]
    told = "\n".join(lines)
    for command in transcript.commands():
        assert f"\n$ {command}\n" in told, command
    assert sum(line.startswith("$ ") for line in lines) == len(transcript.commands())


def test_what_is_not_run_says_why() -> None:
    """List them with `pytest -rA`."""
    for block in BLOCKS:
        if block.label == "shown":
            assert SHOWN[block.reason]
    assert {block.label for block in BLOCKS} == {"run", "slow", "shown"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("```\nls\n```\n", "name the block's language"),
        ("```sh\nls\n```\n", "label the block"),
        ("```sh later\nls\n```\n", "is no label"),
        ("```sh shown\nls\n```\n", "is no label"),
        ("```sh shown=lazy\nls\n```\n", "is no label"),
        ("```sh run=root\nls\n```\n", "is no label"),
        ("```sh run\nls\n", "never ends"),
        ("```console run\nprinted\n$ ls\n```\n", "output before"),
    ],
)
def test_a_block_without_a_known_label_is_an_error(
    text: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("cropkt_docs.blocks.ROOT", tmp_path)
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(LabelError, match=re.escape(says)):
        [block.steps() for block in blocks(tmp_path / "page.md")]


@pytest.mark.parametrize(
    ("told", "printed", "same"),
    [
        ("port 8443", "port 9000", True),
        ("port 8443", "gate 8443", False),
        ("a\n...\nz", "a\nb\nc\nz", True),
        ("a\n...\nz", "a\nz\n", True),
        ("a\n...\nz", "a\nb", False),
        ("", "something", False),
    ],
)
def test_numbers_may_differ_and_words_may_not(told: str, printed: str, same: bool) -> None:
    assert agrees(told, printed) is same


def test_a_failing_or_lying_command_is_found(shell: Shell, tmp_path: Path) -> None:
    def block(text: str, language: str = "console", code: int = 0) -> list[Block]:
        return [
            Block(page="p", line=1, language=language, label="run", reason="", code=code, text=text)
        ]

    follow(shell, block("$ echo one; \\\n  echo two\none\ntwo\n$ export X=4"))
    follow(shell, block("test $X = 4; (exit 3)", "sh", code=3))
    follow(shell, block("assert 1 + 1 == 2", "python"))
    for wrong in (block("$ false"), block("$ echo one\ntwo"), block("1 / 0", "python")):
        with pytest.raises(AssertionError, match="p:1"):
            follow(shell, wrong)
