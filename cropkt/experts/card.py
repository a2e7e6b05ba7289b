"""The card of an expert: what it is, who made it, from what; and one signature over all of it.

The card holds the SHA-256 of every model's weights, so that the signature over the card is over
both, and any one of its models can be checked without the others. Its text is canonical JSON:
sorted keys, no spaces, ASCII; another form of the same values is refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Literal

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cropkt.cancers import Cancer
from cropkt.config import Encoder, Endpoint, ExpertShape, SiteName, StudyConfig
from cropkt.errors import (
    BinsMismatchError,
    CardChangedError,
    CardError,
    EncoderMismatchError,
    OtherExpertError,
    StartMismatchError,
    StudyMismatchError,
    TensorShapeError,
    WeightsChangedError,
)
from cropkt.survival.bins import BIN_DAYS

MAX_CARD = 1 << 14  # characters: room for the 56 models of 10 folds, and for 100 parents
DOMAIN = b"cropkt-expert-v1\0"  # what is signed for another purpose is no expert
_STRICT = ConfigDict(extra="forbid", strict=True)

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
PublicKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{43}=$")]  # raw, base64
Day = Annotated[str, StringConstraints(pattern=r"^20[0-9]{2}-[01][0-9]-[0-3][0-9]$")]
Share = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[int, Field(ge=0, le=10_000_000)]
Fold = Annotated[int, Field(ge=0, le=9)]
Folds = tuple[Fold, ...]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Model:
    """One of an expert's models: the folds that it did not learn from, and its weights' digest."""

    excluded: Folds  # (): it learnt from all patients
    sha256: Sha256


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AuditSummary:
    """How well an attack tells the site's training patients from others."""

    method: Annotated[str, StringConstraints(pattern=r"^[a-z0-9 _.-]{1,64}$")]
    auroc: Share
    low: Share
    high: Share
    patients: Number
    detectable: Share  # the smallest AUROC that this cohort could have told from one half
    tpr_at_1_percent: Share | None = None  # None: this cohort cannot show it


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Card:
    """What an expert says of itself."""

    kind: Literal["cropkt-expert-1"] = "cropkt-expert-1"
    cancer: Cancer
    site: SiteName | None  # None: the coordinator's average of its parents
    round: Annotated[int, Field(ge=0, le=99)]
    patients: Number | None  # rounded as the site's policy says; None where it is suppressed
    events: Number | None
    endpoint: Endpoint
    encoder: Encoder
    shape: ExpertShape
    bin_days: Annotated[int, Field(ge=1, le=100_000)] = BIN_DAYS
    models: Annotated[tuple[Model, ...], Field(min_length=1, max_length=64)]
    m0: Sha256  # of the weights that the first round started from
    study: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16,64}$")]  # StudyConfig.hash()
    training: Sha256  # of the training settings
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    audit: AuditSummary | None = None
    parents: tuple[Sha256, ...] = ()  # the experts that it was averaged, or trained on, from
    licence: Annotated[str, StringConstraints(pattern=r"^[ -~]{0,100}$")] = ""
    created: Day
    signer: PublicKey


def canonical(card: Card) -> bytes:
    """Return the one text of a card.

    Raises:
        CardError: it holds a value that JSON does not know, or is too long.
    """
    try:
        text = json.dumps(asdict(card), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError:
        raise CardError(name_of(card), "its card holds a value that is not finite") from None
    if len(text) > MAX_CARD:
        problem = f"its card has {len(text)} characters, at most {MAX_CARD}"
        raise CardError(name_of(card), problem, "Average fewer sites")
    return text.encode("ascii")


def read_card(text: str) -> Card:
    """Return the card in a text.

    Raises:
        CardError: too long, not as agreed, or not in canonical form; repeats none of it.
    """
    if len(text) > MAX_CARD:
        raise CardError("card", f"it has {len(text)} characters, at most {MAX_CARD}")
    try:
        card = _ADAPTER.validate_json(text)
    except ValidationError as error:
        where = next(iter(error.errors()[0]["loc"]), None)
        which = f"field {where}" if where in Card.__dataclass_fields__ else "it"
        raise CardError("card", f"{which} is not as agreed") from None
    if canonical(card) != text.encode():
        raise CardError("card", "not in canonical form")
    return card


def name_of(card: Card) -> str:
    """Return how messages call an expert."""
    return f"expert {card.cancer} of {card.site or 'several sites'}"


def hash_of(text: bytes) -> str:
    """Return the hash by which an expert is known: the SHA-256 of its card."""
    return hashlib.sha256(text).hexdigest()


def digest(weights: NDArray[np.float32]) -> str:
    """Return the SHA-256 of one model's weights (parameters,), as little-endian float32."""
    return hashlib.sha256(np.ascontiguousarray(weights, dtype="<f4").tobytes()).hexdigest()


def models_of(weights: NDArray[np.float32], excluded: Sequence[Folds]) -> tuple[Model, ...]:
    """Return what a card says of weights (F, parameters), whose models left out these folds."""
    return tuple(
        Model(excluded=tuple(folds), sha256=digest(row))
        for row, folds in zip(weights, excluded, strict=True)
    )


def training_hash(study: StudyConfig) -> str:
    """Return the SHA-256 of a study's training settings."""
    text = json.dumps(asdict(study.training), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def public_text(key: Ed25519PrivateKey | Ed25519PublicKey) -> str:
    """Return a key's public half as a card has it: base64 of its 32 bytes."""
    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    return base64.b64encode(public.public_bytes_raw()).decode()


def fingerprint(signer: str) -> str:
    """Return what two people compare by telephone: 128 bits in groups of four digits."""
    text = hashlib.sha256(base64.b64decode(signer)).hexdigest()[:32]
    return " ".join(text[i : i + 4] for i in range(0, len(text), 4))


def sign(card: Card, key: Ed25519PrivateKey) -> tuple[str, str]:
    """Return a card's text, and the signature over it in hex.

    Raises:
        CardError: the card names another signer, or has no text.
    """
    if card.signer != public_text(key):
        raise CardError(name_of(card), "its card names another signer than the one who signs")
    text = canonical(card)
    return text.decode(), key.sign(DOMAIN + text).hex()


def verified(text: str, signature: str) -> Card:
    """Return the card in a text, if the signer that it names did sign it.

    Whether that signer is to be trusted is the reader's to decide.

    Raises:
        CardError: it is no card.
        CardChangedError: the signature is not over this text, or not by this signer.
    """
    card = read_card(text)
    try:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(card.signer))
        key.verify(bytes.fromhex(signature), DOMAIN + text.encode())
    except (InvalidSignature, ValueError):
        problem, fix = "its card is not what was signed", "Ask for the expert again"
        raise CardChangedError(name_of(card), problem, fix) from None
    return card


def check_study(card: Card, study: StudyConfig, *, m0: str) -> None:
    """Check that an expert was made for a study.

    Args:
        card: the expert's.
        study: what was agreed.
        m0: the fingerprint of the study's M0.

    Raises:
        BinsMismatchError, TensorShapeError, EncoderMismatchError, StartMismatchError,
        StudyMismatchError: it was made for another; says in what.
    """
    name, fix = name_of(card), "Train it in this study"
    if (card.shape.bins, card.bin_days) != (study.shape.bins, BIN_DAYS):
        theirs = f"{card.shape.bins} bins of {card.bin_days} days"
        ours = f"{study.shape.bins} of {BIN_DAYS}"
        raise BinsMismatchError(name, f"it has {theirs}, the study {ours}", fix)
    if card.shape != study.shape:
        raise TensorShapeError(name, "its widths are not the study's shape", fix)
    if card.encoder != study.encoder:
        problem = f"it reads features of {card.encoder!r}, not of {study.encoder!r}"
        raise EncoderMismatchError(name, problem, fix)
    if card.m0 != m0:
        problem = "it was not trained from the study's M0"
        raise StartMismatchError(name, problem, "Install the same torch on both sides")
    if (card.study, card.training) != (study.hash(), training_hash(study)):
        raise StudyMismatchError(name, "it was trained under other settings", fix)
    if card.endpoint != study.endpoint:
        raise StudyMismatchError(name, f"it predicts {card.endpoint}, not {study.endpoint}", fix)


def check_models(
    card: Card, weights: NDArray[np.float32], excluded: Sequence[Folds], *, cancer: Cancer
) -> None:
    """Check that weights are an expert's models that left out certain folds.

    Args:
        card: the expert's.
        weights: (F, parameters).
        excluded: of each of the F models, the folds that it must not have learnt from.
        cancer: whose expert is wanted.

    Raises:
        OtherExpertError: it is of another cancer, or has no such model.
        WeightsChangedError: a model's weights are not those that were signed.
    """
    name = name_of(card)
    if card.cancer != cancer:
        raise OtherExpertError(name, f"an expert of {cancer} is wanted")
    if len(weights) != len(excluded):
        raise OtherExpertError(name, f"{len(weights)} models came, {len(excluded)} are wanted")
    signed = {model.excluded: model.sha256 for model in card.models}
    for row, folds in zip(weights, excluded, strict=True):
        if tuple(folds) not in signed:
            raise OtherExpertError(name, f"it has no model without folds {list(folds)}")
        if digest(row) != signed[tuple(folds)]:
            problem = "its weights are not those that were signed"
            raise WeightsChangedError(name, problem, "Ask for the expert again")


_ADAPTER = TypeAdapter(Card)
