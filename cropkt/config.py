"""What a study agrees on: shapes, training, routing. Checked once, where it enters.

Two presets are whole studies: `published` follows arXiv 2508.13482 to the letter, `default` has
cropkt's repairs. Every difference is a named option here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cropkt.errors import ConfigError

MAX_WEIGHTS = 1 << 29  # float32 values of one message's arrays, or of one site's models: 2 GiB
_STRICT = ConfigDict(extra="forbid")
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Endpoint = Literal["OS", "DSS", "PFI", "DFI"]
Loss = Literal["log_space", "clamped"]
SiteName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Encoder = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9][A-Za-z0-9._+-]{0,63})?$")]
Purpose = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
Arm = Literal[
    "local",
    "finetune",
    "zero_shot",
    "vote",
    "roupkt",
    "roupkt+",
    "merge",
    "stack",
    "fedavg",
    "fedavg_tuned",
    "auto",
    "random_init",
    "permuted",
    "mean_pool",
    "self_only",
]
Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ExpertShape:
    """Widths of an expert."""

    dim: Annotated[int, Field(ge=1, le=16_384)] = 1536  # features a patch
    embed: Annotated[int, Field(ge=1, le=4_096)] = 512  # slide feature
    attention: Annotated[int, Field(ge=1, le=4_096)] = 384
    bins: Annotated[int, Field(ge=1, le=256)] = 32  # of 365 days, the last one open

    @property
    def parameters(self) -> int:
        """How many weights one expert has."""
        return self._pooling + self.bins * (self.embed + 1)

    def router_parameters(self, *, experts: int, own_heads: bool) -> int:
        """Return how many weights a router over so many experts has, its own one among them.

        Args:
            experts: how many.
            own_heads: each has a head of its own.
        """
        heads = experts if own_heads else 1
        adapters = experts * self.embed * (self.embed + 2)  # a gate, a matrix and a bias each
        return self._pooling + adapters + heads * self.bins * (self.embed + 1)

    @property
    def _pooling(self) -> int:
        gates = 2 * self.attention * (self.embed + 1)
        return self.embed * (self.dim + 1) + gates + self.attention + 1


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OptimiserConfig:
    """AdamW with a linear warm-up and a cosine schedule."""

    epochs: Annotated[int, Field(ge=1, le=1000)] = 20
    minimum_updates: Annotated[int, Field(ge=0, le=100_000)] = (
        0  # a small cohort trains more epochs
    )
    learning_rate: Positive = 1e-4
    weight_decay: NotNegative = 1e-5
    warmup_epochs: Annotated[int, Field(ge=0)] = 1
    batch: Annotated[int, Field(ge=1, le=4096)] = 16  # patients an update
    drop_last: bool = False  # True as published: an epoch's incomplete last update is left out


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainingConfig(OptimiserConfig):
    """How one site trains one expert."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.25  # on the attention gates
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.5  # down-weights censored patients
    loss: Loss = "log_space"  # `clamped` as published
    standardise: Literal["none", "site"] = "none"  # `site`: by moments of the training folds


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RouterConfig(OptimiserConfig):
    """How a target trains its router (ROUPKT)."""

    top_k: Count = 5
    keep_own: bool = True  # the target's own expert is always heard; False as published
    renormalise: bool = True  # gates of the chosen experts sum to 1; False as published
    balance: Literal["batch", "patient"] = "batch"  # `patient` as published
    balance_weight: NotNegative = 0.01
    z_weight: NotNegative = 0.01
    self_features: Literal["out_of_fold", "in_sample"] = "out_of_fold"  # `in_sample` as published
    prior: Literal["transfer", "none"] = "transfer"  # gates start at the measured transfer
    prior_strength: Annotated[float, Field(ge=0, le=1000)] = 30.0  # logits a unit of C-index
    warm_start: bool = True  # adapters start as the identity, the head as the site's own


EVALUATED: tuple[Arm, ...] = tuple(a for a in get_args(Arm) if not a.startswith("fedavg"))


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class StudyConfig:
    """Everything that decides a study's numbers."""

    purpose: Purpose = "research"  # a site whose policy does not name it answers nothing
    encoder: Encoder = ""  # that made the features of all sites; a deployed study has to name it
    endpoint: Endpoint = "DSS"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    folds: Annotated[int, Field(ge=3, le=10)] = 5  # below 3 nothing is left to choose by
    split: Literal["stratified", "hospital"] = "stratified"
    rounds: Annotated[int, Field(ge=1, le=100)] = 2  # of averaging, where sites share a cancer
    initial_hazard: Annotated[float, Field(gt=0, lt=1)] | None = 0.06  # M0's; None as published
    source: Literal["all_patients", "fold_0"] = "all_patients"  # which expert a site shares
    max_sources: Count = 25  # experts of other cancers that a router may use
    # What is compared at each target; `local` and the study's router always are.
    arms: tuple[Arm, ...] = EVALUATED
    fedavg_rounds: Annotated[int, Field(ge=0, le=100)] = 0  # of one model for all cancers; 0: none
    shots: tuple[Annotated[int, Field(ge=4, le=100_000)], ...] = ()  # also with so few patients
    draws: Annotated[int, Field(ge=1, le=20)] = 5  # of patients for each of `shots`
    shape: ExpertShape = field(default_factory=ExpertShape)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    router: RouterConfig = field(default_factory=RouterConfig)

    def __post_init__(self) -> None:
        """Refuse widths whose models no message could carry: nothing is allocated for them."""
        if self.models * self.shape.parameters > MAX_WEIGHTS:
            text = f"{self.models} models of {self.shape.parameters} weights are more than"
            raise ValueError(f"{text} {MAX_WEIGHTS}; choose smaller widths or fewer folds")

    @property
    def models(self) -> int:
        """How many models a nested cross-fitting has: all folds, without one, without two."""
        return 1 + self.folds + self.folds * (self.folds - 1) // 2

    def hash(self) -> str:
        """Return a short SHA-256 of every value: the same hash, the same study."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def published_router(config: RouterConfig) -> RouterConfig:
    """Return a router as published, with the optimiser of `config`."""
    return replace(
        config,
        keep_own=False,
        renormalise=False,
        balance="patient",
        self_features="in_sample",
        prior="none",
        warm_start=False,
    )


PUBLISHED = StudyConfig(
    initial_hazard=None,
    source="fold_0",
    arms=("local", "zero_shot", "roupkt"),
    training=TrainingConfig(drop_last=True, loss="clamped"),
    router=published_router(RouterConfig(drop_last=True)),
)
"""Arm for arm what arXiv 2508.13482 describes."""


def parse_study(values: dict[str, Any], where: str) -> StudyConfig:
    """Return the checked study of a parsed YAML or JSON mapping.

    Raises:
        ConfigError: an unknown key or a value out of range; names the key and the file `where`.
    """
    return checked(StudyConfig, values, where)


def read_yaml(path: Path, kind: type[Settings], *, missing: str) -> Settings:
    """Return the checked settings in a YAML file.

    Args:
        path: the file.
        kind: the pydantic dataclass that it holds.
        missing: what to do if there is no such file.

    Raises:
        ConfigError: no such file, no YAML, or a key or value that does not belong; named.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(path, "no such file", missing) from None
    except yaml.YAMLError as error:
        raise ConfigError(path, f"not YAML ({type(error).__name__})", "Correct it") from None
    return checked(kind, values, path)


def checked(kind: type[Settings], values: object, where: str | Path) -> Settings:
    """Return `values` as settings of a kind.

    Raises:
        ConfigError: a key or value that does not belong; named with the file `where`.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(where, f"{key}: {first['msg']}", f"Correct {key}") from None


def with_shape(study: StudyConfig, **widths: int) -> StudyConfig:
    """Return `study` with other expert widths."""
    return replace(study, shape=replace(study.shape, **widths))
