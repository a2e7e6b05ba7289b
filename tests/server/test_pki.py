import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from cropkt.errors import ConfigError
from cropkt_server.pki import Keys, check_certificate, make_keys, renew


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    keys = Keys.of(tmp_path)
    make_keys(keys, ["localhost", "127.0.0.1", "::1"], study="rare")
    return keys


def test_makes_files_for_the_owner_alone(keys: Keys) -> None:
    assert {path.name for path in keys.folder.iterdir()} == {path.name for path in keys.all()}
    for path in keys.all():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(keys.folder.stat().st_mode) == 0o700


def test_certificates_are_what_sites_check(keys: Keys) -> None:
    check_certificate(keys, ["localhost", "LOCALHOST", "127.0.0.1", "::1"])
    context = ssl.create_default_context(cafile=str(keys.ca))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    assert len(context.get_ca_certs()) == 1
    assert len(keys.fingerprint()) == 64
    public = load_pem_public_key(keys.signing_public.read_bytes())
    assert public.public_bytes_raw() == keys.signing_public_bytes()  # type: ignore[union-attr]


def test_refuses_to_overwrite(keys: Keys) -> None:
    before = keys.ca.read_bytes()
    with pytest.raises(ConfigError, match="already there"):
        make_keys(keys, ["localhost"], study="rare")
    assert keys.ca.read_bytes() == before


@pytest.mark.parametrize("hosts", [[], ["köln.example"], [""]])
def test_refuses_hosts(tmp_path: Path, hosts: list[str]) -> None:
    with pytest.raises(ConfigError, match="host"):
        make_keys(Keys.of(tmp_path), hosts, study="rare")


def test_renewal_keeps_the_authority(keys: Keys) -> None:
    fingerprint, before = keys.fingerprint(), keys.server.read_bytes()
    renew(keys, ["other.example"])
    check_certificate(keys, ["other.example"])
    assert keys.fingerprint() == fingerprint
    assert keys.server.read_bytes() != before


def test_names_a_host_that_is_missing(keys: Keys) -> None:
    with pytest.raises(ConfigError, match=r"names localhost, 127\.0\.0\.1, ::1, not else\.example"):
        check_certificate(keys, ["else.example"])


@pytest.mark.parametrize(("days", "problem"), [(826, "expired on"), (-1, "is valid from")])
def test_names_a_date_that_is_wrong(keys: Keys, days: int, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_certificate(keys, [], clock=lambda: datetime.now(UTC) + timedelta(days=days))


def test_an_authority_that_expired_is_not_renewed(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = datetime.now(UTC) + timedelta(days=826)
    with pytest.raises(ConfigError, match="cropkt-server renew"):  # the server's alone
        check_certificate(keys, [], clock=lambda: late)
    with pytest.raises(ConfigError, match=r"ca\.pem: expired .* a new invite to every site"):
        check_certificate(keys, [], clock=lambda: late + timedelta(days=3650))
    monkeypatch.setattr("cropkt_server.pki.EARLY", timedelta(days=2))
    monkeypatch.setattr("cropkt_server.pki.CA_DAYS", -1)
    ended = Keys.of(keys.folder / "ended")
    make_keys(ended, ["localhost"], study="rare")
    before = ended.server.read_bytes()
    with pytest.raises(ConfigError, match=r"ca\.pem: expired .* Begin a new study"):
        renew(ended, ["localhost"])
    assert ended.server.read_bytes() == before


def test_lifetimes(keys: Keys) -> None:
    for path, days in ((keys.ca, 3650), (keys.server, 825)):
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        left = certificate.not_valid_after_utc - datetime.now(UTC)
        assert timedelta(days=days - 1) < left <= timedelta(days=days)
        assert certificate.not_valid_before_utc < datetime.now(UTC) - timedelta(minutes=10)


def test_names_another_authority(keys: Keys, tmp_path: Path) -> None:
    other = Keys.of(tmp_path / "other")
    make_keys(other, ["localhost"], study="other")
    keys.ca.write_bytes(other.ca.read_bytes())
    with pytest.raises(ConfigError, match=r"was not made by ca\.pem"):
        check_certificate(keys, [])


def test_names_a_key_that_does_not_fit(keys: Keys) -> None:
    keys.server_key.write_bytes(keys.ca_key.read_bytes())
    with pytest.raises(ConfigError, match=r"does not fit server\.key"):
        check_certificate(keys, [])


@pytest.mark.parametrize("name", ["ca.pem", "server.pem", "server.key"])
def test_names_a_file_that_is_missing_or_broken(keys: Keys, name: str) -> None:
    (keys.folder / name).write_text("nonsense")
    with pytest.raises(ConfigError, match=rf"{name}: is not a"):
        check_certificate(keys, [])
    (keys.folder / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name}: no such file"):
        check_certificate(keys, [])
