"""Messages as Flower records: the one place of the library that speaks Flower's types."""

from __future__ import annotations

import re

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from cropkt.errors import MessageError
from cropkt.messages import MAX_WEIGHTS, Message, Weights, pack, unpack

_TEXT, _ARRAYS = "message", "weights"
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00(?P<header>..)"
    rb"\{'descr': '<f4', 'fortran_order': False, 'shape': \((?P<size>[0-9]{1,10}),\), \} *\n",
    re.DOTALL,
)
"""The head of the one kind of .npy image that travels: flat float32. Nothing else is parsed."""


def to_record(message: Message) -> RecordDict:
    """Return the message as one config record and one array record."""
    text, arrays = pack(message)
    return RecordDict(
        {
            _TEXT: ConfigRecord({"json": text}),
            _ARRAYS: ArrayRecord({name: Array(array) for name, array in arrays.items()}),
        }
    )


def from_record(record: RecordDict, *, expected: tuple[type[Message], ...]) -> Message:
    """Return the checked message in `record`.

    Raises:
        MessageError: the record holds anything else than one of the expected messages.
    """
    configs, arrays = record.config_records, record.array_records
    if set(record) != {_TEXT, _ARRAYS} or _TEXT not in configs or _ARRAYS not in arrays:
        raise MessageError("message", "not a cropkt record")
    text = configs[_TEXT].get("json")
    if set(configs[_TEXT]) != {"json"} or not isinstance(text, str):
        raise MessageError("message", "not a cropkt record")
    return unpack(
        text, {name: _flat(array) for name, array in arrays[_ARRAYS].items()}, expected=expected
    )


def _flat(array: Array) -> Weights:
    """Return the flat float32 array in a .npy image, whose size is checked before it is made."""
    head = _NPY.match(array.data)
    if head is None or int.from_bytes(head["header"], "little") != head.end() - 10:
        raise MessageError("message", "an array is not flat float32")
    size = int(head["size"])
    if size > MAX_WEIGHTS:
        raise MessageError("message", f"an array claims more than {MAX_WEIGHTS} values")
    if len(array.data) != head.end() + 4 * size:
        raise MessageError("message", "an array is not of its declared size")
    return np.frombuffer(array.data, dtype=np.float32, count=size, offset=head.end())
