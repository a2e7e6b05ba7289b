"""All pages of `docs/reference/` by name."""

from __future__ import annotations

from pathlib import Path

from cropkt_docs import codes, commands, contract, settings

FOLDER = Path(__file__).parents[1] / "reference"
_MADE = "<!-- Made from the code by `make docs`: change the code, not this file. -->\n"


def pages() -> dict[str, str]:
    """Return the text of every page that is made from the code."""
    texts = {
        "commands.md": commands.page(),
        "study-yaml.md": settings.study_page(),
        "site-yaml.md": settings.site_page(),
        "messages.md": contract.messages_page(),
        "card.md": contract.card_page(),
        "exit-codes.md": codes.page(),
    }
    return {name: f"{_MADE}\n{text.rstrip()}\n" for name, text in texts.items()}
