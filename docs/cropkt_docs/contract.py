"""What may travel, and the card of an expert, from the dataclasses that check them."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

from cropkt.config import MAX_WEIGHTS, StudyConfig
from cropkt.experts.card import MAX_CARD, Card
from cropkt.messages import MAX_ITEMS, MAX_TEXT, REPLIES, REQUESTS
from cropkt_docs.fields import entries, table

_MESSAGES = f"""\
# Messages

The whole list of what may travel between a coordinator and a hospital. Both sides check each
message where it is made and again where it arrives; anything else is refused. No field carries a
patient, a slide, a patch, a feature, an attention map, an event time or a path.

One message holds at most {MAX_TEXT:,} characters of text, {MAX_ITEMS:,} numbers, texts and lists in
it, and {MAX_WEIGHTS:,} float32 values in its matrices, all finite. A hospital's `site.yaml` sets a
lower bound for what leaves (`release.max_megabytes`). `null` counts are suppressed ones.
"""
_CARD = f"""\
# Card of an expert

What an expert says of itself: canonical JSON (sorted keys, no spaces, ASCII) of at most
{MAX_CARD:,} characters, signed with Ed25519 by the hospital that trained it or by the coordinator
that averaged it. The card holds the SHA-256 of every model's weights, so the signature covers them
too. In a file it stands in the metadata of safetensors beside its signature.
"""
_HEADER = ("field", "what it is", "default", "meaning")


def messages_page() -> str:
    """Return `messages.md`."""
    parts = [_MESSAGES, "## Questions, from the coordinator\n"]
    parts += [_section(kind, "###") for kind in REQUESTS]
    parts += ["## Answers, from a hospital\n", *(_section(kind, "###") for kind in REPLIES)]
    parts.append("## Parts of messages\n")
    parts.append("### StudyConfig\n\nThe section `study` of [study.yaml](study-yaml.md).\n")
    parts += [_section(kind, "###") for kind in _parts((*REQUESTS, *REPLIES))]
    return "\n".join(parts)


def card_page() -> str:
    """Return `card.md`."""
    card: tuple[type[Any], ...] = (Card,)
    parts = (_section(kind, "##") for kind in (*card, *_parts(card)))
    return "\n".join([_CARD, *parts])


def _section(kind: type[Any], level: str) -> str:
    name = getattr(kind, "kind", "")
    title = f"{level} {kind.__name__}\n"
    about = f"`{name}`: " if isinstance(name, str) and name and "." in name else ""
    rows = [
        (f"`{entry.name}`", entry.kind, entry.default, entry.meaning) for entry in entries(kind)
    ]
    return f"{title}\n{about}{(kind.__doc__ or '').strip()}\n\n{table(rows, *_HEADER)}\n"


def _parts(kinds: tuple[type[Any], ...]) -> list[type[Any]]:
    """Return the dataclasses that others hold, in the order in which they are met."""
    found: dict[type[Any], None] = {}

    def look(hint: Any) -> None:
        if isinstance(hint, type) and is_dataclass(hint) and hint is not StudyConfig:
            if hint not in found and hint not in kinds:
                found[hint] = None
            if hint in found or hint in kinds:
                for below in get_type_hints(hint, include_extras=True).values():
                    if below is not hint:
                        look(below)
        for inside in get_args(hint):
            look(inside)

    for kind in kinds:
        look(kind)
    return list(found)
