"""The released model as one file on site: named tensors and a JSON text that promises them.

The file is safetensors, like an expert's, and as strictly read: sizes before contents, no tensor
that the text does not promise, every tensor against its SHA-256 when it is used. Tensors are read
one by one, so that an answer costs the experts that speak and not the whole bank.

Shapes: K folds, V = 1 + K views (row 0: all patients, row 1 + f: without fold f), S sources,
D features, T bins, B bootstrap samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cropkt.cancers import Cancer
from cropkt.config import SiteName, StudyConfig
from cropkt.errors import (
    ExtraTensorError,
    FileFormatError,
    MissingTensorError,
    TensorShapeError,
    WeightsChangedError,
)
from cropkt.experts.abmil import Abmil, parameter_count
from cropkt.experts.artifact import read_header
from cropkt.experts.card import Day, Sha256
from cropkt.files import write_atomically
from cropkt.transfer.guard import Candidate
from cropkt.transfer.roupkt import Roupkt

Which = Literal["released", "local", "router"]
WHICH: tuple[Which, ...] = ("released", "local", "router")
PERCENTILES = 101
MAX_FILE = 1 << 33  # bytes: 25 experts and 11 routers of the published widths are 500 MB
MAX_TEXT = 1 << 22
_AGAIN = "Let the study release it again, or restore it from a backup"

_STRICT = ConfigDict(extra="forbid")
Amount = Annotated[int, Field(ge=0, le=10_000_000)]
Known = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Source:
    """An expert of another cancer, as its signer described it."""

    cancer: Cancer
    card: str
    signature: str


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OutOfFold:
    """How well a model ranked the training patients, each by models that did not see them."""

    c_index: Known
    low: Known | None
    high: Known | None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class About:
    """What a released model says of itself. It stays on site, so its counts are exact."""

    kind: Literal["cropkt-released-1"] = "cropkt-released-1"
    cropkt: str
    created: Day
    site: SiteName
    cancer: Cancer
    study: StudyConfig
    folds: Annotated[int, Field(ge=2, le=10)]
    patients: Amount
    events: Amount
    followed: tuple[Amount, ...]  # (T) patients known to live at the end of each bin
    candidate: Candidate  # what the guard moved towards
    share: Annotated[float, Field(ge=0, le=1)]  # how far
    gain: Known
    weights: tuple[Known, ...]  # (1 + S) of the answer, the own expert first
    faults: dict[str, str]  # sources left out, by cancer
    sources: tuple[Source, ...]
    parents: tuple[Sha256, ...] = ()  # cards of which the own expert is an average
    out_of_fold: dict[Which, OutOfFold]
    encoder: str  # as the files of the training slides say, or nothing
    magnification: Known | None = None
    patch_size: Known | None = None
    draws: Annotated[int, Field(ge=1, le=10_000)]
    tensors: dict[str, Sha256]

    @property
    def views(self) -> int:
        """1 + K."""
        return 1 + self.folds

    @property
    def experts(self) -> tuple[Cancer, ...]:
        """All experts, the own one first."""
        return (self.cancer, *(source.cancer for source in self.sources))


class Kept:
    """A released model's file: what it says, and its tensors when asked for."""

    def __init__(self, path: Path, about: About) -> None:
        self.path, self.about = path, about

    @classmethod
    def open(cls, path: Path) -> Kept:
        """Return the released model in a file, its header checked.

        Raises:
            ArtifactError: one of its kinds; says what is wrong with the file.
            OSError: it cannot be read.
        """
        with path.open("rb") as file:
            header = read_header(path, file, MAX_FILE, longest=MAX_TEXT)
        told = header.pop("__metadata__", None)
        if not isinstance(told, dict) or set(told) != {"released"}:
            raise FileFormatError(path, "it holds no released model", _AGAIN)
        try:
            about = _ADAPTER.validate_json(str(told["released"]))
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"])) or "its text"
            problem = f"{where} is not as this version of cropkt writes it"
            raise FileFormatError(path, problem, _AGAIN) from None
        _check(path, header, about)
        return cls(path, about)

    def tensor(self, name: str) -> NDArray[Any]:
        """Return one tensor, if it is as it was written.

        Raises:
            WeightsChangedError: it is not.
        """
        with safetensors.safe_open(self.path, framework="numpy") as file:
            value: NDArray[Any] = file.get_tensor(name)
        if _digest(value) != self.about.tensors[name]:
            raise WeightsChangedError(self.path, f"tensor {name} is damaged", _AGAIN)
        return value


def write(path: Path, about: About, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write a released model, whole or not at all, readable by its owner alone.

    Args:
        path: of the file.
        about: what it says of itself; its digests are filled in here.
        tensors: as `layout` names them.

    Raises:
        ArtifactError: they are not those.
    """
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    about = replace(about, tensors={name: _digest(value) for name, value in arrays.items()})
    found = {n: {"dtype": _KINDS[v.dtype.name], "shape": list(v.shape)} for n, v in arrays.items()}
    _check(path, found, about)
    text = json.dumps(asdict(about), sort_keys=True, separators=(",", ":"), allow_nan=False)
    content = safetensors.numpy.save(arrays, metadata={"released": text})
    write_atomically(path, lambda file: file.write(content))


def layout(about: About) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type and shape of every tensor that a released model has."""
    shape, experts = about.study.shape, 1 + len(about.sources)
    with torch.device("meta"):
        expert = parameter_count(Abmil(shape))
        router = parameter_count(
            Roupkt(shape, experts=experts, own_heads=about.study.router.warm_start)
        )
    views, bins, draws = about.views, shape.bins, 1 + about.draws
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "units": ("F64", (2, experts)),
        "slope": ("F64", (draws,)),
        "hazard": ("F64", (draws, bins)),
        "scale": ("F64", (2,)),
        "percentiles": ("F64", (len(WHICH), PERCENTILES)),
        "prior": ("F32", (views, experts)),
    }
    for view in range(views):
        wanted[f"own/{view}"] = ("F32", (expert,))
        wanted[f"router/{view}"] = ("F32", (router,))
        if about.study.training.standardise == "site":
            wanted[f"mean/{view}"] = wanted[f"deviation/{view}"] = ("F32", (shape.dim,))
    wanted |= {f"source/{index}": ("F32", (expert,)) for index in range(experts - 1)}
    return wanted


def _check(path: Path, found: dict[str, Any], about: About) -> None:
    """Check a header's tensors against those that the text promises and the study needs."""
    counts = (len(about.weights), len(about.followed))
    if counts != (1 + len(about.sources), about.study.shape.bins):
        raise FileFormatError(path, "its text contradicts itself", _AGAIN)
    wanted = layout(about)
    if missing := sorted(set(wanted) - set(found) | set(wanted) - set(about.tensors)):
        raise MissingTensorError(path, f"tensor {missing[0]} is missing", _AGAIN)
    if extra := (set(found) | set(about.tensors)) - set(wanted):
        raise ExtraTensorError(path, f"it holds {len(extra)} tensors too many", _AGAIN)
    for name, (kind, shape) in wanted.items():
        if (found[name]["dtype"], found[name]["shape"]) != (kind, list(shape)):
            raise TensorShapeError(path, f"tensor {name} is not {kind} of shape {shape}", _AGAIN)


def _digest(value: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()


_KINDS = {"float32": "F32", "float64": "F64"}
_ADAPTER = TypeAdapter(About)
