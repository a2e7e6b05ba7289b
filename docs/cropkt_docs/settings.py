"""The two YAML files, from the dataclasses that check them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from cropkt.config import StudyConfig
from cropkt_client.settings import AuditLimit, Privacy, ReleasePolicy, SiteConfig
from cropkt_docs.fields import entries, table
from cropkt_server.settings import Settings
from cropkt_server.template import meaning

_STUDY = """\
# study.yaml

What a coordinator decides. `cropkt-server init` writes it with every setting, its default and what
it means. An unknown key, or a value out of bounds, is refused by name. What stands under `study`
decides the numbers and cannot change once the study has begun.
"""
_SITE = """\
# site.yaml

What a hospital says of itself. `cropkt-client enrol` writes it; relative paths are meant from its
folder. An unknown key, or a value out of bounds, is refused by name. Changes count from the next
message on; `site`, `cancers` and `state` from the next start.
"""
_HEADER = ("setting", "what it is", "default", "meaning")


def study_page() -> str:
    """Return `study-yaml.md`."""
    rows = list(_study_rows(Settings(name="NAME", study=StudyConfig()), ""))
    return f"{_STUDY}\n{table(rows, *_HEADER)}"


def site_page() -> str:
    """Return `site-yaml.md`."""
    rows = list(_site_rows(SiteConfig, ""))
    return f"{_SITE}\n{table(rows, *_HEADER)}"


def _study_rows(settings: Any, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    kinds = {entry.name: entry for entry in entries(type(settings))}
    for item in fields(settings):
        path, value = f"{prefix}{item.name}", getattr(settings, item.name)
        says = meaning(path).replace("\n", " ")
        if is_dataclass(value):
            yield f"`{path}`", "section", "", says
            yield from _study_rows(value, f"{path}.")
        else:
            yield f"`{path}`", kinds[item.name].kind, kinds[item.name].default, says


_SECTIONS = {"release": ReleasePolicy, "privacy": Privacy, "audit": AuditLimit}


def _site_rows(kind: type[Any], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for entry in entries(kind):
        path = f"{prefix}{entry.name}"
        section = _SECTIONS.get(entry.name)
        what = "section" if section else entry.kind
        yield f"`{path}`", what, entry.default, _sentence(entry.meaning)
        if section:
            yield from _site_rows(section, f"{path}.")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}." if text else ""
