"""What this site says to the coordinator beside Flower, and why a connection failed.

The only thing that crosses an unverified connection is the CA certificate, and it counts only if
its SHA-256 is the one in the invite. Everything else travels over TLS verified by exactly that CA.
"""

from __future__ import annotations

import hashlib
import json
import ssl
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import Annotated, Any, NamedTuple, TypeVar

import httpx
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

import cropkt
from cropkt.bundle import bundle_hash
from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.errors import (
    CropktError,
    RefusedError,
    RevokedSiteError,
    UnavailableError,
    VersionMismatchError,
)
from cropkt.experts.card import PublicKey, Sha256
from cropkt.invite import Invite
from cropkt.knock import Knock
from cropkt.messages import MAX_ITEMS, PROTOCOL, SiteName, Version
from cropkt.versions import together

MAX_SKEW = 300.0  # seconds; requests are signed with the coordinator's time, but logs are not
NEW_INVITE = "Ask the coordinator for a new invite"
UNKNOWN_NAME = ("this host name is not known", "Check the name, and the DNS of this machine")
_NO_COORDINATOR = "Check that this is the coordinator's host and port, and that it runs"
_SAME_VERSION = "Install the coordinator's version of cropkt"
_MAX_BODY = 1 << 20
_TIMEOUT = httpx.Timeout(20.0, connect=10.0)
_PLAIN = {"Accept-Encoding": "identity"}
_LENIENT = ConfigDict(extra="ignore")  # a newer coordinator may say more

Told = TypeVar("Told")


@dataclass(frozen=True, kw_only=True, config=_LENIENT)
class Hello:
    """What the coordinator says to everybody."""

    study: SiteName
    cropkt: Version
    protocol: Annotated[int, Field(ge=0, le=10_000)]
    flwr: Version
    bundle: Sha256
    time: Annotated[float, Field(ge=0, le=1e11)]  # unix seconds
    closed: bool = False  # the study is over
    revoked: tuple[Sha256, ...] = ()  # experts that are not to be used any more


@dataclass(frozen=True, kw_only=True, config=_LENIENT)
class Accepted:
    """The coordinator's answer to an enrolment."""

    study: SiteName
    site: SiteName
    cancers: tuple[Cancer, ...]
    coordinator_key: PublicKey
    bundle: Sha256  # the only Flower bundle this site answers to


@dataclass(frozen=True, kw_only=True, config=_LENIENT)
class Known:
    """What the coordinator says to a site that shows its keys."""

    site: SiteName
    cancers: tuple[Cancer, ...]
    config: StudyConfig | None = None  # what the study will ask


class Answer(NamedTuple):
    """What came back over a connection."""

    content: bytes
    date: float | None  # its Date header, in unix seconds
    expires: float | None  # the certificate's last second, if it was verified


class Coordinator:
    """The coordinator's own HTTPS routes. Proxy variables are honoured."""

    def __init__(self, host: str, ca_pem: bytes | None) -> None:
        """Pin the CA; None verifies nothing, which is for fetching the CA alone."""
        self._host = host
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if ca_pem is None:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        else:
            context.load_verify_locations(cadata=ca_pem.decode("ascii"))
        self._verify = context

    @classmethod
    def pinned(cls, invite: Invite) -> tuple[Coordinator, bytes]:
        """Return the coordinator of an invite, and the PEM of its CA.

        Raises:
            RefusedError: the CA it offers is not the invite's.
            UnavailableError: it cannot be reached.
        """
        offered = cls(invite.host, None)._ask("GET", "/v1/cropkt/ca").content
        with suppress(ValueError):
            # Compared before it is parsed; of what was sent, only what was compared goes on.
            der = ssl.PEM_cert_to_DER_cert(offered.decode("ascii"))
            if hashlib.sha256(der).hexdigest() == invite.ca:
                pem = ssl.DER_cert_to_PEM_cert(der).encode()
                return cls(invite.host, pem), pem
        problem = "its certificate authority is not the one in the invite"
        raise RefusedError(invite.host, problem, f"Somebody may listen in. {NEW_INVITE}")

    def hello(self) -> Hello:
        """Return what the coordinator says of itself and the study.

        Raises:
            RefusedError: its certificate is not to be trusted.
            UnavailableError: it cannot be reached.
            VersionMismatchError: its answer is not understood.
        """
        return self.heard(self.look())

    def look(self) -> Answer:
        """Return the hello as it comes over the network, for `heard`.

        Raises:
            RefusedError: the coordinator's certificate is not to be trusted.
            UnavailableError: it cannot be reached.
        """
        return self._ask("GET", "/v1/cropkt/hello")

    def heard(self, answer: Answer) -> Hello:
        """Return the hello in an answer.

        Raises:
            VersionMismatchError: it is not understood.
        """
        return self._understood(Hello, answer.content)

    def knock(self, knock: Knock) -> Known:
        """Show this site's keys; return what the coordinator knows of their owner.

        Raises:
            RefusedError: the roster does not know this site and its keys.
            RevokedSiteError: the coordinator cut it off.
            UnavailableError: the coordinator cannot be reached.
            VersionMismatchError: its answer is not understood.
        """
        answer = self._ask("POST", "/v1/cropkt/knock", asdict(knock))
        return self._understood(Known, answer.content)

    def enrol(self, invite: Invite, public_keys: Mapping[str, str]) -> Accepted:
        """Redeem the invite.

        Raises:
            RefusedError: the coordinator says no, or answers for another site or study.
            UnavailableError: it cannot be reached; the same command may be repeated.
            VersionMismatchError: the two sides run versions that do not go together.
        """
        body = {
            "token": invite.token,
            "site": invite.site,
            **public_keys,
            "cropkt": cropkt.__version__,
            "protocol": PROTOCOL,
            "flwr": version("flwr"),
        }
        told = self._ask("POST", "/v1/cropkt/enrol", body)
        answer = self._understood(Accepted, told.content)
        if (answer.site, answer.study) != (invite.site, invite.study):
            raise RefusedError(self._host, "it answered for another site or study", NEW_INVITE)
        return answer

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Answer:
        content, date, expires = bytearray(), None, None
        try:
            with (
                self._client() as client,
                client.stream(method, f"https://{self._host}{path}", json=body) as response,
            ):
                date, expires = _date(response), _expires(response)
                for chunk in response.iter_raw():  # decompressed, it could be any size
                    content += chunk
                    if len(content) > _MAX_BODY:
                        problem = "its answer is too long"
                        raise UnavailableError(self._host, problem, _NO_COORDINATOR)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise _explained(error, self._host) from None
        if response.status_code == 200:
            return Answer(bytes(content), date, expires)
        raise self._refusal(response.status_code, bytes(content))

    def _client(self) -> httpx.Client:
        try:
            return httpx.Client(verify=self._verify, timeout=_TIMEOUT, headers=_PLAIN)
        except (ImportError, ValueError, httpx.InvalidURL):  # a kind of proxy that httpx has not
            problem = f"the proxy {proxy_for(self._host)} is of an unknown kind"
            fix = "Give one that begins with http:// in HTTPS_PROXY, or name this host in NO_PROXY"
            raise UnavailableError(self._host, problem, fix) from None

    def _refusal(self, status: int, content: bytes) -> CropktError:
        problem, code = f"it answered with HTTP status {status}", ""
        if status == 404 or status >= 500:
            return UnavailableError(self._host, problem, _NO_COORDINATOR)
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            told = json.loads(content.decode())
            shown = "".join(c if c.isprintable() else " " for c in str(told["message"]))[:300]
            problem = f"the coordinator refuses: {shown.strip().rstrip('.')}"
            code = str(told["code"])
        if status == 429:
            return UnavailableError(self._host, problem)
        return _KINDS.get(code, RefusedError)(self._host, problem)

    def _understood(self, kind: type[Told], content: bytes) -> Told:
        try:
            if content.count(b",") > MAX_ITEMS:
                raise VersionMismatchError(self._host, "its answer is too long", _SAME_VERSION)
            return TypeAdapter(kind).validate_json(content)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"][:1])) or "all of it"
            problem = f"its answer is not understood ({where})"
            raise VersionMismatchError(self._host, problem, _SAME_VERSION) from None


_KINDS = {"version": VersionMismatchError, "revoked": RevokedSiteError}  # by code of a refusal


def check_versions(hello: Hello) -> None:
    """Compare the coordinator's versions with those installed here, as it compares a site's.

    Releases of one series go together; the bundle is the same for all that speak one protocol.

    Raises:
        VersionMismatchError: names both.
    """
    for name, there, here, fit in (
        ("cropkt", hello.cropkt, ours := cropkt.__version__, together(hello.cropkt, ours)),
        ("protocol", hello.protocol, PROTOCOL, hello.protocol == PROTOCOL),
        ("bundle", hello.bundle, bundle_hash(), hello.bundle == bundle_hash()),
    ):
        if not fit:
            problem = f"{name} is {str(there)[:64]!r} at the coordinator and {here!r} here"
            raise VersionMismatchError("versions", problem, _SAME_VERSION)
    if not together(hello.flwr, flower := version("flwr")):
        problem = f"Flower is {hello.flwr} at the coordinator and {flower} here"
        fix = f"Install the same: pip install flwr=={hello.flwr}"
        raise VersionMismatchError("versions", problem, fix)


def skew(hello: Hello) -> float:
    """Return by how many seconds this machine's clock is ahead of the coordinator's."""
    return time.time() - hello.time


def _explained(error: Exception, host: str) -> CropktError:
    """Return the cause of a failed connection, and what to do about it, in one line."""
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        for sign, problem, fix in _DISTRUST:
            if sign in text:
                return RefusedError(host, problem, fix)
    proxy = proxy_for(host)
    if isinstance(error, httpx.ProxyError):
        fix = "Check HTTPS_PROXY, and that the proxy allows this host and port"
        return UnavailableError(host, f"the proxy {proxy} does not let us through ({text})", fix)
    if isinstance(error, httpx.TimeoutException):
        problem, fix = "no answer in time", "Check the network and the firewall"
    elif "SSL" in text:
        problem, fix = "it does not speak TLS as we do", _NO_COORDINATOR
    elif "Name or service not known" in text or "nodename" in text or "resolution" in text:
        problem, fix = UNKNOWN_NAME
    elif isinstance(error, httpx.ConnectError):
        problem, fix = f"no connection ({_system(text)})", _NO_COORDINATOR
    else:
        problem, fix = f"the connection broke ({type(error).__name__})", "Try again"
    if proxy:
        problem, fix = f"{problem}, through the proxy {proxy}", f"{fix}, and check HTTPS_PROXY"
    return UnavailableError(host, problem, fix)


_DISTRUST = (
    ("not yet valid", "its certificate is not yet valid", "Check the clock of this machine"),
    ("expired", "its certificate has expired", "Ask the coordinator to renew it"),
    (
        "ismatch",  # host name, or IP address
        "its certificate is for another host name",
        "Use the name in the certificate, or ask the coordinator to add this one",
    ),
    (
        "",
        "its certificate was not issued by the study's authority",
        f"Somebody may listen in, or the coordinator was set up anew. {NEW_INVITE}",
    ),
)


def _system(text: str) -> str:
    """Return `Connection refused` of `[Errno 111] Connection refused`."""
    return text.rpartition("] ")[2][:100]


def _date(response: httpx.Response) -> float | None:
    """Return a response's Date header in unix seconds."""
    with suppress(KeyError, ValueError):
        return parsedate_to_datetime(response.headers["Date"]).timestamp()
    return None


def _expires(response: httpx.Response) -> float | None:
    """Return the last second of the certificate behind a response, in unix seconds."""
    channel = response.extensions["network_stream"].get_extra_info("ssl_object")
    ends = (channel.getpeercert() or {}).get("notAfter") if channel else None
    return ssl.cert_time_to_seconds(ends) if ends else None


def proxy_for(host: str) -> str:
    """Return host and port of the proxy on the way, without its password; or nothing."""
    known = urllib.request.getproxies()
    url = known.get("https", known.get("all", ""))
    if not url or urllib.request.proxy_bypass(host.rpartition(":")[0].strip("[]")):
        return ""
    return url.rpartition("@")[2].rpartition("//")[2].strip("/")
