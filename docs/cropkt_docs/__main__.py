"""`python -m cropkt_docs`: write `docs/reference/` anew."""

from __future__ import annotations

from cropkt_docs.pages import FOLDER, pages

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
