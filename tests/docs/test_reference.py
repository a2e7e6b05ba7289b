"""The reference says what the code says, and no error is left without an explanation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cropkt_docs.codes import errors, failure_codes, refusals
from cropkt_docs.commands import all_commands
from cropkt_docs.pages import FOLDER, pages

DOCS = Path(__file__).parents[2] / "docs"
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def headings(page: Path) -> dict[str, str]:
    """Return the anchors of a page with the text below each."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    parts = re.split(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-"): body
        for title, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def test_the_committed_reference_is_what_the_code_says() -> None:
    made = pages()
    assert {path.name for path in FOLDER.iterdir()} == set(made)
    for name, text in made.items():
        assert (FOLDER / name).read_text() == text, f"{name} is out of date: run `make docs`"


def test_every_error_failure_and_refusal_has_a_cause_and_what_to_do() -> None:
    told = headings(DOCS / "troubleshooting.md")
    names = [*(kind.__name__ for kind in errors()), *failure_codes(), *refusals(), "Fault"]
    assert len(names) > 60
    for name in names:
        body = told.get(name.lower(), "")
        assert "- Cause: " in body, f"{name} is not in troubleshooting.md"
        assert "- Do: " in body, f"{name} has nothing to do about it"


def test_every_command_option_and_argument_says_what_it_is() -> None:
    for name, command in all_commands():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help or parameter.hidden, f"{name}: {parameter.name}"


@pytest.mark.parametrize(
    "page",
    [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))],
    ids=lambda path: path.relative_to(DOCS.parent).as_posix(),
)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(re.sub(r"`[^`]*`", "", page.read_text())):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        if anchor and path.suffix == ".md":
            assert anchor in headings(path), link
