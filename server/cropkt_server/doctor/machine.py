"""Can this machine answer the sites: keys, certificate, port, disk, clock, versions?"""

from __future__ import annotations

import shlex
import socket
import ssl
import stat
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import cropkt
from cropkt.checkup import Finding, disk, fail, failed, ok, skipped, until, warn
from cropkt.errors import ConfigError
from cropkt.messages import PROTOCOL
from cropkt.versions import unfit
from cropkt_server.lock import running
from cropkt_server.pki import NEW_AUTHORITY, Keys, check_certificate, last_second
from cropkt_server.public import listening
from cropkt_server.settings import Settings

AHEAD = 300.0  # seconds that a file may be from the future
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where one reaches who listens to all


def check_machine(folder: Path, settings: Settings, host: str) -> Iterator[Finding]:
    """Yield a finding a check.

    Args:
        folder: the study's.
        settings: its `study.yaml`.
        host: "name:port", as the sites reach it.
    """
    keys, name = Keys.of(folder), host.rpartition(":")[0].strip("[]")
    yield _keys(keys)
    try:
        check_certificate(keys, [name])
    except ConfigError as error:
        yield failed("certificate", error)
        yield skipped("certificate dates", "the certificate cannot be used")
    else:
        yield ok("certificate", f"made by this study's authority, for {name}")
        yield _dates(keys)
    yield _port(folder, settings, host, keys)
    yield disk(folder, "Free some, or move the study's folder to a larger disk")
    yield _clock(folder)
    yield _versions()


def _keys(keys: Keys) -> Finding:
    """Check that every key is there, and readable by its owner alone."""
    for path in keys.all():
        if not path.exists() and path != keys.ca_key:
            return fail("keys", f"{path} is missing", "Restore it from a backup")
    for path in (keys.folder, *keys.all()):
        if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077:
            mode = "700" if path.is_dir() else "600"
            return fail("keys", f"others may read {path}", f"chmod {mode} {shlex.quote(str(path))}")
    try:
        keys.signing()
    except ConfigError as error:
        return failed("keys", error)
    if not keys.ca_key.exists():
        return ok("keys", "for their owner alone; the authority's is elsewhere: renew needs it")
    return ok("keys", "all are here, for their owner alone")


def _dates(keys: Keys) -> Finding:
    ends = [
        ("the server's", last_second(keys.server), "Make a new one with cropkt-server renew"),
        ("the authority's", last_second(keys.ca), NEW_AUTHORITY),
    ]
    return until("certificate dates", ends)


def _port(folder: Path, settings: Settings, host: str, keys: Keys) -> Finding:
    """Check that the port is free, or held by this study's own coordinator."""
    name, _, public = host.rpartition(":")
    port = settings.port or int(public)
    where, pid = f"{settings.listen}, port {port}", running(folder)
    if pid is None:
        try:
            listening(settings.listen, port).close()
        except ConfigError as error:
            return failed("port", error)
        return ok("port", f"{where} is free")
    address = _EVERYWHERE.get(settings.listen, settings.listen)
    try:
        context = ssl.create_default_context(cafile=str(keys.ca))
        with (
            socket.create_connection((address, port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=name.strip("[]")),
        ):
            return ok("port", f"{where} is answered by this study's coordinator, process {pid}")
    except ssl.SSLError:
        problem = f"{where} is answered by another certificate than that in {keys.folder}"
        fix = "Stop and start the study, if the certificate was renewed; or stop what answers"
        return fail("port", problem, fix)
    except OSError as error:
        why = error.strerror or type(error).__name__
        problem = f"the coordinator (process {pid}) runs, but {where} is not answered ({why})"
        return fail("port", problem, "See server.log; stop and start the study")


def _clock(folder: Path) -> Finding:
    """Say what time it is; nobody is asked, but files tell whether the clock was set back."""
    now = time.time()
    here = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    if newest > now + AHEAD:
        problem = f"it is {here} here, and a file of the study is {newest - now:.0f} s younger"
        return warn("clock", problem, "Set the clock by NTP: deadlines and invites rest on it")
    return ok("clock", f"it is {here} here; compared with this study's files alone")


def _versions() -> Finding:
    if problem := unfit("flwr"):
        return fail("versions", problem, "Install the release that cropkt asks for")
    here = f"cropkt {cropkt.__version__}, protocol {PROTOCOL}, Flower {version('flwr')}"
    return ok("versions", here)
