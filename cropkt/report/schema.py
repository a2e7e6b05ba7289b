"""The results dictionary of a study: what `results.json` holds.

`Results` is the whole; a key marked `NotRequired` may be absent. A C-index of None means that
these patients could not determine it. Readers go through `values`, which knows about both.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict


class ArmResult(TypedDict):
    """C-index of one way to predict (an arm) on the patients of one target."""

    c_index: float | None  # None: not estimable, and `reason` says why
    reason: NotRequired[str]
    low: NotRequired[float | None]  # 95 % bootstrap over patients
    high: NotRequired[float | None]
    se: NotRequired[float | None]
    pairs: NotRequired[int | None]  # comparable pairs behind the C-index
    fold_mean: NotRequired[float | None]
    pooled: NotRequired[float | None]
    # 95 % interval of this arm's C-index minus the local one, from the same resampled patients.
    gain_low: NotRequired[float | None]
    gain_high: NotRequired[float | None]


class TransferScore(TypedDict):
    """C-index of one source's expert on one target, and its standard error."""

    c_index: float | None
    se: NotRequired[float | None]


class TargetResult(TypedDict):
    """Everything a study found out about one target cancer."""

    patients: NotRequired[int | None]  # None: suppressed by the site
    events: NotRequired[int | None]
    sites: NotRequired[int | None]
    arms: NotRequired[dict[str, ArmResult]]  # "local", "zero_shot", "roupkt" and further ones
    routing: NotRequired[dict[str, float] | None]  # source or "self" -> mean weight
    zero_shot_choice: NotRequired[dict[str, int] | None]  # source or "vote" -> folds choosing it
    best_source: NotRequired[str | None]


class Planted(TypedDict, total=False):
    """What the simulator planted, and whether the study found it; synthetic data only."""

    targets_routed_to_relatives: int
    of: int
    relatives: dict[str, list[str]]  # target -> sources that share its risk factors
    best_c_index: dict[str, float]  # what the true risk would reach


class FailedRow(TypedDict):
    """A row of the study's table that ended in failure."""

    row: str
    cause: NotRequired[str]


class Results(TypedDict, total=False):
    """The dictionary written as `results.json`."""

    cropkt: str
    versions: dict[str, str]
    data: str
    preset: str
    seed: int
    folds: int
    endpoint: str
    config_hash: str
    seconds: dict[str, float]
    targets: dict[str, TargetResult]
    transfer: dict[str, dict[str, TransferScore]]  # target -> source
    planted: Planted | None
    failed: list[FailedRow]
