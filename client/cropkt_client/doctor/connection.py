"""Can this site reach its coordinator over its one port, and is it let in?"""

from __future__ import annotations

import ipaddress
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from cryptography import x509

from cropkt.checkup import Finding, fail, failed, ok, skipped, until, warn
from cropkt.errors import ConfigError, CropktError, RefusedError, UnavailableError
from cropkt.versions import unfit
from cropkt_client.enrol import Enrolment, Keys
from cropkt_client.link import (
    MAX_SKEW,
    NEW_INVITE,
    UNKNOWN_NAME,
    Answer,
    Coordinator,
    Hello,
    Known,
    proxy_for,
)
from cropkt_client.serve import check
from cropkt_client.settings import SiteConfig

NEAR = 5.0  # seconds that no clock is blamed for: a Date header has whole ones

_CHECKS = (
    *("enrolment", "keys", "proxy", "DNS", "port", "certificate chain", "certificate dates"),
    *("clock", "versions", "roster"),
)


class Connection:
    """The way to the coordinator; `known` is what it said of this site, once `checks` has run."""

    def __init__(self, settings: SiteConfig, state: Path) -> None:
        self.state = state
        self.known: Known | None = None
        self._settings = settings

    def checks(self) -> Iterator[Finding]:
        """Yield a finding a check, in the order in which one rests on another."""
        try:
            enrolment = Enrolment.load(self.state)
        except ConfigError as error:
            yield failed("enrolment", error)
            yield from _skip("keys", "this site is not enrolled")
            return
        yield self._enrolment(enrolment)
        keys = self._keys()
        yield keys
        proxy = proxy_for(enrolment.host)
        yield ok("proxy", f"through {proxy}" if proxy else "none: a direct connection")
        if proxy:
            yield skipped("DNS", f"the proxy {proxy} looks the name up")
        else:
            found = _resolve(enrolment.host)
            yield found
            if found.word == "fail":
                yield from _skip("port", "the coordinator's name is not known")
                return
        yield from self._over_the_network(enrolment, with_keys=keys.word == "ok")

    def _enrolment(self, enrolment: Enrolment) -> Finding:
        here, path = self._settings, self.state / "enrolment.json"
        if here.site != enrolment.site:
            problem = f"site.yaml is of {here.site}, {path} of {enrolment.site}"
            return fail("enrolment", problem, "Use the site.yaml of this state folder")
        if extra := set(here.cancers) - set(enrolment.cancers):
            problem = f"site.yaml names {_list(extra)}, for which this site is not enrolled"
            return fail(
                "enrolment",
                problem,
                f"Take it out, or: {NEW_INVITE[0].lower()}{NEW_INVITE[1:]} with all its cancers",
            )
        joined = f"{enrolment.site} ({_list(enrolment.cancers)}) in {enrolment.study}"
        return ok("enrolment", f"{joined} at {enrolment.host}")

    def _keys(self) -> Finding:
        """Return whether both keys are there, for their owner alone; makes none."""
        folder = self.state / "keys"
        for name in ("node.key", "signing.key"):
            try:
                mode = (folder / name).stat().st_mode
            except OSError:
                fix = f"Restore it from a backup. Without one: {NEW_INVITE}"
                return fail("keys", f"{folder / name} is missing", fix)
            if stat.S_IMODE(mode) & 0o077:
                fix = f"chmod 600 {folder / name}"
                return fail("keys", f"others may read {folder / name}", fix)
        try:
            Keys.of(self.state)
        except ConfigError as error:
            return failed("keys", error)
        return ok("keys", "both are here, for their owner alone")

    def _over_the_network(self, enrolment: Enrolment, *, with_keys: bool) -> Iterator[Finding]:
        try:
            ca = (self.state / "ca.pem").read_bytes()
            coordinator = Coordinator(enrolment.host, ca)
            authority = x509.load_pem_x509_certificate(ca)
        except (OSError, ValueError):
            problem = f"{self.state / 'ca.pem'} is missing or damaged"
            yield skipped("port", problem)
            yield fail("certificate chain", problem, f"Restore it. Without a backup: {NEW_INVITE}")
            yield from _skip("certificate dates", "there is no authority to trust")
            return
        began = time.time()
        try:
            answer = coordinator.look()
        except RefusedError as error:
            yield ok("port", f"{enrolment.host} answers")
            fix = f"{error.fix}. If a firewall here opens TLS, it must leave {enrolment.host} alone"
            yield fail("certificate chain", error.problem, fix)
            yield from _skip("certificate dates", "the certificate is not to be trusted")
            return
        except UnavailableError as error:
            fix = f"{error.fix}. This site needs outgoing TCP to {enrolment.host}, and nothing else"
            yield fail("port", f"{enrolment.host}: {error.problem}", fix.removeprefix(". "))
            yield from _skip("certificate chain", "the coordinator cannot be reached")
            return
        seconds = time.time() - began
        yield ok("port", f"{enrolment.host} answers in {1000 * seconds:.0f} ms")
        yield ok("certificate chain", "issued by the study's own authority")
        yield _dates(answer, authority)
        yield _clock(answer, began + seconds / 2)
        try:
            hello = coordinator.heard(answer)
            check(hello, enrolment)
        except CropktError as error:
            yield failed("versions", error)
            yield from _skip("roster", "the two sides do not understand each other")
            return
        yield _versions(hello)
        if not with_keys:
            yield skipped("roster", "this site's keys cannot be used")
            return
        yield self._roster(enrolment, coordinator, hello)
        if hello.closed:
            yield warn("study", "it is over", "There is nothing left to serve")

    def _roster(self, enrolment: Enrolment, coordinator: Coordinator, hello: Hello) -> Finding:
        knock = enrolment.knock(Keys.of(self.state), at=hello.time)
        try:
            self.known = coordinator.knock(knock)
        except CropktError as error:
            return fail("roster", error.problem, error.fix or NEW_INVITE)
        if extra := set(self._settings.cancers) - set(self.known.cancers):
            problem = f"this site is there, but not for {_list(extra)}"
            return fail("roster", problem, f"{NEW_INVITE} with all its cancers")
        return ok("roster", f"{self.known.site} is there with these keys, and not revoked")


def _skip(first: str, because: str) -> Iterator[Finding]:
    """Yield that a check and all after it could not run."""
    for name in _CHECKS[_CHECKS.index(first) :]:
        yield skipped(name, because)


def _resolve(host: str) -> Finding:
    name, _, port = host.rpartition(":")
    name = name.strip("[]")
    try:
        ipaddress.ip_address(name)
        return ok("DNS", f"not needed: {name} is an address")
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(name, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        problem, fix = UNKNOWN_NAME
        return fail("DNS", f"{name}: {problem}", fix)
    addresses = dict.fromkeys(str(one[4][0]) for one in found)
    return ok("DNS", f"{name} is {', '.join(addresses)}")


def _dates(answer: Answer, authority: x509.Certificate) -> Finding:
    last = authority.not_valid_after_utc.timestamp()
    ends = [("the authority's", last, "Ask the coordinator to set the study up anew")]
    if answer.expires is not None:
        renew = "Ask the coordinator for cropkt-server renew"
        ends.insert(0, ("the server's", answer.expires, renew))
    return until("certificate dates", ends)


def _clock(answer: Answer, at: float) -> Finding:
    """Compare this clock with the Date header of the coordinator's answer."""
    if answer.date is None:
        return skipped("clock", "the answer tells no time")
    ahead = at - answer.date
    side = "ahead of" if ahead > 0 else "behind"
    apart = f"this clock is {abs(ahead):.0f} s {side} the coordinator's"
    if abs(ahead) > MAX_SKEW:
        return warn("clock", apart, "Set both by NTP: certificates and logs rest on it")
    return ok("clock", apart if abs(ahead) > NEAR else "it agrees with the coordinator's")


def _versions(hello: Hello) -> Finding:
    """Tell the versions of both sides, which go together: else they would not have understood."""
    if problem := unfit("flwr"):
        return fail("versions", problem, "Install the release that cropkt asks for")
    there = f"cropkt {hello.cropkt}, protocol {hello.protocol}, Flower {hello.flwr}"
    here = f"cropkt {version('cropkt')}, protocol {hello.protocol}, Flower {version('flwr')}"
    return ok("versions", f"both sides have {there}" if here == there else f"{there}; here {here}")


def _list(cancers: Iterable[str]) -> str:
    return " ".join(sorted(cancers))
