"""`study.yaml`: what a coordinator decides."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import field
from datetime import datetime
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
)
from pydantic.dataclasses import dataclass

from cropkt.config import StudyConfig, read_yaml
from cropkt.errors import UsageError
from cropkt.files import write_private
from cropkt.invite import Host
from cropkt.messages import SiteName

_SPAN = re.compile(r"([1-9][0-9]{0,4})([mhdw])")
_SECONDS = {"m": 60.0, "h": 3_600.0, "d": 86_400.0, "w": 604_800.0}


def _address(text: str) -> str:
    return str(ipaddress.ip_address(text))


Span = Annotated[str, StringConstraints(pattern=rf"^{_SPAN.pattern}$")]  # 90m, 12h, 7d, 2w
Address = Annotated[str, AfterValidator(_address)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Settings:
    """The whole of `study.yaml`."""

    name: SiteName
    host: Host | None = None  # "name:port", as the sites reach it; a simulation has none
    listen: Address = "0.0.0.0"  # of this machine
    port: Annotated[int, Field(ge=1, le=65_535)] | None = None  # of this machine; None: of `host`
    min_sites: Annotated[int, Field(ge=1)] = 1
    deadline: datetime | Span | None = None  # a span begins with the study
    sites: tuple[SiteName, ...] = ()  # of a simulation; a deployed study's are in its roster
    study: StudyConfig = field(default_factory=StudyConfig)

    def deadline_after(self, began: float) -> float | None:
        """Return when the deadline is, in seconds since 1970, of a study that `began` then."""
        if isinstance(self.deadline, datetime):
            return self.deadline.timestamp()  # without a zone it is this machine's time
        return None if self.deadline is None else began + seconds_in(self.deadline, "deadline")


def seconds_in(span: str, where: str) -> float:
    """Return the seconds in a span of time such as 90m, 12h, 7d or 2w.

    Raises:
        UsageError: it is no such span; names `where` it was given.
    """
    found = _SPAN.fullmatch(span)
    if found is None:
        raise UsageError(where, f"{span!r} is no span of time", "Write 90m, 12h, 7d or 2w")
    return int(found[1]) * _SECONDS[found[2]]


def load_settings(folder: Path) -> Settings:
    """Return the checked `study.yaml` of a study folder.

    Raises:
        ConfigError: no such file, no YAML, or a key or value that does not belong; named.
    """
    return read_yaml(folder / "study.yaml", Settings, missing="Make one with cropkt-server init")


def save_settings(settings: Settings, folder: Path) -> None:
    """Write `study.yaml`."""
    text = yaml.safe_dump(TypeAdapter(Settings).dump_python(settings, mode="json"), sort_keys=False)
    write_private(folder / "study.yaml", text.encode())
