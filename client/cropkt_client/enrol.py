"""How a hospital joins: keys made on site, an invite redeemed over pinned TLS, the result kept.

The only thing that crosses an unverified connection is the CA certificate, and it counts only if
its SHA-256 is the one in the invite. The token, and everything after, travels over TLS verified
by exactly that CA. Keys are written before they are used, and are never overwritten: an
enrolment that was cut off is repeated with the same command.
"""

from __future__ import annotations

import base64
import hashlib
import json
import ssl
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from pydantic import ConfigDict, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

import cropkt
from cropkt.bundle import bundle_hash
from cropkt.cancers import Cancer
from cropkt.errors import ConfigError, CropktError
from cropkt.files import replace_file, write_atomically
from cropkt.invite import Invite
from cropkt.messages import PROTOCOL, SiteName

MAX_SKEW = 300.0  # seconds; Flower refuses signatures that are older
_MAX_BODY = 1 << 16
_TIMEOUT = httpx.Timeout(20.0, connect=10.0)
_LENIENT = ConfigDict(extra="ignore")  # a newer coordinator may say more
_NEW_INVITE = "Ask the coordinator for a new invite"
_KEY_FIX = "Restore it from a backup, or enrol from an empty state folder with a new invite"

Key32 = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{43}=$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Told = TypeVar("Told")


class RefusedError(CropktError):
    """One side does not trust the other, or the coordinator says no."""

    exit_code = 77


class UnavailableError(CropktError):
    """The coordinator cannot be reached, for now."""

    exit_code = 69


class VersionMismatchError(CropktError):
    """The two sides run versions that do not go together."""

    exit_code = 76


@dataclass(frozen=True, kw_only=True, config=_LENIENT)
class Hello:
    """What the coordinator says to everybody."""

    study: SiteName
    cropkt: str
    protocol: int
    flwr: str
    bundle: Sha256
    time: float  # unix seconds
    closed: bool = False  # the study is over


@dataclass(frozen=True, kw_only=True, config=_LENIENT)
class _Accepted:
    """The coordinator's answer to an enrolment."""

    study: SiteName
    site: SiteName
    cancers: tuple[Cancer, ...]
    coordinator_key: Key32  # base64 of the raw Ed25519 public key
    bundle: Sha256  # the only Flower bundle this site answers to


@dataclass(frozen=True, kw_only=True)
class Enrolment(_Accepted):
    """What this site knows of the study it joined: `<state>/enrolment.json`."""

    host: str  # host:port

    @classmethod
    def load(cls, state: Path) -> Enrolment:
        """Return the enrolment kept in a state folder.

        Raises:
            ConfigError: there is none, or it is damaged.
        """
        path = state / "enrolment.json"
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except FileNotFoundError:
            fix = "Ask the coordinator for an invite, then: cropkt-client enrol INVITE"
            raise ConfigError(path, "this site is not enrolled", fix) from None
        except ValidationError:
            raise ConfigError(path, "damaged", _NEW_INVITE) from None

    def save(self, state: Path) -> None:
        """Keep the enrolment."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"
        replace_file(state / "enrolment.json", text.encode())


def join(invite: Invite, config: Path) -> list[str]:
    """Redeem an invite and keep what it gave; return the lines to show.

    Everything may be repeated: keys that exist are used again, and the coordinator knows them.

    Raises:
        ConfigError: `config` is another site's, or its state belongs to another study.
        RefusedError: one side does not trust the other.
        UnavailableError: the coordinator cannot be reached; repeat the same command.
        VersionMismatchError: the two sides run versions that do not go together.
    """
    from cropkt_client.site import Site  # torch loads here

    config = config.resolve()
    here = Site.load(config) if config.exists() else None
    state = here.state if here else config.parent / "state"
    if here and here.config.site != invite.site:
        problem = f"its site is {here.config.site}, the invite is for {invite.site}"
        raise ConfigError(config, problem, "Use another --config, or ask for another invite")
    if (state / "enrolment.json").exists():
        before = Enrolment.load(state)
        if (before.study, before.site) != (invite.study, invite.site):
            problem = f"it belongs to {before.site} in {before.study}"
            raise ConfigError(state, problem, "Use another --config with its own state folder")
    keys = Keys.of(state)
    coordinator, ca = Coordinator.pinned(invite)
    check_versions(coordinator.hello())
    enrolment = coordinator.enrol(invite, keys)
    replace_file(state / "ca.pem", ca)
    enrolment.save(state)
    cancers = ", ".join(enrolment.cancers)
    lines = [f"enrolled {enrolment.site} in {enrolment.study} for {cancers}; keys in {state}/keys"]
    if here is None:
        replace_file(config, _template(enrolment).encode())
        return [*lines, f"wrote {config}: fill in outcomes and slides, then"]
    extra = sorted(set(here.config.cancers) - set(enrolment.cancers))
    if extra:
        lines.append(f"take {' '.join(extra)} out of {config}: the invite is not for that")
    return lines


def _template(enrolment: Enrolment) -> str:
    """Return a `site.yaml` with all that is known filled in."""
    cancers = ", ".join(enrolment.cancers)
    return f"""\
# This hospital in study {enrolment.study}. Relative paths are meant from the folder of this file.

# Its name in the roster, and the cancers it joined with. The invite decides both.
site: {json.dumps(enrolment.site)}
cancers: [{cancers}]

# FILL IN: the table of outcomes (CSV or TSV), one row a patient: times and events.
outcomes: outcomes.csv

# FILL IN one of the two: folders of slide feature files, searched through, ...
slides: [features]
# ... or one folder packed by cropkt.
# pack: packed

# The patch encoder, as agreed in the study, for example UNI2-h.
encoder: ""

# A row or slide that is not usable: raise (stop, and name it) or skip (leave it out, and count it).
on_bad: raise

# Keys, models, answers and logs of this site. Keep it: it is this site's identity.
state: state
"""


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
        offered = cls(invite.host, None)._ask("GET", "/v1/cropkt/ca")
        with suppress(ValueError):
            certificate = x509.load_pem_x509_certificate(offered)
            der = certificate.public_bytes(ser.Encoding.DER)
            if hashlib.sha256(der).hexdigest() == invite.ca:
                # Of what was sent, only the certificate that was compared goes on.
                pem = certificate.public_bytes(ser.Encoding.PEM)
                return cls(invite.host, pem), pem
        problem = "its certificate authority is not the one in the invite"
        raise RefusedError(invite.host, problem, f"Somebody may listen in. {_NEW_INVITE}")

    def hello(self) -> Hello:
        """Return what the coordinator says of itself and the study.

        Raises:
            RefusedError: its certificate is not to be trusted.
            UnavailableError: it cannot be reached.
            VersionMismatchError: its answer is not understood.
        """
        return self._understood(Hello, self._ask("GET", "/v1/cropkt/hello"))

    def enrol(self, invite: Invite, keys: Keys) -> Enrolment:
        """Redeem the invite.

        Raises:
            RefusedError: the coordinator says no, or answers for another site or study.
            UnavailableError: it cannot be reached; the same command may be repeated.
            VersionMismatchError: the two sides run versions that do not go together.
        """
        body = {
            "token": invite.token,
            "site": invite.site,
            **keys.public(),
            "cropkt": cropkt.__version__,
            "protocol": PROTOCOL,
            "flwr": version("flwr"),
        }
        answer = self._understood(_Accepted, self._ask("POST", "/v1/cropkt/enrol", body))
        if (answer.site, answer.study) != (invite.site, invite.study):
            raise RefusedError(self._host, "it answered for another site or study", _NEW_INVITE)
        return Enrolment(host=self._host, **asdict(answer))

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        content = bytearray()
        try:
            with (
                httpx.Client(verify=self._verify, timeout=_TIMEOUT) as client,
                client.stream(method, f"https://{self._host}{path}", json=body) as response,
            ):
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) > _MAX_BODY:
                        problem = "its answer is too long"
                        raise UnavailableError(self._host, problem, _NO_COORDINATOR)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise _explained(error, self._host) from None
        if response.status_code == 200:
            return bytes(content)
        raise self._refusal(response.status_code, bytes(content))

    def _refusal(self, status: int, content: bytes) -> CropktError:
        problem, code = f"it answered with HTTP status {status}", ""
        if status == 404 or status >= 500:
            return UnavailableError(self._host, problem, _NO_COORDINATOR)
        with suppress(ValueError, KeyError, TypeError):
            told = json.loads(content)
            shown = "".join(c if c.isprintable() else " " for c in str(told["message"]))[:300]
            problem, code = f"the coordinator refuses: {shown.strip().rstrip('.')}", told["code"]
        if status == 429:
            return UnavailableError(self._host, problem)
        kind = VersionMismatchError if code == "version" else RefusedError
        return kind(self._host, problem)

    def _understood(self, kind: type[Told], content: bytes) -> Told:
        try:
            return TypeAdapter(kind).validate_json(content)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"][:1])) or "all of it"
            problem = f"its answer is not understood ({where})"
            raise VersionMismatchError(self._host, problem, _SAME_VERSION) from None


_NO_COORDINATOR = "Check that this is the coordinator's host and port, and that it runs"
_SAME_VERSION = "Install the coordinator's version of cropkt"


def check_versions(hello: Hello) -> None:
    """Compare the coordinator's versions with those installed here.

    Raises:
        VersionMismatchError: names both.
    """
    mine = {"cropkt": cropkt.__version__, "protocol": PROTOCOL, "bundle": bundle_hash()}
    for name, here in mine.items():
        there = getattr(hello, name)
        if there != here:
            problem = f"{name} is {str(there)[:64]!r} at the coordinator and {here!r} here"
            raise VersionMismatchError("versions", problem, _SAME_VERSION)


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
    proxy = _proxy(host)
    if isinstance(error, httpx.ProxyError):
        fix = "Check HTTPS_PROXY, and that the proxy allows this host and port"
        return UnavailableError(host, f"the proxy {proxy} does not let us through ({text})", fix)
    if isinstance(error, httpx.TimeoutException):
        problem, fix = "no answer in time", "Check the network and the firewall"
    elif "SSL" in text:
        problem, fix = "it does not speak TLS as we do", _NO_COORDINATOR
    elif "Name or service not known" in text or "nodename" in text or "resolution" in text:
        problem, fix = "this host name is not known", "Check the name, and the DNS of this machine"
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
        f"Somebody may listen in, or the coordinator was set up anew. {_NEW_INVITE}",
    ),
)


def _system(text: str) -> str:
    """Return `Connection refused` of `[Errno 111] Connection refused`."""
    return text.rpartition("] ")[2][:100]


def _proxy(host: str) -> str:
    """Return host and port of the proxy on the way, without its password; or nothing."""
    url = urllib.request.getproxies().get("https", "")
    if not url or urllib.request.proxy_bypass(host.rpartition(":")[0].strip("[]")):
        return ""
    return url.rpartition("@")[2].rpartition("//")[2].strip("/")


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class Keys:
    """A site's two keys; the private halves never leave `<state>/keys`."""

    node: ec.EllipticCurvePrivateKey  # who this site is, to Flower
    signing: ed25519.Ed25519PrivateKey  # signs what this site releases

    @classmethod
    def of(cls, state: Path) -> Keys:
        """Return the keys in a state folder, made the first time.

        Raises:
            ConfigError: a key file holds no such key.
        """
        node = _key(node_key(state), lambda: ec.generate_private_key(ec.SECP384R1()))
        signing = _key(state / "keys" / "signing.key", ed25519.Ed25519PrivateKey.generate)
        try:
            return cls(node, signing)
        except ValidationError:
            raise ConfigError(state / "keys", "a key is of the wrong kind", _KEY_FIX) from None

    def public(self) -> dict[str, str]:
        """Return the public halves as the coordinator wants them."""
        node = self.node.public_key().public_bytes(ser.Encoding.OpenSSH, ser.PublicFormat.OpenSSH)
        signing = self.signing.public_key().public_bytes_raw()
        return {"node_key": node.decode(), "signing_key": base64.b64encode(signing).decode()}


def node_key(state: Path) -> Path:
    """Return where the key lies by which Flower knows this site."""
    return state / "keys" / "node.key"


def _key(path: Path, make: Callable[[], Any]) -> Any:
    """Return the OpenSSH private key in a file, making it if there is no such file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        content = make().private_bytes(
            ser.Encoding.PEM, ser.PrivateFormat.OpenSSH, ser.NoEncryption()
        )
        write_atomically(path, lambda file: file.write(content), mode=0o600)
    try:
        return ser.load_ssh_private_key(path.read_bytes(), password=None)
    except ValueError:
        raise ConfigError(path, "not an OpenSSH private key", _KEY_FIX) from None
