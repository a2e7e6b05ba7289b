"""Hostile bytes end in a typed refusal: no crash, no file, no process, no memory to speak of.

`make test` runs 2,000 cases, `make fuzz` as many as CROPKT_FUZZ says, divided among the parsers.
"""

from __future__ import annotations

import json
import os
import re
import resource
import runpy
import sqlite3
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cropkt.errors import MessageError
from cropkt.messages import MAX_TEXT, REPLIES, unpack

CASES = int(os.environ.get("CROPKT_FUZZ", "2000"))
parsers = runpy.run_path(str(Path(__file__).with_name("parsers.py")))["parsers"]
NAMES = [
    *("message", "message", "message", "array", "unreadable", "file", "invite", "card", "expert"),
    *(
        "checkpoint",
        "enrolment",
        "knock",
        "node key",
        "certificate",
        "hello",
        "accepted",
        "refusal",
        "known",
        "record",
    ),
]
"""Messages, which are most of what arrives, get most of the cases."""
GROWTH = 400 << 20  # bytes by which the process may grow over all cases


@pytest.fixture(scope="session")
def reading(folder: Path) -> dict[str, Any]:
    """All parsers, each of which has read something: nothing is left to import."""
    return dict(parsers(folder))


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    before = _resident()
    yield
    assert _resident() - before < GROWTH


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def test_every_parser_has_its_share(reading: dict[str, Any]) -> None:
    assert set(NAMES) == set(reading)


@pytest.mark.parametrize("name", sorted(set(NAMES)))
def test_valid_input_is_taken(
    reading: dict[str, Any], draw: Callable[[int], Any], name: str
) -> None:
    parser = reading[name]
    if name == "certificate":  # no bytes have the fingerprint that the invite made up
        assert not parser(parser.valid(draw(0)))
        return
    for seed in range(30):
        assert parser(parser.valid(draw(seed))), parser.valid(draw(seed))[:500]
        if parser.tree is not None:
            tree = parser.tree(draw(seed))
            assert parser(parser.wrapped(json.dumps(tree, **FORMS.get(name, {})).encode()))


FORMS: dict[str, dict[str, Any]] = {
    name: {"sort_keys": True, "separators": (",", ":")} for name in ("invite", "card")
}


@pytest.mark.parametrize(
    "act",
    [
        lambda path: path.write_bytes(b"a"),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to(path.parent / "old"),
        lambda path: os.close(os.open(path, os.O_CREAT)),
        lambda path: sqlite3.connect(path).close(),
        lambda path: (path.parent / "old").rename(path),
        lambda path: (path.parent / "old").chmod(0o777),
    ],
)
def test_the_watch_sees_whatever_is_done_beyond_the_parsers_folder(
    watch: Any, folder: Path, tmp_path: Path, act: Callable[[Path], object]
) -> None:
    """Beside it and in the temporary folder too; within it all of that may be."""
    own = Path(tempfile.mkdtemp(dir=folder))
    with tempfile.TemporaryDirectory() as temporary:
        for beyond in (tmp_path, Path(temporary)):
            (beyond / "old").touch()
            with pytest.raises(AssertionError, match=re.escape(str(beyond))), watch.over(0):
                act(beyond / "new")
    (own / "old").touch()
    with watch.over(0):
        act(own / "new")


@pytest.mark.parametrize("name", sorted(set(NAMES)))
def test_whatever_comes_is_taken_or_refused(
    reading: dict[str, Any], draw: Callable[[int], Any], watch: Any, name: str
) -> None:
    parser, taken = reading[name], [0]
    parser(parser.valid(draw(0)))
    parser(b"")

    @settings(
        max_examples=max(1, round(CASES * NAMES.count(name) / len(NAMES))),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(seed=st.integers(0, 1 << 63), raw=st.binary(max_size=300) | st.none())
    def cases(seed: int, raw: bytes | None) -> None:
        content = raw if raw is not None and seed % 4 == 0 else _spoilt(parser, draw(seed))
        with watch.over(len(content)):
            taken[0] += parser(content)

    cases()


def _spoilt(parser: Any, drawn: Any) -> bytes:
    if parser.tree is not None and drawn.rng.random() < 0.7:
        text = drawn.spoilt_tree(parser.tree(drawn))
        content: bytes = parser.wrapped(text.encode("utf-8", "surrogatepass"))
        return content
    spoilt: bytes = drawn.spoilt_bytes(parser.valid(drawn))
    return spoilt


@pytest.mark.parametrize("item", ["0", "[]", "{}", '"a"', "null,0"])
@pytest.mark.parametrize("field", ["cohorts", "versions", "site"])
def test_a_text_full_of_small_errors_is_not_listed_error_by_error(item: str, field: str) -> None:
    head = f'{{"message":"DescribeReply","shapes":{{}},"values":{{"task":"a","{field}":['
    text = head + ",".join([item] * ((MAX_TEXT - 200) // (len(item) + 1))) + "]}}"
    tracemalloc.start()
    try:
        with pytest.raises(MessageError, match="items"):
            unpack(text, {}, expected=REPLIES)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
