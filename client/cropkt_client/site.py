"""A hospital's own configuration and state: what lies where on this side of the gate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cropkt.cancers import Cancer
from cropkt.cohort.bags import Cohort, load_cohort
from cropkt.cohort.features import SlideFolders
from cropkt.cohort.outcomes import read_outcomes
from cropkt.cohort.pack import Pack
from cropkt.cohort.source import SlideSource
from cropkt.config import StudyConfig
from cropkt.errors import ConfigError
from cropkt.files import write_atomically
from cropkt.messages import Message, SiteName, load, pack, save

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
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


@dataclass(frozen=True, kw_only=True, config=ConfigDict(arbitrary_types_allowed=True))
class Site:
    """One hospital at work: reads its cohorts, keeps its models and its answers."""

    config: SiteConfig
    folder: Path = field(default_factory=Path)

    @classmethod
    def load(cls, path: Path) -> Site:
        """Return the site of a `site.yaml`.

        Raises:
            ConfigError: no such file, no YAML, or a key that does not belong.
        """
        try:
            values = yaml.safe_load(path.read_text())
            config = TypeAdapter(SiteConfig).validate_python(values)
        except FileNotFoundError:
            raise ConfigError(path, "no such file", "Write one with cropkt-client enrol") from None
        except yaml.YAMLError as error:
            raise ConfigError(path, f"not YAML ({type(error).__name__})", "Correct it") from None
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "the file"
            raise ConfigError(path, f"{key}: {first['msg']}", f"Correct {key}") from None
        return cls(config=config, folder=path.parent)

    @property
    def state(self) -> Path:
        """Folder of all that this site remembers."""
        return self.folder / self.config.state

    def source(self) -> SlideSource:
        """Return where the slides lie."""
        if self.config.pack is not None:
            return Pack(self.folder / self.config.pack)
        if not self.config.slides:
            raise ConfigError("site.yaml", "neither slides nor pack is given", "Give slides: [...]")
        return SlideFolders([self.folder / folder for folder in self.config.slides])

    def cohort(
        self, cancer: Cancer, study: StudyConfig, *, check_values: bool = False
    ) -> tuple[Cohort, tuple[str, ...]]:
        """Return the patients of one cancer, and what was left out.

        Raises:
            DataError: the table or a slide is not usable.
        """
        table = read_outcomes(
            self.folder / self.config.outcomes, endpoint=study.endpoint, on_bad=self.config.on_bad
        )
        return load_cohort(
            table,
            self.source(),
            cancer=cancer,
            dim=study.shape.dim,
            on_bad=self.config.on_bad,
            check_values=check_values,
        )

    def answered(self, request: Message, replies: tuple[type[Message], ...]) -> Message | None:
        """Return the answer this site gave to exactly this request, if it did."""
        path = self._answer(request)
        return load(path, expected=replies) if path.exists() else None

    def keep_answer(self, request: Message, reply: Message) -> None:
        """Remember an answer before it is sent, so that the task never runs twice."""
        save(reply, self._answer(request))

    def keep(self, name: str, arrays: dict[str, NDArray[Any]]) -> None:
        """Keep named arrays of this site, such as the weights of its models."""
        contents: dict[str, Any] = dict(arrays)
        write_atomically(self.state / f"{name}.npz", lambda file: np.savez(file, **contents))

    def kept(self, name: str) -> dict[str, NDArray[Any]] | None:
        """Return the arrays kept under `name`, or None."""
        path = self.state / f"{name}.npz"
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}

    def remembered(
        self, name: str, make: Callable[[], dict[str, NDArray[Any]]]
    ) -> dict[str, NDArray[Any]]:
        """Return the arrays kept under `name`, making and keeping them the first time."""
        found = self.kept(name)
        if found is None:
            found = make()
            self.keep(name, found)
        return found

    def _answer(self, request: Message) -> Path:
        text, arrays = pack(request)
        digest = hashlib.sha256(text.encode())
        for name in sorted(arrays):
            digest.update(arrays[name].tobytes())
        return self.state / "answers" / f"{digest.hexdigest()}.npz"
