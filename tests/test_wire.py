from __future__ import annotations

import io
import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from cropkt import wire
from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.errors import MessageError
from cropkt.messages import (
    REPLIES,
    REQUESTS,
    ExpertReply,
    Failure,
    RouterRequest,
    Score,
)
from cropkt.wire import LARGE, from_record, to_record

EVERY = REQUESTS + REPLIES
SECRET = "SECRETVALUE"
WEIGHTS = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def reply() -> ExpertReply:
    return ExpertReply(
        task="fit/UVM/1",
        cancer=Cancer.UVM,
        patients=80,
        events=21,
        weights=WEIGHTS,
        score=Score(c_index=0.6, se=0.1),
        seconds=2.0,
    )


def with_array(record: RecordDict, data: bytes, name: str = "weights") -> RecordDict:
    array = Array(dtype="float32", shape=(6,), stype="numpy.ndarray", data=data)
    record["weights"] = ArrayRecord({name: array})
    return record


def npy(array: np.ndarray, **kwargs) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, **kwargs)
    return stream.getvalue()


def refused(record: RecordDict) -> str:
    with pytest.raises(MessageError) as caught:
        from_record(record, expected=EVERY)
    assert SECRET not in str(caught.value)
    return str(caught.value)


def test_a_message_crosses_flower(reply) -> None:
    back = from_record(to_record(reply), expected=(ExpertReply,))
    assert isinstance(back, ExpertReply)
    assert np.array_equal(back.weights, WEIGHTS)
    assert (back.task, back.score, back.cancer) == (reply.task, reply.score, reply.cancer)


def test_all_arrays_and_none_cross_flower() -> None:
    sources = (Cancer.BRCA, Cancer.LUNG)
    request = RouterRequest(
        task="t",
        study=StudyConfig(),
        cancer=Cancer.UVM,
        sources=sources,
        weights=WEIGHTS,
        own=WEIGHTS + 1,
        routers=None,
    )
    back = from_record(to_record(request), expected=(RouterRequest,))
    assert isinstance(back, RouterRequest)
    assert np.array_equal(back.own, WEIGHTS + 1)
    assert back.routers is None
    assert back.study == request.study
    failure = Failure(task="t", code="data")
    assert from_record(to_record(failure), expected=EVERY) == failure


def test_large_rows_travel_as_parts_of_their_own(reply) -> None:
    """So that Flower, which names what it keeps by content, keeps an expert once."""
    rows = np.random.default_rng(0).normal(size=(12, LARGE // 4)).astype(np.float32)
    record = to_record(replace(reply, weights=rows))
    other = to_record(replace(reply, weights=rows[3:5]))
    parts, others = record["weights"], other["weights"]
    assert sorted(parts) == [f"weights.{number:05d}" for number in range(12)]
    assert [others[name].object_id for name in sorted(others)] == [
        parts[f"weights.{number:05d}"].object_id for number in (3, 4)
    ]
    back = from_record(record, expected=EVERY)
    assert isinstance(back, ExpertReply)
    assert np.array_equal(back.weights, rows)
    assert sorted(to_record(replace(reply, weights=rows[:, 1:]))["weights"]) == ["weights"]


def test_parts_that_do_not_fit_are_refused(reply) -> None:
    part = Array(WEIGHTS.reshape(-1)[:3])
    for names in (
        ("weights.00000", "weights.00002"),
        ("weights.00001", "weights.00002"),
        ("weights.0", "weights.1"),
        ("weights", "weights.00000"),
        ("weights.00000", f"{SECRET}.00000"),
        ("weights.00000", "weights.00001", "weights.00002"),
    ):
        record = to_record(reply)
        record["weights"] = ArrayRecord(dict.fromkeys(names, part))
        refused(record)


def test_views_and_other_orders_cross_as_they_look(reply) -> None:
    turned = np.asfortranarray(np.arange(12.0, dtype=np.float32).reshape(3, 4))[:, ::2]
    back = from_record(to_record(replace(reply, weights=turned)), expected=EVERY)
    assert isinstance(back, ExpertReply)
    assert np.array_equal(back.weights, turned)


def test_another_record_is_refused(reply) -> None:
    good = to_record(reply)
    text, weights = good["message"], good["weights"]
    for parts in (
        {},
        {"message": text},
        {"weights": weights},
        {"message": weights, "weights": text},
        {"message": text, "weights": weights, SECRET: ConfigRecord()},
        {"message": text, "weights": MetricRecord({"a": 1})},
        {"message": ConfigRecord({"json": "{}", SECRET: 1}), "weights": weights},
        {"message": ConfigRecord({"json": b"{}"}), "weights": weights},
        {"message": ConfigRecord({"json": 3}), "weights": weights},
        {"message": ConfigRecord({"text": "{}"}), "weights": weights},
    ):
        assert "not a cropkt record" in refused(RecordDict(parts))


def test_an_array_without_declaration_is_refused(reply) -> None:
    record = to_record(reply)
    refused(with_array(record, npy(WEIGHTS.reshape(-1)), name=SECRET))
    record["weights"] = ArrayRecord({})
    refused(record)


HUGE = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }"


def claim(size: bytes) -> bytes:
    head = HUGE % size
    return head + b" " * (10 + ord("v") - len(head) - 1) + b"\n" + WEIGHTS.tobytes()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(data, id=name)
        for name, data in {
            "pickled": npy(np.array([SECRET, None], dtype=object), allow_pickle=True),
            "float64": npy(np.arange(6.0)),
            "int32": npy(np.arange(6, dtype=np.int32)),
            "big endian": npy(np.arange(6, dtype=">f4")),
            "structured": npy(np.zeros(6, dtype=[("a", "<f4")])),
            "matrix": npy(WEIGHTS),
            "scalar": npy(np.float32(1)),
            "version 2": npy(WEIGHTS.reshape(-1), version=(2, 0)),
            "version 3": npy(WEIGHTS.reshape(-1), version=(3, 0)),
            "cut": npy(WEIGHTS.reshape(-1))[:-1],
            "longer by a byte": npy(WEIGHTS.reshape(-1)) + b"!",
            "longer by a value": npy(WEIGHTS.reshape(-1)) + b"!!!!",
            "empty": b"",
            "no npy": b"PK\x03\x04",
            "head only": npy(WEIGHTS.reshape(-1))[:40],
            "huge": claim(b"999999999"),
            "beyond bounds": claim(b"9999999999"),
            "endless number": claim(b"9" * 30),
            "negative": claim(b"-6"),
            "code": b"\x93NUMPY\x01\x00v\x00" + b"__import__('os')".ljust(117) + b"\n",
            "unclosed": b"\x93NUMPY\x01\x00v\x00" + b"{'descr': (".ljust(117) + b"\n",
            "deep": b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65_535,
        }.items()
    ],
)
def test_no_other_npy_is_read(reply, data) -> None:
    record = with_array(to_record(reply), data)
    tracemalloc.start()
    said = refused(record)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "an array " in said
    assert peak < 1_000_000  # nothing of the claimed size is made


def test_the_claims_differ_from_an_honest_one_only_in_size(reply) -> None:
    record = with_array(to_record(reply), claim(b"6"))
    back = from_record(record, expected=EVERY)
    assert isinstance(back, ExpertReply)
    assert np.array_equal(back.weights, WEIGHTS)


def test_a_message_declares_the_size_of_its_arrays(reply) -> None:
    record = to_record(reply)
    for shape in ([2, 4], [1 << 40, 1 << 40], [6], [3, 2, 1]):
        whole = json.loads(record.config_records["message"]["json"])
        whole["shapes"]["weights"] = shape
        record["message"] = ConfigRecord({"json": json.dumps(whole)})
        refused(record)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 151), byte=st.integers(0, 255))
def test_a_damaged_array_is_read_or_refused(at: int, byte: int) -> None:
    data = bytearray(npy(WEIGHTS.reshape(-1)))
    data[at] = byte
    array = Array(dtype="float32", shape=(6,), stype="numpy.ndarray", data=bytes(data))
    try:
        values = wire._flat(array)
    except MessageError:
        return
    assert values.shape == (6,)
    assert values.dtype == np.float32
    assert np.array_equal(values, np.load(io.BytesIO(data)), equal_nan=True)


def test_array_bounds_hold_before_the_size_is_compared(reply, monkeypatch) -> None:
    monkeypatch.setattr(wire, "MAX_WEIGHTS", 5)
    assert "claims more than 5 values" in refused(to_record(reply))
