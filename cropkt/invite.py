"""The invitation that a coordinator hands to a site: one line of text, good for one enrolment.

    cropkt1.<base64url of canonical JSON>.<check>

It says where the coordinator listens, by which certificate authority it is known, for which site
and study the invitation is meant, and the token that is accepted once. The check, eight hex
digits of SHA-256, only finds mistakes in copying; what protects the invitation is its token.
"""

from __future__ import annotations

import hashlib
import json
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as Base64Error
from dataclasses import asdict, field
from typing import Annotated

from pydantic import ConfigDict, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cropkt.errors import MessageError
from cropkt.messages import SiteName

PREFIX = "cropkt1."
MAX_TEXT = 2_000  # characters
_CHECK = 8  # hex digits
_FORM = re.compile(rf"cropkt1\.([A-Za-z0-9_-]+)\.([0-9a-f]{{{_CHECK}}})")
_FIX = "Copy the whole line again, or ask the coordinator for a new invite"

# A name or an IPv4 address, or an IPv6 address in brackets; then the port.
Host = Annotated[
    str,
    StringConstraints(
        pattern=r"^([A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9a-f:.]{2,45}\])"
        r":([1-9][0-9]{0,4})$"
    ),
]
Fingerprint = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Token = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{43}$")]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class Invite:
    """What one invitation says."""

    host: Host  # "name:port"
    ca: Fingerprint  # SHA-256 of the CA certificate's DER
    token: Token = field(repr=False)  # 256 random bits: a secret until it is used
    site: SiteName
    study: SiteName

    def __post_init__(self) -> None:
        if self.port > 65_535:
            raise ValueError("the port is above 65535")

    @property
    def hostname(self) -> str:
        """The coordinator's name or address, without brackets."""
        return self.host.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The coordinator's port."""
        return int(self.host.rpartition(":")[2])

    @property
    def url(self) -> str:
        """Where the coordinator's routes begin."""
        return f"https://{self.host}"


def encode_invite(invite: Invite) -> str:
    """Return the one line that `decode_invite` reads."""
    text = json.dumps(asdict(invite), sort_keys=True, separators=(",", ":"))
    body = urlsafe_b64encode(text.encode()).decode().rstrip("=")
    return f"{PREFIX}{body}.{_check(body)}"


def decode_invite(line: str) -> Invite:
    """Return the invite in a pasted line; spaces and line breaks of the paste do not matter.

    Raises:
        MessageError: not an invite, cut short, or altered. The token is never repeated.
    """
    line = "".join(line[: 2 * MAX_TEXT].split())
    if not line.startswith(PREFIX):
        raise MessageError("invite", f"does not begin with {PREFIX}", _FIX)
    if len(line) > MAX_TEXT:
        raise MessageError("invite", f"was altered: it is longer than {MAX_TEXT} characters", _FIX)
    found = _FORM.fullmatch(line)
    if found is None:
        whole = line.count(".") == 2 and len(line.rpartition(".")[2]) >= _CHECK
        raise MessageError("invite", "was altered" if whole else "was cut short in copying", _FIX)
    body, check = found.groups()
    if check != _check(body):
        raise MessageError("invite", "was altered: its check does not fit", _FIX)
    try:
        text = urlsafe_b64decode(body + "=" * (-len(body) % 4))
        invite = TypeAdapter(Invite).validate_json(text)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"][:1]) or "its content"
        raise MessageError("invite", f"was altered: {where} is not as agreed", _FIX) from None
    except Base64Error:
        raise MessageError("invite", "was altered: it cannot be read", _FIX) from None
    if encode_invite(invite) != line:
        raise MessageError("invite", "was altered: it is not in its one form", _FIX)
    return invite


def _check(body: str) -> str:
    return hashlib.sha256(f"{PREFIX}{body}".encode()).hexdigest()[:_CHECK]
