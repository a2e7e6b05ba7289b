"""`site.yaml`: what a hospital says of itself. Reading it loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints
from pydantic.dataclasses import dataclass

from cropkt.cancers import Cancer
from cropkt.config import Encoder, Positive, Purpose, read_yaml
from cropkt.messages import SiteName

Fingerprint = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{4}( [0-9a-f]{4}){7}$")]
Asked = Literal[
    "query.describe",
    "train.expert",
    "evaluate.transfer",
    "train.router",
    "train.fedavg",
    "evaluate.release",
]
ASKED: tuple[Asked, ...] = (
    "query.describe",
    "train.expert",
    "evaluate.transfer",
    "train.router",
    "evaluate.release",
)
"""By default. `train.fedavg` gives away more models than one, and has to be named."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class AuditLimit:
    """`site.yaml: release.audit`: how well membership may be told from an expert that leaves."""

    max_auroc_upper: Annotated[float, Field(ge=0.5, le=1)] = 0.7  # upper end of the 95 % interval


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ReleasePolicy:
    """`site.yaml: release`: what may leave this hospital. Left out, nothing does."""

    minimum_patients: Annotated[int, Field(ge=0)] = 20  # behind any model, score or count
    minimum_events: Annotated[int, Field(ge=0)] = 10
    round_counts_to: Annotated[int, Field(ge=1, le=1000)] = 5
    max_megabytes: Annotated[int, Field(ge=1, le=2048)] = 512  # of one answer
    messages: tuple[Asked, ...] = ASKED  # whose answers may leave
    cancers: tuple[Cancer, ...] | None = None  # None: all that the site serves
    purposes: tuple[Purpose, ...] = ("research",)  # of studies
    approval: Literal["auto", "human"] = "human"
    audit: AuditLimit | None = None  # None: the audit is on the card, and blocks nothing


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Privacy:
    """`site.yaml: privacy`: what all releases together may tell of one patient, for ever.

    It holds for each of the site's cohorts (cancers), over all studies of one table of outcomes.
    What was spent is kept beside that table; other numbers here later do not change it.
    """

    epsilon: Positive
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5  # below one over the number of patients
    clip: Positive = 0.3  # length to which a patient's gradient is clipped
    per_release: Positive | None = None  # epsilon that one expert may spend; a quarter of all

    @property
    def of_one(self) -> float:
        """Epsilon that one release may spend."""
        return min(self.per_release or self.epsilon / 4, self.epsilon)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SiteConfig:
    """`site.yaml`. Relative paths are meant from the folder of that file."""

    site: SiteName  # this hospital's name in the roster
    outcomes: Path  # table of times and events
    slides: tuple[Path, ...] = ()  # folders of slide feature files, searched through
    pack: Path | None = None  # or one packed folder
    cancers: tuple[Cancer, ...]
    state: Path = Path("state")  # models, answers and caches of this site
    encoder: Encoder = ""  # as agreed in the study
    magnification: Positive | None = None  # of the patches, such as 20; None: as their files say
    on_bad: Literal["raise", "skip"] = "raise"
    release: ReleasePolicy | None = None  # None: nothing leaves
    privacy: Privacy | None = None  # None: what leaves is not differentially private
    licence: Annotated[str, StringConstraints(pattern=r"^[ -~]{0,100}$")] = ""  # of its experts
    tensorboard: Path | None = None  # folder for losses of training; needs cropkt[tensorboard]
    signers: dict[SiteName, Fingerprint] | None = None  # None: a site's first key counts


def read_settings(path: Path) -> SiteConfig:
    """Return what a `site.yaml` says.

    Raises:
        ConfigError: no such file, no YAML, or a key that does not belong.
    """
    return read_yaml(path, SiteConfig, missing="Write one with cropkt-client enrol")


def state_folder(path: Path) -> Path:
    """Return the state folder of the site whose `site.yaml` lies at `path`.

    Raises:
        ConfigError: no such file, no YAML, or a key that does not belong.
    """
    path = path.resolve()
    return (path.parent / read_settings(path).state).resolve()
