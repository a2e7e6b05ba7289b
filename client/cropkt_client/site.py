"""A hospital's own data and state: what lies where on this side of the gate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from cropkt.cancers import Cancer
from cropkt.cohort.bags import Cohort, load_cohort
from cropkt.cohort.facts import SlideFacts, common, facts_of
from cropkt.cohort.features import SlideFolders
from cropkt.cohort.outcomes import read_outcomes
from cropkt.cohort.pack import Pack
from cropkt.cohort.source import SlideSource
from cropkt.cohort.splits import hospital_folds, stratified_folds
from cropkt.config import StudyConfig
from cropkt.errors import CohortError, ConfigError
from cropkt.experts.checkpoint import Checkpoint
from cropkt.experts.training import Epoch
from cropkt.files import write_atomically
from cropkt.messages import (
    DescribeRequest,
    ExpertRequest,
    FedAvgRequest,
    Message,
    RouterRequest,
    load,
    pack,
    save,
)
from cropkt_client.features import SlideFeatures
from cropkt_client.settings import SiteConfig, read_settings

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, config=ConfigDict(arbitrary_types_allowed=True))
class Site:
    """One hospital at work: reads its cohorts, keeps its models and its answers."""

    config: SiteConfig
    folder: Path = field(default_factory=Path)
    device: torch.device = _CPU  # where its models are trained and consulted

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        cancers: Collection[str] = (),
        device: torch.device = _CPU,
    ) -> Site:
        """Return the site of a `site.yaml`.

        Args:
            path: of the file.
            cancers: those of its cancers that are served now; all, if none is named.
            device: where its models are trained and consulted.

        Raises:
            ConfigError: no such file, no YAML, or a key that does not belong.
        """
        config = read_settings(path)
        if cancers:
            served = tuple(cancer for cancer in config.cancers if cancer in cancers)
            config = replace(config, cancers=served)
        return cls(config=config, folder=path.parent, device=device)

    @property
    def state(self) -> Path:
        """Folder of all that this site remembers."""
        return self.folder / self.config.state

    @property
    def features(self) -> SlideFeatures:
        """What frozen experts made of its patients; stays here."""
        return SlideFeatures(self.state / "features")

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
            DataError: the table or a slide is not usable, or the cancer is not served.
            ConfigError: the study reads another encoder's features.
        """
        self.check_encoder(study)
        if cancer not in self.config.cancers:
            served = ", ".join(self.config.cancers)
            raise CohortError(self.config.site, f"it serves {served}, not {cancer}")
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

    def check_encoder(self, study: StudyConfig) -> None:
        """Check that this site's features are of the encoder that a study agreed on.

        Raises:
            ConfigError: `site.yaml` names another.
        """
        if self.config.encoder != study.encoder:
            mine, theirs = (name or "none" for name in (self.config.encoder, study.encoder))
            fix = "Extract the slides with the study's encoder, and name it in site.yaml"
            raise ConfigError(
                "site.yaml: encoder", f"{mine} is named, the study's is {theirs}", fix
            )

    def released(self, cancer: Cancer) -> Path:
        """Return where the released model of a cancer lies, once there is one."""
        return self.state / cancer / "released.safetensors"

    def facts(self, cohort: Cohort) -> SlideFacts:
        """Return how slides are made here, as their files agree.

        The encoder's name in `site.yaml` is the study's label, which no file has to bear.
        """
        source = self.source()  # the cohort's own may hold patches in memory, and no files
        return common(facts_of(source, slide) for patient in cohort.slides for slide in patient)

    def answered(self, request: Message, replies: tuple[type[Message], ...]) -> Message | None:
        """Return the answer this site gave to exactly this request, if it did."""
        path = self._answer(request)
        return load(path, expected=replies) if path.exists() else None

    def keep_answer(self, request: Message, reply: Message) -> None:
        """Remember an answer before it is sent, so that the task never runs twice."""
        save(reply, self._answer(request))
        if isinstance(request, ExpertRequest | RouterRequest | FedAvgRequest):
            for name in ("training", "private"):
                self._checkpoint(request.cancer, name).unlink(missing_ok=True)

    def checkpoint(
        self,
        request: ExpertRequest | RouterRequest | FedAvgRequest,
        cohort: Cohort,
        *,
        private: str = "",
    ) -> Checkpoint:
        """Return where the training of this request from these patients is kept.

        Args:
            request: that asks for it.
            cohort: the patients.
            private: what else decides the training, where it is the private one.
        """
        digest = self._digest(request)
        digest.update(private.encode())
        for column in (cohort.days, cohort.event):
            digest.update(column.tobytes())
        digest.update(repr((cohort.patient_ids, cohort.slides)).encode())
        path = self._checkpoint(request.cancer, "private" if private else "training")
        return Checkpoint(path, key=digest.hexdigest())

    def on_epoch(
        self, request: ExpertRequest | RouterRequest | FedAvgRequest
    ) -> Callable[[Epoch], None] | None:
        """Return what writes the losses of this request's training for TensorBoard, if asked for.

        Raises:
            ConfigError: TensorBoard is not installed.
        """
        if self.config.tensorboard is None:
            return None
        from cropkt_client.curves import writing  # loads TensorBoard

        name = request.task.replace("/", "-")  # one folder, wherever the task's name would lead
        return writing(self.folder / self.config.tensorboard / name)

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

    def digest(self, request: Message) -> str:
        """Return a SHA-256 of all that a request asks."""
        return self._digest(request).hexdigest()

    def _checkpoint(self, cancer: Cancer, name: str) -> Path:
        return self.state / cancer / f"{name}.npz"

    def _answer(self, request: Message) -> Path:
        return self.state / "answers" / f"{self.digest(request)}.npz"

    def _digest(self, request: Message) -> hashlib._Hash:
        """Return a SHA-256 of all that decides the answer, except the patients."""
        text, arrays = pack(request)
        digest = hashlib.sha256(text.encode())
        for name in sorted(arrays):
            digest.update(arrays[name].tobytes())
        if isinstance(request, DescribeRequest):  # the question is the same for any cancers
            digest.update(" ".join(self.config.cancers).encode())
        return digest


def folds_of(cohort: Cohort, study: StudyConfig) -> NDArray[np.int64]:
    """Return the fold of each patient, the same at every call.

    Raises:
        CohortError: too few patients or hospitals for the study's folds.
    """
    when, folds, seed = cohort.time_bins, study.folds, study.seed
    if study.split == "hospital":
        return hospital_folds(cohort.hospital, cohort.event, when, folds=folds, seed=seed)
    return stratified_folds(cohort.event, when, folds=folds, seed=seed)
