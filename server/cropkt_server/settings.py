"""`study.yaml`: what a coordinator decides."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cropkt.config import StudyConfig
from cropkt.errors import ConfigError
from cropkt.files import write_atomically
from cropkt.messages import SiteName


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Settings:
    """The whole of `study.yaml`."""

    name: SiteName
    sites: tuple[SiteName, ...]  # the roster
    study: StudyConfig = field(default_factory=StudyConfig)


def load_settings(folder: Path) -> Settings:
    """Return the checked `study.yaml` of a study folder.

    Raises:
        ConfigError: no such file, no YAML, or a key or value that does not belong; named.
    """
    path = folder / "study.yaml"
    try:
        return TypeAdapter(Settings).validate_python(yaml.safe_load(path.read_text()))
    except FileNotFoundError:
        raise ConfigError(path, "no such file", "Make one with cropkt-server init") from None
    except yaml.YAMLError as error:
        raise ConfigError(path, f"not YAML ({type(error).__name__})", "Correct it") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(path, f"{key}: {first['msg']}", f"Correct {key}") from None


def save_settings(settings: Settings, folder: Path) -> None:
    """Write `study.yaml`."""
    text = yaml.safe_dump(TypeAdapter(Settings).dump_python(settings, mode="json"), sort_keys=False)
    write_atomically(folder / "study.yaml", lambda file: file.write(text.encode()))
