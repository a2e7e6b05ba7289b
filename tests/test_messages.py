from __future__ import annotations

import io
import json
import random
import tracemalloc
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints
from zipfile import ZipFile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import StringConstraints

from cropkt import messages
from cropkt.cancers import Cancer
from cropkt.config import PUBLISHED, ExpertShape, RouterConfig, StudyConfig, TrainingConfig
from cropkt.errors import MessageError
from cropkt.messages import (
    REPLIES,
    REQUESTS,
    ArmScore,
    CohortCount,
    Cost,
    DescribeReply,
    DescribeRequest,
    Difference,
    ExpertReply,
    ExpertRequest,
    Failure,
    FedAvgReply,
    FedAvgRequest,
    Fewest,
    HeldRequest,
    Message,
    ReleaseReply,
    ReleaseRequest,
    RouterReply,
    RouterRequest,
    Score,
    Shots,
    Signed,
    SourceScore,
    TransferReply,
    TransferRequest,
    Verdict,
    Voice,
    load,
    pack,
    save,
    unpack,
)

SECRET = "SECRETVALUE"
EVERY = REQUESTS + REPLIES

cancers = st.sampled_from(list(Cancer))
patients = st.integers(0, 10_000_000)
counts = patients | st.none()
seconds = st.floats(0, 1e8)
probability = st.floats(0, 1)
maybe = probability | st.none()
weights = arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 5)),
    elements=st.floats(-1e6, 1e6, width=32),
)
tasks = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._/-]{0,199}\Z")
sites = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
studies = st.sampled_from([StudyConfig(), PUBLISHED, StudyConfig(shape=ExpertShape(dim=4), seed=9)])
scores = st.builds(Score, c_index=maybe, se=st.none() | st.floats(0, 10))
change = st.floats(-1, 1)
signed = st.none() | change
source_scores = st.builds(
    SourceScore, c_index=maybe, se=st.none() | st.floats(0, 10), lead=signed, lead_se=maybe
)
lists = {"max_size": 3}
amount = st.floats(0, 1e15)
arms = st.sampled_from(get_args(messages.Arm))
arm_scores = st.builds(
    ArmScore,
    **dict.fromkeys(["c_index", "low", "high", "fold_mean", "pooled", "gain_se"], maybe),
    **dict.fromkeys(["gain", "gain_low", "gain_high"], signed),
    **dict.fromkeys(["c_ipcw", "brier", "d_calibration", "log_rank"], maybe),
    se=st.none() | st.floats(0, 10),
    pairs=patients,
    auc=st.lists(maybe, **lists).map(tuple),
    against=st.dictionaries(
        arms,
        st.builds(Difference, value=change, se=probability, low=change, high=change),
        **lists,
    ),
    cost=st.none()
    | st.builds(
        Cost,
        seconds=seconds,
        megabytes=amount | st.none(),
        **dict.fromkeys(["gflop", "received", "sent"], amount),
    ),
)
some_folds = st.integers(0, 10)
voices = st.builds(
    Voice,
    weight=probability,
    weight_sd=probability,
    cost=signed,
    silent=some_folds,
    contrary=some_folds,
)
verdicts = st.builds(
    Verdict,
    share=probability,
    candidates=st.dictionaries(st.sampled_from(["equal", "vote", "stack", "measured"]), some_folds),
    gain=change,
)
few_shots = st.builds(
    Shots,
    patients=st.integers(1, 10_000_000) | st.none(),
    arms=st.dictionaries(arms, st.lists(probability, **lists).map(tuple), **lists),
)
fewest = st.builds(Fewest, patients=st.integers(0, 10_000_000), events=st.integers(0, 9))
cards = st.builds(Signed, card=st.text(max_size=50), signature=st.from_regex(r"\A[0-9a-f]{128}\Z"))


def of(kind: type[Message], **values: Any) -> st.SearchStrategy[Any]:
    return st.builds(kind, task=tasks, **values)


VALID: dict[type[Message], st.SearchStrategy[Any]] = {
    DescribeRequest: of(DescribeRequest, study=studies),
    DescribeReply: of(
        DescribeReply,
        site=sites,
        cohorts=st.lists(
            st.builds(
                CohortCount,
                cancer=cancers,
                patients=counts,
                events=counts,
                dim=st.integers(1, 16_384),
            ),
            **lists,
        ).map(tuple),
        versions=st.dictionaries(
            st.from_regex(r"\A[a-z][a-z0-9_-]{0,31}\Z"),
            st.from_regex(r"\A[A-Za-z0-9.+_-]{1,64}\Z"),
            **lists,
        ),
    ),
    ExpertRequest: of(
        ExpertRequest,
        study=studies,
        cancer=cancers,
        round=st.integers(0, 99),
        shared=st.booleans(),
        weights=weights | st.none(),
        signed=cards | st.none(),
    ),
    ExpertReply: of(
        ExpertReply,
        cancer=cancers,
        patients=counts,
        events=counts,
        weights=weights,
        score=scores,
        seconds=seconds,
        fewest=fewest | st.none(),
        signed=cards | st.none(),
    ),
    TransferRequest: of(
        TransferRequest,
        study=studies,
        cancer=cancers,
        sources=st.lists(cancers, **lists).map(tuple),
        weights=weights,
        signed=st.lists(cards, **lists).map(tuple),
    ),
    TransferReply: of(
        TransferReply,
        cancer=cancers,
        patients=counts,
        events=counts,
        scores=st.lists(source_scores, **lists).map(tuple),
        training_scores=st.lists(st.lists(scores, **lists).map(tuple), **lists).map(tuple),
        seconds=seconds,
        fewest=fewest | st.none(),
    ),
    RouterRequest: of(
        RouterRequest,
        study=studies,
        cancer=cancers,
        round=st.integers(0, 99),
        shared=st.booleans(),
        sources=st.lists(cancers, **lists).map(tuple),
        weights=weights,
        signed=st.lists(cards, **lists).map(tuple),
        own_signed=cards | st.none(),
        own=weights | st.none(),
        routers=weights | st.none(),
    ),
    RouterReply: of(
        RouterReply,
        cancer=cancers,
        patients=counts,
        events=counts,
        weights=weights,
        seconds=seconds,
        fewest=fewest | st.none(),
    ),
    FedAvgRequest: of(
        FedAvgRequest,
        study=studies,
        cancer=cancers,
        round=st.integers(0, 99),
        weights=weights | st.none(),
    ),
    FedAvgReply: of(
        FedAvgReply,
        cancer=cancers,
        patients=counts,
        events=counts,
        weights=weights,
        seconds=seconds,
        fewest=fewest | st.none(),
    ),
    ReleaseRequest: of(
        ReleaseRequest,
        study=studies,
        cancer=cancers,
        routers=weights | st.none(),
        everyone=weights | st.none(),
    ),
    ReleaseReply: of(
        ReleaseReply,
        cancer=cancers,
        patients=counts,
        events=counts,
        arms=st.dictionaries(arms, arm_scores, **lists),
        routing=st.dictionaries(cancers, probability, **lists),
        zero_shot_choice=st.dictionaries(cancers | st.just("vote"), st.integers(0, 10), **lists),
        reason=st.from_regex(r"\A[a-z0-9 ,.]{0,120}\Z"),
        verdict=verdicts | st.none(),
        voices=st.dictionaries(cancers, voices, **lists),
        few_shot=st.lists(few_shots, **lists).map(tuple),
        seconds=seconds,
    ),
    HeldRequest: of(HeldRequest),
    Failure: of(
        Failure,
        code=st.sampled_from(get_args(messages.Code)),
        site=sites | st.none(),
        reference=st.from_regex(r"\A[0-9a-f]{0,16}\Z"),
    ),
}
any_message = st.one_of(*VALID.values())
relaxed = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def same(one: Message, two: Message) -> bool:
    if type(one) is not type(two):
        return False
    for item in fields(one):
        a, b = getattr(one, item.name), getattr(two, item.name)
        if isinstance(a, np.ndarray):
            if not (isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)):
                return False
        elif a != b or type(a) is not type(b):
            return False
    return True


def sample(kind: type[Message]) -> Message:
    """One valid message of a class, with everything that may be absent present."""
    study = StudyConfig(shape=ExpertShape(dim=4))
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    score = Score(c_index=0.6, se=0.1)
    arm = ArmScore(
        c_index=0.6,
        se=0.1,
        low=0.5,
        high=0.7,
        pairs=30,
        fold_mean=0.6,
        pooled=0.6,
        gain=0.1,
        gain_se=0.1,
        gain_low=-0.1,
        gain_high=0.2,
        against={"self_only": Difference(value=0.1, se=0.1, low=-0.1, high=0.2)},
        c_ipcw=0.6,
        brier=0.2,
        auc=(0.6, None, 0.7),
        d_calibration=0.5,
        log_rank=0.01,
        cost=Cost(seconds=1.0, megabytes=2.0, gflop=3.0, received=4.0, sent=5.0),
    )
    count = CohortCount(cancer=Cancer.UVM, patients=80, events=21, dim=4)
    source = (Cancer.UVM, Cancer.BRCA)
    card = Signed(card='{"cancer":"UVM"}', signature="ab" * 64)
    values: dict[str, Any] = {
        "task": "t/1",
        "study": study,
        "cancer": Cancer.UVM,
        "site": "site-1",
        "cohorts": (count,),
        "versions": {"torch": "2.6"},
        "round": 1,
        "shared": True,
        "weights": w,
        "signed": card if kind in (ExpertRequest, ExpertReply) else (card, card),
        "own": w,
        "own_signed": card,
        "routers": w,
        "patients": 80,
        "events": 21,
        "score": score,
        "seconds": 1.5,
        "sources": source,
        "scores": (SourceScore(c_index=0.6, se=0.1, lead=0.1, lead_se=0.1),) * 2,
        "training_scores": ((score, score),),
        "arms": {"local": arm},
        "routing": {Cancer.UVM: 1.0},
        "zero_shot_choice": {"vote": 3},
        "reason": "fine",
        "everyone": w,
        "verdict": Verdict(share=0.5, candidates={"stack": 3}, gain=0.02),
        "voices": {Cancer.UVM: Voice(weight=0.5, weight_sd=0.1, cost=0.01, silent=1, contrary=2)},
        "few_shot": (Shots(patients=20, arms={"auto": (0.6, 0.7)}),),
        "code": "data",
        "reference": "0a1b2c3d",
        "fewest": Fewest(patients=48, events=12),
    }
    return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})


def refused(text: str, packed: dict[str, Any], expected: tuple[type[Message], ...] = EVERY) -> str:
    with pytest.raises(MessageError) as caught:
        unpack(text, packed, expected=expected)
    assert SECRET not in str(caught.value)
    assert len(str(caught.value)) < 200
    return str(caught.value)


def edited(message: Message, **changes: Any) -> tuple[str, dict[str, Any]]:
    """Return the packed message with other values."""
    text, packed = pack(message)
    whole = json.loads(text)
    whole["values"].update(changes)
    return json.dumps(whole), packed


# What may travel


def test_every_class_is_tested_here() -> None:
    assert set(VALID) == set(EVERY)


ALLOWED: dict[type, set[str]] = {
    DescribeRequest: {"task", "protocol", "study"},
    DescribeReply: {"task", "protocol", "site", "cohorts", "versions"},
    ExpertRequest: {
        *("task", "protocol", "study", "cancer", "round", "shared", "weights", "signed"),
    },
    ExpertReply: {
        *("task", "protocol", "cancer", "patients", "events", "weights", "score", "seconds"),
        *("signed", "fewest"),
    },
    TransferRequest: {"task", "protocol", "study", "cancer", "sources", "weights", "signed"},
    TransferReply: {
        *("task", "protocol", "cancer", "patients", "events"),
        *("scores", "training_scores", "seconds", "fewest"),
    },
    RouterRequest: {
        *("task", "protocol", "study", "cancer", "round", "shared", "sources"),
        *("weights", "signed", "own", "own_signed", "routers"),
    },
    Signed: {"card", "signature"},
    Fewest: {"patients", "events"},
    RouterReply: {
        *("task", "protocol", "cancer", "patients", "events", "weights", "seconds", "fewest"),
    },
    FedAvgRequest: {"task", "protocol", "study", "cancer", "round", "weights"},
    FedAvgReply: {
        *("task", "protocol", "cancer", "patients", "events", "weights", "seconds", "fewest"),
    },
    ReleaseRequest: {"task", "protocol", "study", "cancer", "routers", "everyone"},
    ReleaseReply: {
        *("task", "protocol", "cancer", "patients", "events", "arms", "routing"),
        *("zero_shot_choice", "reason", "seconds", "verdict", "voices", "few_shot"),
    },
    HeldRequest: {"task", "protocol"},
    Failure: {"task", "protocol", "code", "site", "reference"},
    CohortCount: {"cancer", "patients", "events", "dim"},
    Score: {"c_index", "se"},
    SourceScore: {"c_index", "se", "lead", "lead_se"},
    Difference: {"value", "se", "low", "high"},
    Cost: {"seconds", "megabytes", "gflop", "received", "sent"},
    Voice: {"weight", "weight_sd", "cost", "silent", "contrary"},
    Verdict: {"share", "candidates", "gain"},
    Shots: {"patients", "arms"},
    ArmScore: {
        *("c_index", "se", "low", "high", "pairs", "fold_mean", "pooled"),
        *("gain", "gain_se", "gain_low", "gain_high", "against", "c_ipcw", "brier", "auc"),
        *("d_calibration", "log_rank", "cost"),
    },
    StudyConfig: {
        *(
            "purpose",
            "encoder",
            "endpoint",
            "seed",
            "folds",
            "split",
            "rounds",
            "initial_hazard",
            "source",
        ),
        *("max_sources", "arms", "fedavg_rounds", "shots", "draws", "shape", "training", "router"),
    },
    ExpertShape: {"dim", "embed", "attention", "bins"},
    TrainingConfig: {
        *("epochs", "minimum_updates", "learning_rate", "weight_decay", "warmup_epochs", "batch"),
        *("drop_last", "dropout", "alpha", "loss", "standardise"),
    },
    RouterConfig: {
        *("epochs", "minimum_updates", "learning_rate", "weight_decay", "warmup_epochs", "batch"),
        *("drop_last", "top_k", "keep_own", "renormalise", "balance", "balance_weight", "z_weight"),
        *("self_features", "prior", "prior_strength", "warm_start"),
    },
}
"""A new field is a decision about what may leave a hospital: make it here as well."""


def leaves(hint: Any, notes: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield every plain type inside a type hint, with the annotations around it."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *more = get_args(hint)
        yield from leaves(inner, tuple(more))
    elif origin is None or origin in (Literal, np.ndarray, ClassVar):
        yield hint, notes
    else:
        for inner in get_args(hint):
            if inner is not Ellipsis:
                yield from leaves(inner, notes)


def classes(kinds: tuple[type, ...]) -> set[type]:
    """Return these dataclasses and all they are made of."""
    found: set[type] = set()
    waiting = list(kinds)
    while waiting:
        kind = waiting.pop()
        found.add(kind)
        for hint in get_type_hints(kind, include_extras=True).values():
            waiting += [leaf for leaf, _ in leaves(hint) if is_dataclass(leaf)]
    return found


def test_every_field_that_travels_was_decided_on() -> None:
    assert {kind: {f.name for f in fields(kind)} for kind in classes(EVERY)} == ALLOWED


def test_no_text_travels_without_bounds() -> None:
    seen = 0
    for kind in classes(EVERY):
        hints = get_type_hints(kind, include_extras=True)
        for item in fields(kind):
            for leaf, notes in leaves(hints[item.name]):
                known = leaf in (int, float, bool, str, type(None)) or is_dataclass(leaf)
                closed = isinstance(leaf, type) and issubclass(leaf, Enum)
                assert known or closed or get_origin(leaf) in (Literal, np.ndarray), (kind, leaf)
                if leaf is str:
                    seen += 1
                    bounds = [note for note in notes if isinstance(note, StringConstraints)]
                    assert any(b.pattern or b.max_length for b in bounds), (kind, item.name)
    assert seen >= 6


# There and back


@relaxed
@given(message=any_message)
def test_a_message_round_trips(message: Message) -> None:
    text, packed = pack(message)
    assert text.isascii()
    assert all(array.ndim == 1 and array.dtype == np.float32 for array in packed.values())
    assert same(unpack(text, packed, expected=(type(message),)), message)
    assert pack(unpack(text, packed, expected=EVERY))[0] == text


@pytest.mark.parametrize("kind", EVERY)
def test_a_file_round_trips(tmp_path: Path, kind) -> None:
    message = sample(kind)
    save(message, tmp_path / "a" / "message.npz")
    assert same(load(tmp_path / "a" / "message.npz", expected=(kind,)), message)
    others = tuple(other for other in EVERY if other is not kind)
    with pytest.raises(MessageError, match=f"{kind.__name__} is not expected here"):
        load(tmp_path / "a" / "message.npz", expected=others)


def test_a_file_is_not_larger_than_it_looks(tmp_path: Path) -> None:
    path = tmp_path / "message.npz"
    np.savez_compressed(path, text=np.array("x"), weights=np.zeros(1 << 22, dtype=np.float32))
    with pytest.raises(MessageError):
        load(path, expected=EVERY)
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)}
    )
    with ZipFile(path, "w") as stored:
        stored.writestr("text.npy", head.getvalue())
    tracemalloc.start()
    with pytest.raises(MessageError):
        load(path, expected=EVERY)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize("make", ["text", "npy", "object", "empty", "cut", "zip"])
def test_another_file_is_refused(tmp_path: Path, make) -> None:
    path = tmp_path / "message.npz"
    save(sample(ExpertReply), path)
    whole = path.read_bytes()
    if make == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif make == "object":
        np.savez(path, text=np.array("x"), weights=np.array([{"a": 1}], dtype=object))
    elif make == "zip":
        np.savez(path, other=np.zeros(3))
    else:
        path.write_bytes({"text": b"no", "empty": b"", "cut": whole[:-40]}[make])
    with pytest.raises(MessageError):
        load(path, expected=EVERY)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.npz", expected=EVERY)


# What is refused


@pytest.mark.parametrize("kind", EVERY)
def test_an_unknown_key_is_refused_and_not_repeated(kind) -> None:
    message = sample(kind)
    assert "unknown field" in refused(*edited(message, **{SECRET: 1}))
    for name, value in json.loads(pack(message)[0])["values"].items():
        if isinstance(value, dict):  # the keys inside a field are as strict
            said = refused(*edited(message, **{name: value | {SECRET: SECRET}}))
            assert f"field {name} " in said


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("wrong", [[[SECRET]], {SECRET: {}}, SECRET + "\n", 1e300, -5, True])
def test_a_value_of_another_type_is_refused_by_field(kind, wrong) -> None:
    message = sample(kind)
    for name in json.loads(pack(message)[0])["values"]:
        if name == "shared" and wrong is True:
            continue
        said = refused(*edited(message, **{name: wrong}))
        assert said == f"{kind.__name__}: field {name} is not as agreed."


@pytest.mark.parametrize("kind", EVERY)
def test_every_number_is_finite_and_bounded(kind) -> None:
    text, packed = pack(sample(kind))

    def numbers(node, path=()):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            if isinstance(value, dict | list):
                yield from numbers(value, (*path, key))
            elif isinstance(value, int | float) and not isinstance(value, bool):
                yield (*path, key)

    for path in numbers(json.loads(text)["values"]):
        for wrong in (float("nan"), float("inf"), float("-inf"), -2):
            whole = json.loads(text)
            node = whole["values"]
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = wrong
            refused(json.dumps(whole), packed)


@pytest.mark.parametrize("kind", EVERY)
def test_a_missing_field_is_named(kind) -> None:
    text, packed = pack(sample(kind))
    whole = json.loads(text)
    del whole["values"]["task"]
    assert refused(json.dumps(whole), packed) == f"{kind.__name__}: field task is not as agreed."


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_array_that_is_not_finite_is_refused(value) -> None:
    text, packed = pack(sample(ExpertReply))
    packed["weights"] = packed["weights"].copy()
    packed["weights"][3] = value
    assert "not finite" in refused(text, packed)


@pytest.mark.parametrize(
    "shape",
    [
        *([1, 7], [6], [1, 2, 3], [0, 6], [-2, -3], [2.0, 3], [True, 6], "23", None, SECRET),
        *([1 << 40, 1 << 40], [1 << 29, 2], [6, SECRET], {"0": 2, "1": 3}, []),
    ],
)
def test_a_wrong_shape_is_refused_before_anything_is_made(shape) -> None:
    text, packed = pack(sample(ExpertReply))
    whole = json.loads(text)
    whole["shapes"]["weights"] = shape
    assert "ExpertReply.weights: " in refused(json.dumps(whole), packed)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, ">f4"])
def test_an_array_of_another_type_is_refused(dtype) -> None:
    text, packed = pack(sample(ExpertReply))
    refused(text, {"weights": packed["weights"].astype(dtype)})
    refused(text, {"weights": packed["weights"].reshape(2, 3)})


def test_arrays_and_their_declarations_must_match() -> None:
    text, packed = pack(sample(ExpertReply))
    refused(text, {})
    refused(text, {**packed, SECRET: packed["weights"]})
    whole = json.loads(text)
    whole["shapes"][SECRET] = [2, 3]
    refused(json.dumps(whole), {**packed, SECRET: packed["weights"]})
    whole = json.loads(text)
    whole["values"]["weights"] = None  # both as value and as array
    refused(json.dumps(whole), packed)
    whole["values"]["weights"] = [[1.0]]  # a list instead of an array
    whole["shapes"] = {}
    refused(json.dumps(whole), {})


def test_a_number_does_not_come_as_an_array() -> None:
    text, packed = pack(sample(ExpertReply))
    whole = json.loads(text)
    del whole["values"]["seconds"]
    whole["shapes"]["seconds"] = [1, 1]
    refused(json.dumps(whole), {**packed, "seconds": np.ones(1, dtype=np.float32)})


def test_a_message_s_arrays_together_are_bounded(monkeypatch) -> None:
    text, packed = pack(sample(RouterRequest))
    monkeypatch.setattr(messages, "MAX_WEIGHTS", 17)
    assert "more than 17 values" in refused(text, packed)
    monkeypatch.setattr(messages, "MAX_WEIGHTS", 18)
    unpack(text, packed, expected=EVERY)


def test_a_long_text_is_refused_unread() -> None:
    text, packed = pack(sample(Failure))
    assert len(text + " " * 1000) < messages.MAX_TEXT
    unpack(text + " " * 1000, packed, expected=EVERY)
    assert "characters" in refused(text + " " * messages.MAX_TEXT, packed)


@pytest.mark.parametrize("kind", EVERY)
def test_another_class_than_expected_is_refused(kind) -> None:
    text, packed = pack(sample(kind))
    refused(text, packed, expected=tuple(other for other in EVERY if other is not kind))
    whole = json.loads(text)
    whole["message"] = SECRET
    refused(json.dumps(whole), packed)


@pytest.mark.parametrize("task", ["", "../x", "/x", "a b", "a\n", "é", "x" * 201, "a\x00"])
def test_a_task_id_is_plain(task) -> None:
    refused(*edited(sample(Failure), task=task))


def test_a_failure_carries_no_text() -> None:
    for name in ("code", "site", "reference"):
        refused(*edited(sample(Failure), **{name: f"{SECRET} /data/slides"}))


@pytest.mark.parametrize("wrong", ["80", 80.0, "80.0", "", True])
def test_a_number_is_a_number_of_its_own_type(wrong) -> None:
    assert refused(*edited(sample(ExpertReply), patients=wrong)).endswith(
        "field patients is not as agreed."
    )


def test_settings_are_read_as_strictly() -> None:
    study = json.loads(pack(sample(ExpertRequest))[0])["values"]["study"]
    for change in ({"seed": "3"}, {"folds": 5.0}, {"initial_hazard": "0.06"}, {"shape": []}):
        refused(*edited(sample(ExpertRequest), study=study | change))
    text, packed = edited(sample(ExpertRequest), study=study | {"initial_hazard": None})
    unpack(text, packed, expected=EVERY)
    del study["rounds"]  # an older coordinator's may lack a setting
    unpack(*edited(sample(ExpertRequest), study=study), expected=EVERY)


def test_a_key_comes_once_and_values_are_an_object() -> None:
    text, packed = pack(sample(Failure))
    refused(text.replace('"code":"data"', '"code":"data","code":"data"'), packed)
    refused(text[:-1] + ',"shapes":{}}', packed)
    whole = json.loads(text)
    refused(json.dumps(whole | {"values": list(whole["values"].items())}), packed)
    refused(json.dumps(whole | {"more": 1}), packed)


# Whatever comes

WORDS = ["message", "values", "shapes", "task", "study", "UVM", "a/b", "\x00", "\ud800", "é", ""]
WORDS += [kind.__name__ for kind in EVERY] + [SECRET]
NUMBERS = [0, 1, -1, 3, 1 << 64, 10**400, 0.5, 1e308, float("nan"), float("inf"), -0.0]


def any_json(seed: int) -> Any:
    """Draw a JSON value: hypothesis does the same with better taste, ten times slower."""
    rng = random.Random(seed)

    def value(depth: int) -> Any:
        kind = rng.randrange(5 if depth else 3)
        if kind == 0:
            return rng.choice([None, True, False])
        if kind == 1:
            return rng.choice(NUMBERS)
        if kind == 2:
            return rng.choice(WORDS) * rng.choice([1, 1, 300])
        if kind == 3:
            return [value(depth - 1) for _ in range(rng.randrange(4))]
        return {rng.choice(WORDS): value(depth - 1) for _ in range(rng.randrange(4))}

    return value(4)


anything = st.integers(0, 1 << 40).map(any_json)


@settings(max_examples=700, deadline=None)
@given(text=st.text() | anything.map(json.dumps))
def test_any_text_is_refused(text: str) -> None:
    refused(text, {})


@settings(max_examples=500, deadline=None)
@given(
    name=st.sampled_from([kind.__name__ for kind in EVERY]) | anything,
    values=anything,
    shapes=anything,
)
def test_any_values_are_refused(name, values, shapes) -> None:
    refused(json.dumps({"message": name, "values": values, "shapes": shapes}), {})


@settings(max_examples=800, deadline=None)
@given(kind=st.sampled_from(EVERY), seed=st.integers(0, 1 << 30), planted=anything)
def test_a_damaged_message_is_read_within_bounds_or_refused(kind, seed, planted) -> None:
    text, packed = pack(sample(kind))
    whole, rng = json.loads(text), random.Random(seed)
    node: Any = whole
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        inner = node[key]
        if not (isinstance(inner, dict | list) and inner) or rng.random() < 0.2:
            break
        node = inner
    node[key] = planted
    try:
        read = unpack(json.dumps(whole), packed, expected=EVERY)
    except MessageError:
        refused(json.dumps(whole), packed)
    else:
        again = pack(read)  # what was accepted is a message like any other
        assert same(unpack(*again, expected=EVERY), read)


@pytest.mark.parametrize("text", ["[" * 99_999, '{"a":' * 50_000, "1" * 99_999, '"\\ud800"', "NaN"])
def test_texts_that_break_parsers(text) -> None:
    refused(text, {})
    wrapped = f'{{"message":"Failure","values":{{"task":{text}}},"shapes":{{}}}}'
    refused(wrapped, {})
