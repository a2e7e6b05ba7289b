"""What may travel between the coordinator and a site: seven questions, their answers, a failure.

No field carries a patient, a slide, a patch, a feature, an attention map, an event time or a
path. Both sides build a message here and check it here when it arrives: unknown keys, other
types, values or sizes out of bounds are refused, and no tensor is allocated before its declared
size was checked. `pack` splits a message into one JSON text and flat float32 arrays, because
many small arrays cross Flower seven times slower than a few large ones; `unpack` is its inverse.
"""

from __future__ import annotations

import json
from dataclasses import field, fields
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints
from zipfile import ZipFile, ZipInfo

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cropkt.cancers import Cancer
from cropkt.config import MAX_WEIGHTS, StudyConfig
from cropkt.config import Arm as Arm
from cropkt.config import SiteName as SiteName
from cropkt.errors import MessageError
from cropkt.experts.card import MAX_CARD, hash_of
from cropkt.files import write_atomically

PROTOCOL: Literal[1] = 1
MAX_TEXT = 1 << 20  # characters of one message's JSON
MAX_ITEMS = 1 << 14  # numbers, texts and lists in it
_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

Weights = NDArray[np.float32]
TaskId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$")]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16,64}$")]
Package = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
Version = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.+_-]{1,64}$")]
Patients = Annotated[int, Field(ge=0, le=10_000_000)]
Seconds = Annotated[float, Field(ge=0, le=1e8)]
Amount = Annotated[float, Field(ge=0, le=1e15)]
Probability = Annotated[float, Field(ge=0, le=1)]
Change = Annotated[float, Field(ge=-1, le=1)]  # of a C-index
Folds = Annotated[int, Field(ge=0, le=10)]
Code = Literal[
    "data",  # a file or a cohort of the site is not what it must be
    "no_cohort",  # the site serves no patients of this cancer
    "not_estimable",  # its patients cannot determine what was asked
    "training_failed",  # training diverged, ran out of memory, or its process died
    "refused",  # an expert that was sent is not to be trusted, or not for this study
    "bad_message",  # the request is not in the contract: another version
    "internal",  # a fault: report it with its reference
    "budget",  # what is left of the cohort's privacy budget does not allow it
    "policy",  # the site's rules let nothing like this leave
    "suppressed",  # too few patients or events stand behind it
    "awaiting_approval",  # somebody at the site has to approve it first
    "refused_release",  # somebody at the site said no
    "audit",  # membership is told too well from the expert, or that could not be measured
    "not_held",  # no answer to this task waits for approval: ask in full
]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Message:
    """What every message says of itself: its task, which the answer repeats."""

    kind: ClassVar[str] = ""
    task: TaskId
    protocol: Literal[1] = PROTOCOL


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Score:
    """A C-index with its standard error; None where it is not estimable."""

    c_index: Probability | None = None
    se: Annotated[float, Field(ge=0, le=10)] | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SourceScore(Score):
    """One expert of another cancer on a site's patients, beside untrained experts."""

    lead: Change | None = None  # over the mean of untrained experts on the same patients
    lead_se: Probability | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Difference:
    """One arm's C-index less another's, on the same patients."""

    value: Change
    se: Probability
    low: Change
    high: Change


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Cost:
    """What one arm cost a site."""

    seconds: Seconds
    megabytes: Amount | None = None  # peak memory of the process above what it held before
    gflop: Amount = 0.0
    received: Amount = 0.0  # megabytes of weights that the site needs for it
    sent: Amount = 0.0  # megabytes of weights that leave the site for it


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ArmScore(Score):
    """One arm on one site, out of fold."""

    low: Probability | None = None  # 95 % bootstrap over patients
    high: Probability | None = None
    pairs: Patients = 0  # comparable pairs within folds, in units of 10
    fold_mean: Probability | None = None
    pooled: Probability | None = None  # over all pairs, across folds too
    gain: Change | None = None  # over local
    gain_se: Probability | None = None
    gain_low: Change | None = None
    gain_high: Change | None = None
    against: dict[Arm, Difference] = field(default_factory=dict)  # over controls
    c_ipcw: Probability | None = None
    brier: Probability | None = None
    auc: tuple[Probability | None, ...] = ()  # after 1, 3 and 5 years
    d_calibration: Probability | None = None  # p value
    log_rank: Probability | None = None  # p value of the halves at high and at low risk
    cost: Cost | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Voice:
    """One expert's part in a site's guarded answer."""

    weight: Probability  # mean over folds
    weight_sd: Probability
    cost: Change | None = None  # C-index that the answer loses without it
    silent: Folds = 0  # folds that found it to say the same of everybody
    contrary: Folds = 0  # folds that found it wrong


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Verdict:
    """What the guard decided for a site."""

    share: Probability  # of other cancers in the answer, mean over folds
    candidates: dict[Literal["equal", "vote", "stack", "measured"], Folds]
    gain: Change  # in C-index, which the decision expects


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Shots:
    """Out-of-fold C-index of arms with few training patients, one value a draw."""

    patients: Annotated[int, Field(ge=1, le=10_000_000)] | None  # None: all
    arms: dict[Arm, tuple[Probability, ...]]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CohortCount:
    """How many patients of one cancer a site holds."""

    cancer: Cancer
    patients: Patients | None  # rounded; None: fewer than the site tells of. So everywhere.
    events: Patients | None
    dim: Annotated[int, Field(ge=1, le=16_384)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Fewest:
    """The smallest set of patients that one model or score of an answer rests on.

    The site's gate judges by it and takes it out: it does not leave.
    """

    patients: Patients
    events: Patients


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DescribeRequest(Message):
    """Who are you, and what do you hold?"""

    kind: ClassVar[str] = "query.describe"
    study: StudyConfig


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DescribeReply(Message):
    """Counts and versions."""

    kind: ClassVar[str] = "query.describe"
    site: SiteName
    cohorts: tuple[CohortCount, ...]
    versions: dict[Package, Version] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Signed:
    """The card of an expert (`cropkt.experts.card`) and the signature over it."""

    card: Annotated[str, StringConstraints(max_length=MAX_CARD)]  # canonical JSON
    signature: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]  # Ed25519

    @property
    def hash(self) -> str:
        """By which the expert is known."""
        return hash_of(self.card.encode())


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ExpertRequest(Message):
    """Train your experts for one cancer, from M0 or from the last round's average."""

    kind: ClassVar[str] = "train.expert"
    study: StudyConfig
    cancer: Cancer
    round: Annotated[int, Field(ge=0, le=99)] = 0
    shared: bool = False  # other sites hold this cancer: answer with the fold models too
    weights: Weights | None = None  # (F, parameters); None: M0 of the study's seed
    signed: Signed | None = None  # the average's, where there is one


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ExpertReply(Message):
    """The site's expert and how well it does out of fold."""

    kind: ClassVar[str] = "train.expert"
    cancer: Cancer
    patients: Patients | None
    events: Patients | None
    weights: Weights  # (1, parameters), or (F, parameters) where the cancer is shared
    score: Score
    seconds: Seconds
    fewest: Fewest | None = None
    signed: Signed | None = None  # by the site; without, the coordinator takes no expert


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TransferRequest(Message):
    """Score these experts of other cancers on your patients."""

    kind: ClassVar[str] = "evaluate.transfer"
    study: StudyConfig
    cancer: Cancer
    sources: tuple[Cancer, ...]
    weights: Weights  # (sources, parameters)
    signed: tuple[Signed, ...] = ()  # one a source


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TransferReply(Message):
    """Each expert on all patients, and on the training patients of each fold."""

    kind: ClassVar[str] = "evaluate.transfer"
    cancer: Cancer
    patients: Patients | None = None
    events: Patients | None = None
    scores: tuple[SourceScore, ...]  # one a source
    training_scores: tuple[tuple[Score, ...], ...]  # folds x sources
    seconds: Seconds
    fewest: Fewest | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RouterRequest(Message):
    """Train your router over these experts."""

    kind: ClassVar[str] = "train.router"
    study: StudyConfig
    cancer: Cancer
    round: Annotated[int, Field(ge=0, le=99)] = 0
    shared: bool = False
    sources: tuple[Cancer, ...]
    weights: Weights  # (sources, parameters) of the experts
    signed: tuple[Signed, ...] = ()  # one a source
    own: Weights | None = None  # (F, parameters): this cancer's averaged experts, where shared
    own_signed: Signed | None = None  # that average's
    routers: Weights | None = None  # (1 + folds, parameters): last round's average


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RouterReply(Message):
    """The site's routers, where other sites average them with theirs; they stay there otherwise."""

    kind: ClassVar[str] = "train.router"
    cancer: Cancer
    patients: Patients | None = None
    events: Patients | None
    weights: Weights | None  # (1 + folds, parameters) where the cancer is shared; None: stays there
    seconds: Seconds
    fewest: Fewest | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class FedAvgRequest(Message):
    """Train the model of all cancers on from the last round's average, or from M0."""

    kind: ClassVar[str] = "train.fedavg"
    study: StudyConfig
    cancer: Cancer
    round: Annotated[int, Field(ge=0, le=99)] = 0
    weights: Weights | None = None  # (1 + folds, parameters)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class FedAvgReply(Message):
    """The model of all cancers after this site's patients, and without each of its folds."""

    kind: ClassVar[str] = "train.fedavg"
    cancer: Cancer
    patients: Patients | None
    events: Patients | None
    weights: Weights  # (1 + folds, parameters)
    seconds: Seconds
    fewest: Fewest | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ReleaseRequest(Message):
    """Evaluate the final models and decide."""

    kind: ClassVar[str] = "evaluate.release"
    study: StudyConfig
    cancer: Cancer
    routers: Weights | None = None  # (1 + folds, parameters): the average, where shared
    everyone: Weights | None = None  # (1 + folds, parameters) of the model of all cancers


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ReleaseReply(Message):
    """Every arm out of fold, who was heard, and what the site will use."""

    kind: ClassVar[str] = "evaluate.release"
    cancer: Cancer
    patients: Patients | None
    events: Patients | None
    arms: dict[Arm, ArmScore]
    routing: dict[Cancer, Probability]  # mean weight of each expert; the own cancer is "self"
    zero_shot_choice: dict[Literal["vote"] | Cancer, Folds]
    verdict: Verdict | None = None
    voices: dict[Cancer, Voice] = field(default_factory=dict)  # the own cancer is "self"
    few_shot: tuple[Shots, ...] = ()
    reason: Annotated[str, StringConstraints(pattern=r"^[a-z0-9 ,.]{0,120}$")] = ""
    seconds: Seconds


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class HeldRequest(Message):
    """Has your answer to this task been approved? Answered like the task itself."""

    kind: ClassVar[str] = "query.held"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Failure(Message):
    """The site could not do the task. A code, never a text made from data."""

    kind: ClassVar[str] = "failure"
    code: Code
    site: SiteName | None = None  # as it calls itself; a deployed coordinator knows better
    reference: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{0,16}$")] = ""  # in its log


REQUESTS: tuple[type[Message], ...] = (
    DescribeRequest,
    ExpertRequest,
    TransferRequest,
    RouterRequest,
    FedAvgRequest,
    ReleaseRequest,
    HeldRequest,
)
REPLIES: tuple[type[Message], ...] = (
    DescribeReply,
    ExpertReply,
    TransferReply,
    RouterReply,
    FedAvgReply,
    ReleaseReply,
    Failure,
)
_CLASSES = {kind.__name__: kind for kind in REQUESTS + REPLIES}
_NAMES = {kind: frozenset(item.name for item in fields(kind)) for kind in REQUESTS + REPLIES}
_ARRAYS = {
    kind: frozenset(
        n for n, hint in get_type_hints(kind).items() if hint in (Weights, Weights | None)
    )
    for kind in REQUESTS + REPLIES
}
_ADAPTERS: dict[str, TypeAdapter[Any]] = {}


def pack(message: Message) -> tuple[str, dict[str, Weights]]:
    """Return the message as JSON text and its arrays, each flat float32."""
    arrays = {
        item.name: value
        for item in fields(message)
        if isinstance(value := getattr(message, item.name), np.ndarray)
    }
    values = _adapter(type(message)).dump_python(message, exclude=set(arrays))
    values = {name: value for name, value in values.items() if not isinstance(value, np.ndarray)}
    text = json.dumps(
        {
            "message": type(message).__name__,
            "values": values,
            "shapes": {name: array.shape for name, array in arrays.items()},
        },
        sort_keys=True,
        separators=(",", ":"),
        allow_nan=False,
    )
    return text, {
        name: np.ascontiguousarray(array, dtype=np.float32).reshape(-1)
        for name, array in arrays.items()
    }


def unpack(
    text: str, arrays: dict[str, Weights], *, expected: tuple[type[Message], ...]
) -> Message:
    """Return the message that `pack` made, checked.

    Args:
        text: the JSON text.
        arrays: the flat arrays by field name.
        expected: the classes that may arrive here.

    Raises:
        MessageError: anything is not as the contract says; the text never repeats a value.
    """
    if len(text) > MAX_TEXT:
        raise MessageError("message", f"its text has {len(text)} characters, at most {MAX_TEXT}")
    if text.count(",") + text.count("[") + text.count("{") > MAX_ITEMS:
        raise MessageError("message", f"it holds more than {MAX_ITEMS} items")
    try:
        name, values, shapes = _parts(text)
        kind = _CLASSES[name]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise MessageError("message", "not a cropkt message") from None
    if kind not in expected:
        raise MessageError("message", f"{kind.__name__} is not expected here")
    if set(shapes) != set(arrays) or set(shapes) & set(values) or set(shapes) - _ARRAYS[kind]:
        raise MessageError(kind.__name__, "its arrays are not those it declares")
    if sum(array.size for array in arrays.values()) > MAX_WEIGHTS:
        raise MessageError(kind.__name__, f"its arrays hold more than {MAX_WEIGHTS} values")
    shaped = {
        field_name: _shaped(array, shapes[field_name], f"{kind.__name__}.{field_name}")
        for field_name, array in arrays.items()
    }
    try:
        message = _adapter(kind).validate_python(values | shaped)
    except ValidationError as error:
        where = next(iter(error.errors()[0]["loc"]), None)
        # A key that the class does not know is the sender's text, and is not repeated.
        which = f"field {where} is not as agreed" if where in _NAMES[kind] else "an unknown field"
        raise MessageError(kind.__name__, which) from None
    kept = _adapter(kind).dump_python(message, mode="json", exclude=set(shaped))
    for field_name, value in values.items():
        if not _same(value, kept[field_name]):  # pydantic reads "3" and 3.0 as 3
            raise MessageError(kind.__name__, f"field {field_name} is not as agreed")
    return message  # type: ignore[no-any-return]


def save(message: Message, path: Path) -> None:
    """Write a message as one file that is whole, or not there."""
    text, arrays = pack(message)
    contents: dict[str, Any] = {"text": np.array(text), **arrays}
    write_atomically(path, lambda file: np.savez(file, **contents))


def load(path: Path, *, expected: tuple[type[Message], ...]) -> Message:
    """Return the message in a file that `save` wrote.

    Raises:
        MessageError: the file holds anything else.
        FileNotFoundError: there is none.
    """
    try:
        with ZipFile(path) as stored:
            members = stored.infolist()
            if sum(member.file_size for member in members) > path.stat().st_size:
                raise ValueError("compressed, or one member inside another")
            arrays = {m.filename.removesuffix(".npy"): _array(stored, m) for m in members}
        text = str(arrays.pop("text"))
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever zip, npy or Unicode makes of a damaged file
        raise MessageError(path, f"holds no message ({type(error).__name__})") from None
    return unpack(text, arrays, expected=expected)


def _array(stored: ZipFile, member: ZipInfo) -> NDArray[Any]:
    """Return the array in a member of an .npz file, which is not larger than the member."""
    with stored.open(member) as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if len(shape) > 1 or prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise ValueError("not of its declared size")
        return np.frombuffer(file.read(), dtype).reshape(shape)


def _parts(text: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return class, values and shapes of a message's text.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: it is no such text.
    """
    whole = json.loads(text, object_pairs_hook=_once)
    values, shapes = whole["values"], whole["shapes"]
    if len(whole) != 3 or not isinstance(values, dict) or not isinstance(shapes, dict):
        raise ValueError(text)
    return whole["message"], values, shapes


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a mapping, in which no key comes twice."""
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError(pairs)
    return mapping


def _same(sent: Any, kept: Any) -> bool:
    """Return whether a value was kept as it was sent, but for what a sender may leave out."""
    if isinstance(sent, dict):
        return all(key in kept and _same(value, kept[key]) for key, value in sent.items())
    if isinstance(sent, list):
        return all(_same(one, two) for one, two in zip(sent, kept, strict=True))
    alike = type(sent) is type(kept) or (type(sent), type(kept)) == (int, float)
    return alike and bool(sent == kept)


def _shaped(array: Weights, shape: Any, where: str) -> Weights:
    """Return a flat array in its declared shape, finite and within bounds."""
    good = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)
    if not good or min(shape) < 1 or prod(shape) > MAX_WEIGHTS:
        raise MessageError(where, "declares a shape out of bounds")
    if array.dtype != np.float32 or array.shape != (prod(shape),):
        raise MessageError(where, "has another size or type than it declares")
    if not np.isfinite(array).all():
        raise MessageError(where, "holds values that are not finite")
    return array.reshape(shape)


def _adapter(kind: type[Message]) -> TypeAdapter[Any]:
    if kind.__name__ not in _ADAPTERS:
        _ADAPTERS[kind.__name__] = TypeAdapter(kind)
    return _ADAPTERS[kind.__name__]
