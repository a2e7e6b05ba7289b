"""`site.yaml`: what a hospital says of itself. Reading it loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from cropkt.cancers import Cancer
from cropkt.config import read_yaml
from cropkt.messages import SiteName


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SiteConfig:
    """`site.yaml`. Relative paths are meant from the folder of that file."""

    site: SiteName  # this hospital's name in the roster
    outcomes: Path  # table of times and events
    slides: tuple[Path, ...] = ()  # folders of slide feature files, searched through
    pack: Path | None = None  # or one packed folder
    cancers: tuple[Cancer, ...]
    state: Path = Path("state")  # models, answers and caches of this site
    encoder: str = ""  # name of the patch encoder, as agreed in the study
    on_bad: Literal["raise", "skip"] = "raise"


def read_settings(path: Path) -> SiteConfig:
    """Return what a `site.yaml` says.

    Raises:
        ConfigError: no such file, no YAML, or a key that does not belong.
    """
    return read_yaml(path, SiteConfig, missing="Write one with cropkt-client enrol")
