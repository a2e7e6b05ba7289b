"""An expert as one file: its weights as named tensors, its card, and the signature over both.

The file is safetensors: a length, a JSON header, plain numbers; nothing in it is ever executed.
Whoever wrote it is not trusted: sizes are compared with the limit and with the file before
anything is read into memory, the signature is checked before the card is believed, and what the
card does not promise is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.numpy
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from cropkt.config import ExpertShape, StudyConfig
from cropkt.errors import (
    ExtraTensorError,
    FileFormatError,
    MissingTensorError,
    NotFiniteError,
    PickledError,
    TensorShapeError,
    TensorTypeError,
    TooLargeError,
    UnknownSignerError,
)
from cropkt.experts.abmil import Abmil, flatten
from cropkt.experts.card import (
    Card,
    canonical,
    check_models,
    check_study,
    hash_of,
    sign,
    verified,
)
from cropkt.files import write_private

MAX_FILE = 1 << 29  # bytes
MAX_HEADER = 1 << 16  # bytes
_LENGTH = 8  # bytes, of the header's length
_PICKLES = (b"PK\x03\x04", *(bytes([0x80, number]) for number in range(2, 6)))  # torch zips them
_SAFE = "Ask for the expert in safetensors"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Artifact:
    """A signed expert."""

    card: Card
    weights: NDArray[np.float32]  # (F, parameters)
    signature: str  # hex

    @classmethod
    def signed(cls, card: Card, weights: NDArray[np.float32], key: Ed25519PrivateKey) -> Artifact:
        """Return the expert, signed with the key of the signer that its card names."""
        _, signature = sign(card, key)
        return cls(card=card, weights=weights, signature=signature)

    @property
    def hash(self) -> str:
        """By which the expert is known."""
        return hash_of(canonical(self.card))

    @property
    def file_name(self) -> str:
        """Under which the expert is kept."""
        return f"{self.card.cancer}-{self.hash[:16]}.safetensors"

    def save(self, folder: Path) -> Path:
        """Write the expert's file into a folder, whole or not at all; return its path."""
        tensors, start = {}, 0
        for name, shape in tensor_shapes(self.card.shape, len(self.weights)).items():
            size = prod(shape[1:])
            part = self.weights[:, start : start + size]
            tensors[name] = np.ascontiguousarray(part, dtype="<f4").reshape(shape)
            start += size
        about = {"card": canonical(self.card).decode(), "signature": self.signature}
        content = safetensors.numpy.save(tensors, metadata=about)
        path = folder / self.file_name
        write_private(path, content)
        return path


def load_artifact(
    path: Path,
    *,
    trusted: Callable[[Card], bool],
    study: StudyConfig | None = None,
    limit: int = MAX_FILE,
) -> Artifact:
    """Return the expert in a file, if all of it is as signed.

    Args:
        path: of the file.
        trusted: whether the signer that a card names is whom the reader knows under that name.
        study: if given, the study that the expert must have been made for.
        limit: bytes that the file may have.

    Raises:
        ArtifactError: one of its kinds; says what is wrong with the file.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        header = read_header(path, file, limit)
        about = header.pop("__metadata__", None)
        if not isinstance(about, dict) or set(about) != {"card", "signature"}:
            raise FileFormatError(path, "it holds no card and signature", "Ask for a signed expert")
        card = verified(str(about["card"]), str(about["signature"]))
        if not trusted(card):
            problem = f"its signer is not known as {card.site or 'the coordinator'}"
            raise UnknownSignerError(path, problem, "Compare fingerprints with the signer")
        wanted = tensor_shapes(card.shape, len(card.models))
        _check_tensors(path, header, wanted)
        file.seek(0)
        content = file.read(os.fstat(file.fileno()).st_size)  # reading `limit` would reserve it
    try:
        tensors = safetensors.numpy.load(content)
    except safetensors.SafetensorError:
        raise FileFormatError(path, "it is damaged", "Copy it again") from None
    weights = np.concatenate([tensors[n].reshape(len(card.models), -1) for n in wanted], axis=1)
    if not np.isfinite(weights).all():
        raise NotFiniteError(path, "its weights hold values that are not finite")
    check_models(card, weights, [model.excluded for model in card.models], cancer=card.cancer)
    if study is not None:
        check_study(card, study, m0=m0_hash(study))
    return Artifact(card=card, weights=weights, signature=str(about["signature"]))


def read_header(
    path: Path, file: BinaryIO, limit: int, *, longest: int = MAX_HEADER
) -> dict[str, Any]:
    """Return the header of a safetensors file that is as large as it declares.

    Args:
        path: of the file, for what is said of it.
        file: at its start.
        limit: bytes that the file may have.
        longest: bytes that its header may have.

    Raises:
        FileFormatError, PickledError, TooLargeError: it is none, is damaged, or is larger.
    """
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        raise TooLargeError(path, f"it has {size} bytes, at most {limit} are read")
    start = file.read(_LENGTH)
    if start.startswith(_PICKLES):
        raise PickledError(path, "it is a pickle, and those are never read", _SAFE)
    length = int.from_bytes(start, "little")
    if len(start) < _LENGTH or not 2 <= length <= min(longest, size - _LENGTH):
        raise FileFormatError(path, "it is no safetensors file", _SAFE)
    try:
        header = json.loads(file.read(length))
        parts = [item for name, item in header.items() if name != "__metadata__"]
        if not all(type(n) is int for part in parts for n in part["shape"]):
            raise TypeError  # a text times a number is a long text
        declared = [prod(part["shape"]) for part in parts]  # bytes, at least
        ends = [part["data_offsets"][1] for part in parts]
        dtypes = [part["dtype"] for part in parts]
        good = all(type(n) is int and n >= 0 for n in declared + ends)
        good = good and all(type(dtype) is str for dtype in dtypes)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        good = False
    if not good:
        raise FileFormatError(path, "its header is not that of a safetensors file")
    if max([sum(declared), *ends]) > limit:
        raise TooLargeError(path, f"it declares tensors of more than {limit} bytes")
    if _LENGTH + length + max([0, *ends]) != size:
        raise FileFormatError(path, "it is not as large as it declares", "Copy it again")
    return dict(header)


@lru_cache(maxsize=8)
def m0_hash(study: StudyConfig) -> str:
    """Return the fingerprint of a study's M0, the weights that every site starts from."""
    m0 = Abmil.initial(study.shape, seed=study.seed, hazard=study.initial_hazard)
    return hashlib.sha256(flatten(m0).numpy().astype("<f4").tobytes()).hexdigest()


def tensor_shapes(shape: ExpertShape, models: int) -> dict[str, tuple[int, ...]]:
    """Return the names of an expert's tensors, in the order of its flat weights, and shapes."""
    with torch.device("meta"):
        module = Abmil(shape, models=models)
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _check_tensors(path: Path, found: dict[str, Any], wanted: dict[str, tuple[int, ...]]) -> None:
    """Check names, dtypes and shapes of the tensors in a header, against those that are wanted."""
    fix = "Ask for the expert again"
    if missing := sorted(set(wanted) - set(found)):
        raise MissingTensorError(path, f"tensor {missing[0]} is missing", fix)
    if len(found) > len(wanted):
        extra = len(found) - len(wanted)
        raise ExtraTensorError(path, f"it holds {extra} tensors that its card does not know", fix)
    for name, shape in wanted.items():
        if found[name]["dtype"] != "F32":
            raise TensorTypeError(path, f"tensor {name} is not float32", fix)
        if found[name]["shape"] != list(shape):
            raise TensorShapeError(path, f"tensor {name} has not the shape {shape}", fix)
