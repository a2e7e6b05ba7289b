"""How a site becomes a member: the coordinator's answer to `POST /v1/cropkt/enrol`.

The site sends its invite's token and two public keys; the private ones never leave it. Every
refusal has one code for the program on the other side and one sentence for its reader.
"""

from __future__ import annotations

import base64
import binascii
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Annotated, Any, Protocol

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)
from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

import cropkt
from cropkt.bundle import bundle_hash
from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.invite import Invite, Token
from cropkt.knock import VALID, Knock
from cropkt.messages import PROTOCOL, SiteName, Version
from cropkt.versions import together
from cropkt_server.pki import Keys
from cropkt_server.roster import EnrolledSite, EnrolmentRefusedError, Roster

log = logging.getLogger("cropkt.server")


class Nodes(Protocol):
    """What Flower's side must do for the roster."""

    def register(self, node_key: str, name: str) -> int:
        """Make a node known by its PEM public key; return its id."""

    def deregister(self, node_id: int) -> None:
        """Cut a node off."""


@checked_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class EnrolRequest:
    """The body of the request."""

    token: str
    site: SiteName
    node_key: Annotated[str, StringConstraints(max_length=2_000)]  # OpenSSH
    signing_key: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{43}=$")]
    cropkt: Version
    protocol: Annotated[int, Field(ge=0, le=10_000)]
    flwr: Version


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolment:
    """Makes invites and takes them back."""

    study: str
    host: str  # "name:port", as sites reach it
    keys: Keys
    roster: Roster
    closed: threading.Event = field(default_factory=threading.Event)  # the study is over
    revoked: Callable[[], Iterable[str]] = tuple  # hashes of experts, as of now
    config: StudyConfig | None = None  # what the sites are asked to do

    def invite(self, site: str, cancers: Sequence[Cancer], expires: float) -> Invite:
        """Return a new invite, valid until `expires` (seconds since 1970) for one enrolment."""
        token = self.roster.invite(site, cancers, expires)
        return Invite(
            host=self.host,
            ca=self.keys.fingerprint(),
            token=token,
            site=site,
            study=self.study,
        )

    def hello(self) -> dict[str, Any]:
        """Return what anyone may know: study, versions, time, what is revoked or over."""
        return {
            "study": self.study,
            "cropkt": cropkt.__version__,
            "protocol": PROTOCOL,
            "flwr": version("flwr"),
            "bundle": bundle_hash(),
            "time": int(time.time()),
            "closed": self.closed.is_set(),
            "revoked": sorted(self.revoked()),
        }

    def accept(self, body: bytes, nodes: Nodes) -> dict[str, Any]:
        """Enrol the site that sent `body`; return the answer.

        Raises:
            EnrolmentRefusedError: with its code.
        """
        try:
            request = TypeAdapter(EnrolRequest).validate_json(body)
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"][:1]) or "the body"
            message = f"The request is not as agreed: {where}."
            raise EnrolmentRefusedError("malformed", message) from None
        _check_versions(request)
        try:
            TypeAdapter(Token).validate_python(request.token)
        except ValidationError:
            raise EnrolmentRefusedError("altered", "The invite's token was altered.") from None
        site, before = self.roster.enrol(
            token=request.token,
            site=request.site,
            node_key=_node_key(request.node_key),
            signing_key=_signing_key(request.signing_key),
            register=nodes.register,
        )
        if before is not None and before != site.node_id:
            nodes.deregister(before)
        log.info("%s enrolled (%s)", site.name, " ".join(site.cancers))
        return self._answer(site)

    def known(self, body: bytes) -> dict[str, Any]:
        """Return what the enrolled site that signed the knock in `body` may know.

        Raises:
            EnrolmentRefusedError: with its code.
        """
        try:
            knock = TypeAdapter(Knock).validate_json(body)
            found = self.roster.site_of_key(pem_of(knock.node_key))
        except (ValidationError, ValueError):
            message = "The knock is not as agreed."
            raise EnrolmentRefusedError("malformed", message) from None
        sites = {site.name: site for site in self.roster.sites()}
        if found is None or found[0] != knock.site or knock.study != self.study:
            raise EnrolmentRefusedError("unknown", "The coordinator knows no such site and key.")
        site = sites[knock.site]
        if not knock.signed_by(site.signing_key):
            message = "The site enrolled with another signing key."
            raise EnrolmentRefusedError("unknown", message)
        if found[1]:
            raise EnrolmentRefusedError("revoked", "The coordinator cut this site off.")
        if abs(time.time() - knock.at) > VALID:
            raise EnrolmentRefusedError("expired", "The knock is not of now.")
        return {
            "site": site.name,
            "cancers": list(site.cancers),
            "config": None if self.config is None else asdict(self.config),
        }

    def _answer(self, site: EnrolledSite) -> dict[str, Any]:
        return {
            "study": self.study,
            "site": site.name,
            "cancers": list(site.cancers),
            "coordinator_key": base64.b64encode(self.keys.signing_public_bytes()).decode(),
            "bundle": bundle_hash(),
        }


class Allowance:
    """At most `limit` events a `window` for each key, such as an address."""

    def __init__(
        self, limit: int, window: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit, self._window, self._clock = limit, window, clock
        self._events: dict[str, list[float]] = {}

    def take(self, key: str) -> bool:
        """Return whether one more event is allowed now, and count it if so."""
        since = self._clock() - self._window
        if len(self._events) > 10_000:  # many addresses: forget those that were quiet
            self._events = {k: times for k, times in self._events.items() if times[-1] > since}
        times = [at for at in self._events.get(key, ()) if at > since]
        allowed = len(times) < self._limit
        if allowed:
            times.append(self._clock())
        if times:
            self._events[key] = times
        return allowed


def pem_of(key: str) -> str:
    """Return an OpenSSH EC P-384 public key as the PEM by which Flower knows a node.

    Raises:
        ValueError: it is no such key.
    """
    if not key.startswith("ecdsa-sha2-nistp384 "):  # no other parser meets a stranger's bytes
        raise ValueError("not an OpenSSH key on the curve P-384")
    try:
        public = load_ssh_public_key(key.encode("ascii"))
    except (ValueError, NotImplementedError):  # the latter of a compressed point
        raise ValueError("not an OpenSSH public key") from None
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp384r1":
        raise ValueError("not a key on the curve P-384")
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def _node_key(key: str) -> str:
    try:
        return pem_of(key)
    except ValueError as error:
        raise EnrolmentRefusedError("malformed", f"The node key is {error}.") from None


def _signing_key(key: str) -> str:
    """Return the key in its one base64 form."""
    try:
        raw = base64.b64decode(key, validate=True)
    except binascii.Error:
        raw = b""
    if len(raw) != 32 or base64.b64encode(raw).decode() != key:
        raise EnrolmentRefusedError("malformed", "The signing key is not 32 bytes in base64.")
    return key


def _check_versions(request: EnrolRequest) -> None:
    """Refuse another protocol, or another release series of cropkt or Flower."""
    if request.protocol != PROTOCOL:
        raise EnrolmentRefusedError(
            "version",
            f"The coordinator speaks protocol {PROTOCOL} (cropkt {cropkt.__version__}), the site "
            f"protocol {request.protocol} (cropkt {request.cropkt}): install the same release.",
        )
    both = (
        ("cropkt", cropkt.__version__, request.cropkt),
        ("flwr", version("flwr"), request.flwr),
    )
    for package, ours, theirs in both:
        if not together(ours, theirs):
            raise EnrolmentRefusedError(
                "version",
                f"The coordinator runs {package} {ours}, the site {package} {theirs}: "
                "install the same release.",
            )
