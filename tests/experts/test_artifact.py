"""A signed expert's file, and everything that may be wrong with it: altered byte by byte."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cropkt
from cropkt import errors
from cropkt.cancers import Cancer
from cropkt.cohort.bags import PackedBags
from cropkt.config import ExpertShape, StudyConfig
from cropkt.experts.abmil import Abmil, flatten
from cropkt.experts.artifact import Artifact, load_artifact, m0_hash
from cropkt.experts.card import (
    DOMAIN,
    MAX_CARD,
    AuditSummary,
    Card,
    canonical,
    check_models,
    check_study,
    fingerprint,
    models_of,
    public_text,
    read_card,
    sign,
    training_hash,
    verified,
)

SHAPE = ExpertShape(dim=6, embed=8, attention=4)
STUDY = StudyConfig(encoder="UNI2-h", shape=SHAPE, folds=3)
EXCLUDED = ((), (0,), (1,))
Load = Callable[..., Artifact]


def card_of(key: Ed25519PrivateKey, weights: np.ndarray, **changes: Any) -> Card:
    values: dict[str, Any] = {
        "cancer": Cancer.UVM,
        "site": "eye-clinic",
        "round": 0,
        "patients": 80,
        "events": 20,
        "endpoint": STUDY.endpoint,
        "encoder": "UNI2-h",
        "shape": SHAPE,
        "models": models_of(weights, EXCLUDED[: len(weights)]),
        "m0": m0_hash(STUDY),
        "study": STUDY.hash(),
        "training": training_hash(STUDY),
        "created": "2026-03-01",
        "signer": public_text(key),
    }
    return Card(**{**values, **changes})


@pytest.fixture(scope="module")
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    m0 = flatten(Abmil.initial(SHAPE, seed=0, hazard=0.06)).numpy()
    return np.concatenate([m0 + np.float32(0.01 * i) for i in range(3)])


@pytest.fixture
def path(key: Ed25519PrivateKey, weights: np.ndarray, tmp_path: Path) -> Path:
    return Artifact.signed(card_of(key, weights), weights, key).save(tmp_path)


@pytest.fixture
def load(key: Ed25519PrivateKey, path: Path) -> Load:
    """Load the file as a reader in the study would, who knows the eye clinic's key."""

    def read(**options: Any) -> Artifact:
        known = {"eye-clinic": public_text(key)}
        values = {"study": STUDY, **options}
        return load_artifact(
            path, trusted=lambda card: known.get(str(card.site)) == card.signer, **values
        )

    return read


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the numbers of a safetensors file."""
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:end]), whole[end:]


def write(path: Path, header: dict[str, Any], numbers: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)


def resaved(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Write the file anew with other tensors under the same card and signature."""
    header, _ = parts(path)
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    path.write_bytes(safetensors.numpy.save(tensors, metadata=header["__metadata__"]))


def test_a_file_round_trips(load: Load, path: Path, weights: np.ndarray) -> None:
    read = load()
    assert np.array_equal(read.weights, weights)
    assert path.name == f"UVM-{read.hash[:16]}.safetensors"
    assert path.stat().st_mode & 0o077 == 0
    names = set(safetensors.numpy.load_file(path))
    assert names == {name for name, _ in Abmil(SHAPE).named_parameters()}


def test_a_file_loads_as_plain_torch(
    path: Path, key: Ed25519PrivateKey, weights: np.ndarray
) -> None:
    bag = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    for number in (0, 2):
        expert = cropkt.load_expert(path, model=number, signer=public_text(key))
        same = Abmil.from_flat(SHAPE, torch.from_numpy(weights[number : number + 1]))
        whole = same.outputs(PackedBags.of([bag]))
        assert torch.equal(expert(bag), whole.logits[0, 0])
        assert torch.equal(expert.slide_feature(bag), whole.features[0, 0])
        assert expert.attention(bag).sum() == pytest.approx(1)
        assert not any(weight.requires_grad for weight in expert.parameters())
    assert torch.equal(
        cropkt.load_expert(path).standardise(torch.ones(6), 2 * torch.ones(6))(2 * bag + 1),
        cropkt.load_expert(path)(bag),
    )
    with pytest.raises(errors.UnknownSignerError):
        cropkt.load_expert(path, signer=public_text(Ed25519PrivateKey.generate()))
    with pytest.raises(errors.UsageError, match="no model 3"):
        cropkt.load_expert(path, model=3)
    with pytest.raises(errors.BagShapeError):
        cropkt.load_expert(path)(bag[:, :5])


def test_an_unknown_signer_is_refused(path: Path, load: Load, weights: np.ndarray) -> None:
    other = Ed25519PrivateKey.generate()  # signs correctly, in the eye clinic's name
    forged = Artifact.signed(card_of(other, weights), weights, other).save(path.parent / "forged")
    forged.replace(path)
    with pytest.raises(errors.UnknownSignerError, match="not known as eye-clinic"):
        load()


def test_any_changed_byte_of_the_weights_is_refused(path: Path, load: Load) -> None:
    whole = path.read_bytes()
    start = len(whole) - len(parts(path)[1])
    for at in np.random.default_rng(0).integers(start, len(whole), size=40):
        changed = bytearray(whole)
        changed[at] ^= 1  # stays finite: only the digest tells
        path.write_bytes(changed)
        with pytest.raises(errors.WeightsChangedError):
            load()


def test_any_changed_byte_of_the_card_is_refused(path: Path, load: Load) -> None:
    whole = path.read_bytes()
    text = parts(path)[0]["__metadata__"]["card"]
    inside = json.dumps(text).encode()[1:-1]
    start = whole.index(inside)
    for at in range(start, start + len(inside), 7):
        changed = bytearray(whole)
        changed[at] ^= 1
        path.write_bytes(changed)
        with pytest.raises((errors.CardChangedError, errors.CardError, errors.FileFormatError)):
            load()


@pytest.mark.parametrize(
    ("field", "value"), [("patients", 85), ("cancer", "SKCM"), ("site", "lung-clinic")]
)
def test_a_card_that_says_something_else_is_not_what_was_signed(
    path: Path, load: Load, field: str, value: object
) -> None:
    header, numbers = parts(path)
    card = {**json.loads(header["__metadata__"]["card"]), field: value}
    text = json.dumps(card, sort_keys=True, separators=(",", ":"))
    header["__metadata__"]["card"] = text
    write(path, header, numbers)
    with pytest.raises(errors.CardChangedError):
        load()


def test_a_signature_for_another_purpose_does_not_count(
    key: Ed25519PrivateKey, weights: np.ndarray
) -> None:
    text = canonical(card_of(key, weights))
    assert verified(text.decode(), key.sign(DOMAIN + text).hex()).site == "eye-clinic"
    for message in (text, b"cropkt-ledger-v1\0" + text):
        with pytest.raises(errors.CardChangedError):
            verified(text.decode(), key.sign(message).hex())
    with pytest.raises(errors.CardChangedError):
        verified(text.decode(), "00")


def test_a_missing_tensor_is_refused(path: Path, load: Load) -> None:
    resaved(path, lambda tensors: tensors.pop("head_bias"))
    with pytest.raises(errors.MissingTensorError, match="tensor head_bias is missing"):
        load()


def test_an_extra_tensor_is_refused(path: Path, load: Load) -> None:
    resaved(path, lambda tensors: tensors.update(more=np.zeros(3, np.float32)))
    with pytest.raises(errors.ExtraTensorError, match="holds 1 tensors"):
        load()


def test_a_wrong_shape_is_refused(path: Path, load: Load) -> None:
    resaved(path, lambda tensors: tensors.update(head=tensors["head"].swapaxes(1, 2).copy()))
    with pytest.raises(errors.TensorShapeError, match=r"tensor head has not the shape \(3, 32, 8"):
        load()


def test_a_wrong_dtype_is_refused(path: Path, load: Load) -> None:
    resaved(path, lambda tensors: tensors.update(head=tensors["head"].astype(np.float16)))
    with pytest.raises(errors.TensorTypeError, match="tensor head is not float32"):
        load()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_though_it_was_signed(
    path: Path, load: Load, key: Ed25519PrivateKey, weights: np.ndarray, value: float
) -> None:
    bad = weights.copy()
    bad[1, 7] = value
    Artifact.signed(card_of(key, bad), bad, key).save(path.parent / "bad").replace(path)
    with pytest.raises(errors.NotFiniteError):
        load()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"encoder": "another"}, errors.EncoderMismatchError),
        ({"shape": replace(SHAPE, bins=16)}, errors.BinsMismatchError),
        ({"bin_days": 30}, errors.BinsMismatchError),
        ({"shape": replace(SHAPE, embed=4)}, errors.TensorShapeError),
        ({"m0": "0" * 64}, errors.StartMismatchError),
        ({"study": "0" * 16}, errors.StudyMismatchError),
        ({"training": "0" * 64}, errors.StudyMismatchError),
        ({"endpoint": "OS"}, errors.StudyMismatchError),
    ],
)
def test_an_expert_of_another_study_is_refused(
    path: Path,
    load: Load,
    key: Ed25519PrivateKey,
    weights: np.ndarray,
    changes: dict[str, Any],
    error: type[errors.ArtifactError],
) -> None:
    shape = changes.get("shape", SHAPE)
    whole = flatten(Abmil.initial(shape, seed=1, models=3)).numpy()
    card = card_of(key, whole, **changes)
    Artifact.signed(card, whole, key).save(path.parent / "other").replace(path)
    with pytest.raises(error):
        load()
    assert type(error("a", "b")) is not errors.ArtifactError
    load(study=None)  # the file itself is as signed


def test_another_seed_is_another_m0(key: Ed25519PrivateKey, weights: np.ndarray) -> None:
    other = replace(STUDY, seed=1)
    assert m0_hash(other) != m0_hash(STUDY)
    with pytest.raises(errors.StartMismatchError):
        check_study(card_of(key, weights), other, m0=m0_hash(other))


def test_a_file_over_the_limit_is_not_read(path: Path, load: Load) -> None:
    with pytest.raises(errors.TooLargeError, match="at most 1000 are read"):
        load(limit=1000)


@pytest.mark.parametrize(
    ("what", "sizes"), [("shape", [1 << 20] * 2), ("data_offsets", [0, 1 << 40])]
)
def test_a_declared_size_over_the_limit_is_refused_before_it_is_allocated(
    path: Path, load: Load, what: str, sizes: list[int]
) -> None:
    header, numbers = parts(path)
    header["head"][what] = sizes
    write(path, header, numbers)
    tracemalloc.start()
    with pytest.raises(errors.TooLargeError, match="declares tensors of more than"):
        load()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24  # of a declared 1 << 40


def test_a_pickle_is_refused_and_not_run(path: Path, load: Load, tmp_path: Path) -> None:
    trace = tmp_path / "was-run"

    class Traced:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (trace,))

    for protocol in range(2, 6):
        path.write_bytes(pickle.dumps(Traced(), protocol=protocol) + bytes(100))
        with pytest.raises(errors.PickledError, match="a pickle, and those are never read"):
            load()
    torch.save(Traced(), path)
    with pytest.raises(errors.PickledError):
        load()
    assert not trace.exists()


def test_a_cut_or_padded_file_is_refused(path: Path, load: Load) -> None:
    whole = path.read_bytes()
    for content in (whole[:-1], whole + b"\0", whole[:100], whole[:4], b""):
        path.write_bytes(content)
        with pytest.raises(errors.FileFormatError):
            load()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.binary(max_size=200), tail=st.binary(max_size=50))
def test_any_bytes_end_in_a_typed_refusal(
    path: Path, load: Load, header: bytes, tail: bytes
) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + tail)
    with pytest.raises(errors.ArtifactError):
        load()


def test_every_refusal_has_a_class_of_its_own(path: Path) -> None:
    kinds = errors.ArtifactError.__subclasses__()
    assert len({kind.__name__ for kind in kinds}) == len(kinds) == 18
    assert all(issubclass(kind, errors.DataError) and kind.__doc__ for kind in kinds)


# The card


def test_a_card_has_one_text(key: Ed25519PrivateKey, weights: np.ndarray) -> None:
    audit = AuditSummary(
        method="lira", auroc=0.52, low=0.45, high=0.59, patients=80, detectable=0.6
    )
    card = card_of(key, weights, audit=audit, epsilon=8.0, delta=1e-5)
    text = canonical(card).decode()
    assert read_card(text) == card
    assert " " not in text
    for other in (text.replace(":", ": "), text[:-1] + ',"round":0}', text.replace("80", "80.0")):
        with pytest.raises(errors.CardError):
            read_card(other)


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": float("nan")},
        {"epsilon": float("inf")},
        {"patients": "SECRETVALUE"},
        {"SECRETVALUE": 1},
        {"site": "SECRET VALUE"},
        {"licence": "two\nlines"},
        {"models": []},
        {"created": "yesterday"},
        {"parents": ["SECRETVALUE"]},
    ],
)
def test_what_is_no_card_is_refused_and_not_repeated(
    key: Ed25519PrivateKey, weights: np.ndarray, change: dict[str, Any]
) -> None:
    values = {**asdict(card_of(key, weights)), **change}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    with pytest.raises(errors.CardError) as caught:
        read_card(text)
    assert "SECRET" not in str(caught.value)


def test_a_card_has_a_greatest_length(key: Ed25519PrivateKey, weights: np.ndarray) -> None:
    parents = tuple(f"{i:064x}" for i in range(1000))
    with pytest.raises(errors.CardError, match=f"at most {MAX_CARD}"):
        sign(card_of(key, weights, parents=parents), key)
    folds = [(), *((f,) for f in range(10)), *((f, g) for f in range(10) for g in range(f))]
    whole = np.zeros((len(folds), 4), np.float32)
    largest = card_of(key, whole[:1], models=models_of(whole, folds), parents=parents[:100])
    assert read_card(sign(largest, key)[0]) == largest


def test_nobody_signs_in_another_name(key: Ed25519PrivateKey, weights: np.ndarray) -> None:
    with pytest.raises(errors.CardError, match="names another signer"):
        sign(card_of(key, weights), Ed25519PrivateKey.generate())


def test_one_model_can_be_checked_without_the_others(
    key: Ed25519PrivateKey, weights: np.ndarray
) -> None:
    card = card_of(key, weights)
    for row, folds in zip(weights, EXCLUDED, strict=True):
        check_models(card, row[None], [folds], cancer=Cancer.UVM)
    with pytest.raises(errors.WeightsChangedError):
        check_models(card, weights[:1], [(0,)], cancer=Cancer.UVM)
    with pytest.raises(errors.OtherExpertError, match=r"no model without folds \[2\]"):
        check_models(card, weights[:1], [(2,)], cancer=Cancer.UVM)
    with pytest.raises(errors.OtherExpertError, match="2 are wanted"):
        check_models(card, weights[:1], [(), (0,)], cancer=Cancer.UVM)
    with pytest.raises(errors.OtherExpertError, match="an expert of SKCM is wanted"):
        check_models(card, weights, EXCLUDED, cancer=Cancer.SKCM)


def test_a_fingerprint_can_be_read_out(key: Ed25519PrivateKey) -> None:
    text = fingerprint(public_text(key))
    assert [len(group) for group in text.split()] == [4] * 8
    assert text != fingerprint(public_text(Ed25519PrivateKey.generate()))
