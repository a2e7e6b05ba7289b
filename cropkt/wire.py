"""Messages as Flower records: the one place of the library that speaks Flower's types."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.app import Message as FlowerMessage

from cropkt.config import MAX_WEIGHTS
from cropkt.errors import MessageError
from cropkt.messages import Message, Weights, pack, unpack

LARGE = 1 << 20  # bytes of a row, from which on an array's rows travel as parts of their own
"""Flower stores a part once, however many sites it goes to; many small parts would be slow."""

_TEXT, _ARRAYS = "message", "weights"
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00(?P<header>..)"
    rb"\{'descr': '<f4', 'fortran_order': False, 'shape': \((?P<size>[0-9]{1,10}),\), \} *\n",
    re.DOTALL,
)
"""The head of the one kind of .npy image that travels: flat float32. Nothing else is parsed."""


@dataclass(frozen=True, slots=True)
class Payload:
    """What a Flower message carries for us, without Flower's envelope."""

    bytes: int
    sha256: str


def payload(message: FlowerMessage) -> Payload:
    """Return size and digest of a message's payload, the same where it is made and received.

    The payload is the JSON text of the message followed by the .npy images of its arrays' parts,
    by name; the text declares the arrays, so that the bytes can be read in one way only. Of a
    Flower error it is code and reason. The parts' names count in the digest and not in the size.

    Raises:
        MessageError: the message carries something else beside.
    """
    size, digest = 0, hashlib.sha256()
    for name, part in _parts(message):
        size += len(part)
        digest.update(name.encode())
        digest.update(part)
    return Payload(size, digest.hexdigest())


def _parts(message: FlowerMessage) -> Iterator[tuple[str, bytes]]:
    """Yield all that a message carries, by name."""
    if message.has_error():
        yield "", f"{message.error.code} {message.error.reason}".encode()
        return
    text, arrays = _contents(message.content)
    yield "", text.encode()
    for name in sorted(arrays):
        array, plain = arrays[name], Array(_flat(arrays[name]))
        if (array.dtype, array.shape, array.stype) != (plain.dtype, plain.shape, plain.stype):
            raise MessageError("message", "an array says of itself what its bytes do not")
        yield name, array.data


def to_record(message: Message) -> RecordDict:
    """Return the message as one config record and one array record."""
    text, arrays = pack(message)
    parts = {
        part: Array(rows)
        for name, array in arrays.items()
        for part, rows in _parted(name, array, rows=len(getattr(message, name)))
    }
    return RecordDict({_TEXT: ConfigRecord({"json": text}), _ARRAYS: ArrayRecord(parts)})


def from_record(record: RecordDict, *, expected: tuple[type[Message], ...]) -> Message:
    """Return the checked message in `record`.

    Raises:
        MessageError: the record holds anything else than one of the expected messages.
    """
    text, arrays = _contents(record)
    return unpack(text, _joined(arrays), expected=expected)


def _contents(record: RecordDict) -> tuple[str, ArrayRecord]:
    """Return the text and the arrays of a record that holds nothing else."""
    configs, arrays = record.config_records, record.array_records
    if set(record) != {_TEXT, _ARRAYS} or _TEXT not in configs or _ARRAYS not in arrays:
        raise MessageError("message", "not a cropkt record")
    text = configs[_TEXT].get("json")
    if set(configs[_TEXT]) != {"json"} or not isinstance(text, str):
        raise MessageError("message", "not a cropkt record")
    return text, arrays[_ARRAYS]


def _parted(name: str, flat: Weights, *, rows: int) -> Iterator[tuple[str, Weights]]:
    """Yield the parts in which an array of so many rows travels, by name."""
    if flat.nbytes < rows * LARGE:
        yield name, flat
        return
    for number, row in enumerate(flat.reshape(rows, -1)):
        yield f"{name}.{number:05d}", row


def _joined(record: ArrayRecord) -> dict[str, Weights]:
    """Return the flat arrays whose parts a record holds."""
    parts: dict[str, list[Weights]] = defaultdict(list)
    for name in sorted(record):
        field, dot, number = name.partition(".")
        if dot and number != f"{len(parts[field]):05d}":
            raise MessageError("message", "a part of an array is missing")
        parts[field].append(_flat(record[name]))
    if sum(part.size for of_field in parts.values() for part in of_field) > MAX_WEIGHTS:
        raise MessageError("message", f"its arrays hold more than {MAX_WEIGHTS} values")
    return {name: np.concatenate(own) if len(own) > 1 else own[0] for name, own in parts.items()}


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
