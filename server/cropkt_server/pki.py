"""The coordinator's keys: its certificate authority, its TLS certificate, its signing key.

Everything lies in `DIR/keys`, readable by its owner alone. Sites pin the authority by the
fingerprint in their invite, so the server's certificate can be renewed without asking them.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cropkt.errors import ConfigError
from cropkt.files import write_private

CA_DAYS = 3650
SERVER_DAYS = 825  # the longest that common TLS stacks accept
NEW_AUTHORITY = (  # sites pinned the old one
    "Begin a new study: cropkt-server init in another folder, and a new invite to every site"
)
EARLY = timedelta(hours=1)  # valid from before now: a site's clock may be behind

_DNS_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@dataclass(frozen=True, slots=True)
class Keys:
    """Where a study's keys lie."""

    folder: Path  # DIR/keys

    @classmethod
    def of(cls, study: Path) -> Keys:
        """Return the keys of a study folder."""
        return cls(study / "keys")

    @property
    def ca_key(self) -> Path:
        """The authority's private key: needed only to renew; may be kept elsewhere."""
        return self.folder / "ca.key"

    @property
    def ca(self) -> Path:
        """The authority's certificate."""
        return self.folder / "ca.pem"

    @property
    def server_key(self) -> Path:
        """The TLS private key."""
        return self.folder / "server.key"

    @property
    def server(self) -> Path:
        """The TLS certificate."""
        return self.folder / "server.pem"

    @property
    def signing_key(self) -> Path:
        """The coordinator's Ed25519 private key."""
        return self.folder / "coordinator.key"

    @property
    def signing_public(self) -> Path:
        """The coordinator's Ed25519 public key."""
        return self.folder / "coordinator.pub"

    def all(self) -> tuple[Path, ...]:
        """Return every file."""
        return (
            self.ca_key,
            self.ca,
            self.server_key,
            self.server,
            self.signing_key,
            self.signing_public,
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 of the CA certificate's DER, in hex."""
        der = _certificate(self.ca).public_bytes(Encoding.DER)
        return hashlib.sha256(der).hexdigest()

    def signing(self) -> ed25519.Ed25519PrivateKey:
        """Return the coordinator's Ed25519 key; a simulation, which has no keys, makes one.

        Raises:
            ConfigError: the key is missing among others, or of another kind.
        """
        if not self.folder.exists():
            self.folder.mkdir(parents=True, mode=0o700)
            _make_signing_key(self)
        key = _private_key(self.signing_key)
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise ConfigError(self.signing_key, "is not an Ed25519 key", "Restore it")
        return key

    def signing_public_bytes(self) -> bytes:
        """Return the coordinator's raw Ed25519 public key, 32 bytes."""
        return self.signing().public_key().public_bytes_raw()


def make_keys(keys: Keys, hosts: Sequence[str], *, study: str) -> None:
    """Make the authority, the server's certificate and the coordinator's signing key.

    Args:
        keys: where to.
        hosts: the names and IP addresses by which sites reach the coordinator.
        study: its name goes into the certificates' subjects.

    Raises:
        ConfigError: a key is already there, or no host is given.
    """
    for path in keys.all():
        if path.exists():
            raise ConfigError(path, "is already there", "Use another folder, or move it away")
    if not hosts:
        raise ConfigError("host", "no name or address is given", "Give --host NAME[:PORT]")
    keys.folder.mkdir(parents=True, exist_ok=True)
    keys.folder.chmod(0o700)
    ca_key = ec.generate_private_key(ec.SECP384R1())
    name = _name(f"cropkt authority of {study}"[:64])
    ca = (
        _builder(name, name, ca_key.public_key(), days=CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA384())
    )
    _write(keys.ca_key, _private_pem(ca_key))
    _write(keys.ca, ca.public_bytes(Encoding.PEM))
    _issue(keys, hosts)
    _make_signing_key(keys)


def renew(keys: Keys, hosts: Sequence[str]) -> None:
    """Replace the server's key and certificate; sites need not notice.

    Raises:
        ConfigError: the authority's key is not there, or the authority has expired.
    """
    _check_end(keys.ca, _certificate(keys.ca), datetime.now(UTC), NEW_AUTHORITY)
    _issue(keys, hosts)


def check_certificate(
    keys: Keys, hosts: Sequence[str], *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> None:
    """Check what a site will check when it connects.

    Args:
        keys: the study's keys.
        hosts: the names and addresses that must be in the server's certificate.
        clock: now.

    Raises:
        ConfigError: a file is missing, a certificate is out of date, was not made by the
            authority, does not fit its key, or does not name a host. One clear sentence.
    """
    fix = "Make a new one with cropkt-server renew"
    ca, server = _certificate(keys.ca), _certificate(keys.server)
    now = clock()
    for path, certificate, new in ((keys.ca, ca, NEW_AUTHORITY), (keys.server, server, fix)):
        _check_end(path, certificate, now, new)
        if now < certificate.not_valid_before_utc:
            begins = f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
            raise ConfigError(path, f"is valid from {begins} only", "Set this machine's clock")
    try:
        server.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError):
        raise ConfigError(keys.server, f"was not made by {keys.ca.name}", fix) from None
    if _private_key(keys.server_key).public_key() != server.public_key():
        raise ConfigError(keys.server, f"does not fit {keys.server_key.name}", fix)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    for host in hosts:
        if _general_name(host) not in list(names):
            known = ", ".join(str(name.value) for name in names)
            raise ConfigError(keys.server, f"names {known}, not {host}", fix)


def _check_end(path: Path, certificate: x509.Certificate, now: datetime, fix: str) -> None:
    if now > certificate.not_valid_after_utc:
        raise ConfigError(path, f"expired on {certificate.not_valid_after_utc:%Y-%m-%d}", fix)


def last_second(path: Path) -> float:
    """Return until when a certificate is valid, in unix seconds.

    Raises:
        ConfigError: there is no certificate.
    """
    return _certificate(path).not_valid_after_utc.timestamp()


def _make_signing_key(keys: Keys) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    _write(keys.signing_key, _private_pem(key))
    _write(keys.signing_public, public)


def _issue(keys: Keys, hosts: Sequence[str]) -> None:
    ca, ca_key = _certificate(keys.ca), _private_key(keys.ca_key)
    key = ec.generate_private_key(ec.SECP256R1())
    ca_id = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id)
    names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
    certificate = (
        _builder(_name("cropkt coordinator"), ca.subject, key.public_key(), days=SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(usage, critical=False)
        .add_extension(authority, critical=False)
        .add_extension(names, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    _write(keys.server_key, _private_pem(key))
    _write(keys.server, certificate.public_bytes(Encoding.PEM))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLY)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    """Return the uses of a CA's key (`signs`) or of a server's."""
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _DNS_NAME.fullmatch(host):
        raise ConfigError("host", f"{host!r} is no name or address", "Give its ASCII form")
    return x509.DNSName(host.lower())


def _private_pem(key: _PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, content: bytes) -> None:
    write_private(path, content)


def _certificate(path: Path) -> x509.Certificate:
    content = _read(path)
    try:
        return x509.load_pem_x509_certificate(content)
    except ValueError:
        raise ConfigError(path, "is not a certificate", "Restore it") from None


def _private_key(path: Path) -> _PrivateKey:
    content = _read(path)
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError):
        raise ConfigError(path, "is not a private key", "Restore it") from None
    if not isinstance(key, _PrivateKey):
        raise ConfigError(path, "is a key of another kind", "Restore it")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(path, "no such file", "Make it with cropkt-server init") from None
