import json
from base64 import urlsafe_b64encode
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cropkt.errors import MessageError
from cropkt.invite import PREFIX, Invite, _check, decode_invite, encode_invite

INVITE = Invite(
    host="coordinator.example.org:9443",
    ca="0f" * 32,
    token="A" * 40 + "b-_",
    site="north-clinic",
    study="rare-2026",
)


def encoded(values: Any) -> str:
    """Return any JSON value as a line whose check fits."""
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    body = urlsafe_b64encode(text).decode().rstrip("=")
    return f"{PREFIX}{body}.{_check(body)}"


def test_reads_what_it_wrote() -> None:
    line = encode_invite(INVITE)
    assert decode_invite(line) == INVITE
    assert "\n" not in line
    assert INVITE.url == "https://coordinator.example.org:9443"
    assert (INVITE.hostname, INVITE.port) == ("coordinator.example.org", 9443)
    assert INVITE.token not in repr(INVITE)


@pytest.mark.parametrize("host", ["127.0.0.1:1", "[::1]:65535", "a:9"])
def test_hosts(host: str) -> None:
    invite = replace(INVITE, host=host)
    assert decode_invite(encode_invite(invite)) == invite
    assert invite.hostname == host.rsplit(":", 1)[0].strip("[]")


@pytest.mark.parametrize("host", ["a", "a:0", "a:65536", "a b:1", "::1:5", "a/b:1", "-a:1", ":1"])
def test_refuses_hosts(host: str) -> None:
    with pytest.raises(ValidationError):
        replace(INVITE, host=host)


def test_a_wrapped_paste_is_one_line() -> None:
    line = encode_invite(INVITE)
    assert decode_invite(f"  {line[:60]}\r\n{line[60:]}\n") == INVITE


@given(st.integers(min_value=len(PREFIX)))
def test_a_truncated_paste_is_named(cut: int) -> None:
    line = encode_invite(INVITE)
    part = line[: min(cut, len(line) - 1)]
    with pytest.raises(MessageError, match="cut short"):
        decode_invite(part)


@given(data=st.data())
def test_one_other_character_is_found(data: st.DataObject) -> None:
    line = encode_invite(INVITE)
    at = data.draw(st.integers(0, len(line) - 1))
    other = data.draw(st.characters(exclude_characters=line[at], exclude_categories=["Z", "C"]))
    with pytest.raises(MessageError):
        decode_invite(line[:at] + other + line[at + 1 :])


@given(st.text())
def test_any_text_is_refused(text: str) -> None:
    with pytest.raises(MessageError):
        decode_invite(PREFIX + text)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"host": "coordinator"}, "host"),
        ({"ca": "0F" * 32}, "ca"),
        ({"token": "short"}, "token"),
        ({"site": "../x"}, "site"),
        ({"study": 3}, "study"),
        ({"more": 1}, "more"),
    ],
)
def test_values_are_checked_and_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(MessageError, match=f"altered: {named} ") as caught:
        decode_invite(encoded(asdict(INVITE) | change))
    assert INVITE.token not in str(caught.value)


def test_refuses_other_forms_of_the_same() -> None:
    with pytest.raises(MessageError, match="one form"):
        decode_invite(encoded(dict(reversed(asdict(INVITE).items()))))


@pytest.mark.parametrize("content", [b"\xff", b"[" * 1000, b"null", b"[]", b"{}", b"NaN"])
def test_refuses_other_content(content: bytes) -> None:
    with pytest.raises(MessageError, match="altered"):
        decode_invite(encoded(content))


def test_refuses_what_is_too_long() -> None:
    with pytest.raises(MessageError, match="altered"):
        decode_invite(encoded({"host": "a" * 3000}))
    with pytest.raises(MessageError):
        decode_invite(PREFIX + "A" * 100_000_000)
