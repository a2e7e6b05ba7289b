"""Every command of the documentation is run, and prints what the page says it prints."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import click
import pytest

from cropkt_docs import transcript
from cropkt_docs.blocks import ROOT, SHOWN, Block, LabelError, Step, blocks, pages
from cropkt_docs.commands import refuse_unknown
from cropkt_docs.shell import Shell

BLOCKS = [block for page in pages() for block in blocks(page)]
IN_SOURCE = ("README.md", "CONTRIBUTING.md")  # pages to be followed in the source tree


def by_page(*, slow: bool) -> list[tuple[str, list[Block]]]:
    """Return the blocks to run of every page that has some: the quick alone, or with the slow."""
    labels = ("run", "slow") if slow else ("run",)
    chosen = [block for block in BLOCKS if block.label in labels]
    found = [(page, list(mine)) for page, mine in groupby(chosen, key=lambda block: block.page)]
    return [(page, mine) for page, mine in found if labels[-1] in {one.label for one in mine}]


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


def follow(shell: Shell, mine: Sequence[Block], give: Callable[[str], None]) -> None:
    """Do what a page says."""
    for block in mine:
        give(block.given)
        for step in block.steps():
            _follow(shell, block, step)


def _follow(shell: Shell, block: Block, step: Step) -> None:
    command = step.command
    if block.language == "python":
        command = f"python - <<'PYTHON'\n{command}\nPYTHON"
    stays = block.until
    printed, code = shell.interrupt(command, stays) if stays else shell.run(command)
    said = f"{block.where}: $ {step.command}\n{printed}"
    assert code == step.code, said
    if step.output is not None:
        assert agrees(step.output, printed), f"{said}\nthe page shows:\n{step.output}"


def name(value: object) -> str:
    """Return how a test of a page is called."""
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("page", "mine"), by_page(slow=False), ids=name)
def test_the_commands_of_a_page(
    page: str, mine: list[Block], shell: Shell, give: Callable[[str], None]
) -> None:
    follow(shell, mine, give)


@pytest.mark.docs
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("page", "mine"), by_page(slow=True), ids=name)
def test_the_longer_commands_of_a_page(
    page: str, mine: list[Block], shell: Shell, tmp_path: Path, give: Callable[[str], None]
) -> None:
    if page in IN_SOURCE:
        shell.run(f"cd {source_tree(tmp_path)}")
    follow(shell, mine, give)


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
        ("```sh run given=luck\nls\n```\n", "nobody knows how to give luck"),
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


def block(text: str, language: str = "console", *, code: int = 0, until: str = "") -> Block:
    """Return a block that is run."""
    return Block(
        page="p",
        line=1,
        language=language,
        label="run",
        reason="",
        code=code,
        text=text,
        until=until,
    )


STAYS = "python -uc 'print(1); import time; time.sleep(60)'  # until Ctrl-C"


@pytest.mark.parametrize(
    "right",
    [
        block("$ echo one; \\\n  echo two\none\ntwo\n$ X=4\n$ test $X = 4"),
        block("X=4\ntest $X = \\\n  4\n(exit 3)", "sh", code=3),
        block("assert 1 + 1 == 2", "python"),
        block(f"{STAYS}\n{STAYS}", "sh", until="1", code=130),
    ],
)
def test_a_command_that_does_as_told_passes(right: Block, shell: Shell) -> None:
    follow(shell, [right], lambda _: None)


@pytest.mark.parametrize(
    "wrong",
    [
        block("$ false"),
        block("$ echo one\ntwo"),
        block("1 / 0", "python"),
        block("false\ntrue", "sh"),
        block("echo 1", "sh", until="1", code=130),
        block("true", "sh", until="1"),
    ],
)
def test_a_failing_or_lying_command_is_found(wrong: Block, shell: Shell) -> None:
    with pytest.raises(AssertionError, match="p:1"):
        follow(shell, [wrong], lambda _: None)


@pytest.mark.parametrize("mine", [b for b in BLOCKS if b.label == "shown"], ids=lambda b: b.where)
def test_the_commands_that_are_only_shown_exist(mine: Block) -> None:
    for step in mine.steps():
        refuse_unknown(step.command)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("cropkt-server frobnicate study", "No such command 'frobnicate'"),
        ("sudo -u cropkt /opt/bin/cropkt-client release lost", "No such command 'lost'"),
        ("cropkt-client doctor --quick", "No such option '--quick'"),
        ("cropkt-client --site leiden --cancer", "requires an argument"),
        ("podman run it cropkt-server start \\\n  --linger long", "'long' is not a valid float"),
        ("cropkt-server stop study twice  # both", "unexpected extra argument (twice)"),
        ("cropkt-client enrol", "Missing argument"),
    ],
)
def test_a_command_that_does_not_exist_is_found(command: str, says: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        refuse_unknown(command)
    assert says in caught.value.format_message()


@pytest.mark.parametrize(
    "command",
    [
        "systemctl enable --now cropkt-client",
        "cropkt-server start study --board > said.txt",
        "cropkt-client release list --config site.yaml | grep fit",
    ],
)
def test_a_command_that_exists_passes(command: str) -> None:
    refuse_unknown(command)
