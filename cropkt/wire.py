"""Messages as Flower records: the one place of the library that speaks Flower's types."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from cropkt.errors import MessageError
from cropkt.messages import MAX_WEIGHTS, Message, Weights, pack, unpack

_TEXT, _ARRAYS = "message", "weights"


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
    stream = BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, EOFError):
        raise MessageError("message", "an array cannot be read") from None
    start = stream.tell()
    if version != (1, 0) or dtype != np.float32 or shape != ((len(array.data) - start) // 4,):
        raise MessageError("message", "an array is not flat float32 of its declared size")
    if shape[0] > MAX_WEIGHTS:
        raise MessageError("message", f"an array holds {shape[0]} values, at most {MAX_WEIGHTS}")
    return np.frombuffer(array.data, dtype=np.float32, count=shape[0], offset=start)
