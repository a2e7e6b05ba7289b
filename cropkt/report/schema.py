"""The results dictionary of a study: what `results.json` holds.

`Results` is the whole; a key marked `NotRequired` may be absent. A C-index of None means that
these patients could not determine it. Readers go through `values`, which knows about both.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict


class DifferenceResult(TypedDict):
    """One arm's C-index minus another's, on the same patients."""

    value: float
    se: float
    low: float  # 95 %
    high: float


class CostResult(TypedDict, total=False):
    """What one arm cost one target; of several sites, the sum."""

    seconds: float
    megabytes: float | None  # peak memory of the process above what it held before
    gflop: float  # 1e9 floating-point operations, counted from the shapes
    received_megabytes: float  # weights that the site needs for it
    sent_megabytes: float  # weights that leave the site for it


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
    # This arm's C-index minus the local one, with its 95 % interval, from the same resampled
    # patients.
    gain: NotRequired[float | None]
    gain_se: NotRequired[float | None]
    gain_low: NotRequired[float | None]
    gain_high: NotRequired[float | None]
    against: NotRequired[dict[str, DifferenceResult]]  # a control -> lead over it
    c_ipcw: NotRequired[float | None]
    brier: NotRequired[float | None]  # integrated
    auc: NotRequired[list[float | None]]  # after 1, 3 and 5 years
    d_calibration: NotRequired[float | None]  # p value
    log_rank: NotRequired[float | None]  # p value, the half at high risk against the other
    cost: NotRequired[CostResult]


class TransferScore(TypedDict):
    """C-index of one source's expert on one target, and its standard error."""

    c_index: float | None
    se: NotRequired[float | None]
    lead: NotRequired[float | None]  # over the mean of untrained experts on the same patients
    lead_se: NotRequired[float | None]
    # p values over all ordered pairs that are estimable, against .5 and against untrained experts:
    # plain, and adjusted after Benjamini-Hochberg and Holm.
    p_half: NotRequired[float | None]
    p_half_bh: NotRequired[float | None]
    p_half_holm: NotRequired[float | None]
    p_random: NotRequired[float | None]
    p_random_bh: NotRequired[float | None]
    p_random_holm: NotRequired[float | None]


class VoiceResult(TypedDict):
    """One expert in a target's guarded answer."""

    weight: float  # mean over the folds; all sum to 1
    weight_sd: float  # over the folds
    cost: float | None  # C-index that the answer loses without it
    silent: int  # folds that found that it says the same of everybody
    contrary: int  # folds that found it significantly wrong


class AutoResult(TypedDict):
    """What the guard decided for one target."""

    share: float  # of other cancers in the answer, mean over the folds; 0 is local
    candidates: dict[str, int]  # equal, vote, stack -> folds that chose it
    gain: float  # expected gain in C-index that the decision rests on, mean over the folds


class ShotsResult(TypedDict):
    """Out-of-fold C-index with few training patients, one value a draw."""

    patients: int | None  # None: all
    arms: dict[str, list[float]]


class AcrossResult(TypedDict):
    """One arm against another over all targets with enough events."""

    targets: int
    mean: float  # random-effects mean of the differences
    low: float  # 95 %
    high: float
    between: float  # standard deviation of the true differences between targets
    wilcoxon: float | None  # p value of the signed-rank test
    detectable: float  # difference that this comparison finds with 80 % power at 5 %


class ExpertResult(TypedDict):
    """What one expert is worth to all targets that heard it."""

    targets: int
    c_index: float  # random-effects mean of its C-index on other cancers
    low: float
    high: float
    verdict: str  # "helps", "unclear", "no use", "contrary" or "silent"


class CurveResult(TypedDict):
    """Kaplan-Meier curve of one risk group."""

    patients: int
    days: list[float]  # steps, from 0
    survival: list[float]


class TargetResult(TypedDict):
    """Everything a study found out about one target cancer."""

    patients: NotRequired[int | None]  # None: suppressed by the site
    events: NotRequired[int | None]
    sites: NotRequired[int | None]
    arms: NotRequired[dict[str, ArmResult]]  # by `cropkt.messages.Arm`
    routing: NotRequired[dict[str, float] | None]  # source or "self" -> mean weight
    zero_shot_choice: NotRequired[dict[str, int] | None]  # source or "vote" -> folds choosing it
    best_source: NotRequired[str | None]
    auto: NotRequired[AutoResult]
    voices: NotRequired[dict[str, VoiceResult]]  # source or "self" -> its part in `auto`
    few_shot: NotRequired[list[ShotsResult]]
    # Arm -> curves of the halves at low and at high risk. Only a simulation can give them: it
    # reads its own sites' files; event times never leave a hospital.
    kaplan_meier: NotRequired[dict[str, dict[str, CurveResult]]]


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
    config: dict[str, object]  # every setting of the study
    seconds: dict[str, float]
    targets: dict[str, TargetResult]
    transfer: dict[str, dict[str, TransferScore]]  # target -> source
    across: dict[str, dict[str, AcrossResult]]  # arm -> "local", "self_only", "random_init"
    experts: dict[str, ExpertResult]
    planted: Planted | None
    failed: list[FailedRow]
