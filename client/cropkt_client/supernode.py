"""The stock `flower-supernode` that a client keeps running.

The SuperNode, a child, holds the one connection to the coordinator. It runs no code of an app:
with `--isolation process` it only keeps messages for our executor, which reaches it on a loopback
port with a secret that both read from a file of this user.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path

from cropkt.errors import ConfigError
from cropkt.files import write_private
from cropkt_client.worker import Child, wear_leash

FIRST_WAIT = 2.0  # seconds between starts, doubled each time ...
LONGEST_WAIT = 60.0  # ... up to this,
LONGEST_WAIT_FOR_SESSION = 3.0  # or this, where the end of the last session is in sight
STEADY = 60.0  # seconds of running after which a start counts as good
BARRED = 0  # exit code of a SuperNode that got HTTP 401: nobody else asks it to end
GAVE_UP = 75  # exit code of a SuperNode that lost its connection for good
SESSION = 60.0  # seconds in which the coordinator believes that a session broke off, at the most
_AHEAD = "CROPKT_CLOCK_AHEAD"  # tells the child by how many seconds this clock is ahead
_START = "from cropkt_client.supernode import main; main()"

log = logging.getLogger("cropkt.client")


class SuperNode:
    """Keeps one SuperNode running; `tend` has to be called about once a second.

    Args:
        host: the coordinator's host:port.
        state: the site's state folder, with `ca.pem` and `keys/node.key`.
        node_config: what the ClientApp finds in its context.
        report: takes what went wrong, in one line.
        barred: called when the coordinator let it in no more; what it raises ends `tend`.
    """

    def __init__(
        self,
        *,
        host: str,
        state: Path,
        node_config: Mapping[str, str],
        report: Callable[[str], None],
        barred: Callable[[], None],
    ) -> None:
        self._host, self._state = host, state
        self._report, self._barred = report, barred
        self._node_config = " ".join(f"{key}={_quoted(v)}" for key, v in node_config.items())
        self.secret = secrets.token_bytes(32)
        self._secret_file = state / "flower" / "executor.secret"
        write_private(self._secret_file, self.secret)
        self._child: Child | None = None
        self._address: str | None = None
        self._started = self._due = 0.0
        self._wait = FIRST_WAIT
        self._refused_since: float | None = None
        self.ahead = 0.0  # seconds by which this clock is ahead of the coordinator's

    @property
    def address(self) -> str | None:
        """Where the loopback API of the running SuperNode is, or None."""
        return self._address

    @property
    def pid(self) -> int | None:
        """The SuperNode's process id, while it runs."""
        return self._child.process.pid if self._child else None

    def tend(self) -> None:
        """Start the SuperNode if it is due, or find out why it ended."""
        now = time.monotonic()
        if self._child is None:
            if now >= self._due:
                self._start(now)
        elif not self._child.alive:
            self._ended(now)

    def stop(self) -> None:
        """End it politely: the coordinator then accepts the next one at once."""
        self._address = None
        if self._child:
            self._child.end(grace=10.0)
            self._child = None

    def _start(self, now: float) -> None:
        port = free_port()  # chosen anew each time: another process may have taken it
        command = [
            *("--superlink", self._host),
            *("--root-certificates", str(self._state / "ca.pem")),
            *("--auth-supernode-private-key", str(self._state / "keys" / "node.key")),
            *("--isolation", "process"),
            *("--superexec-auth-secret-file", str(self._secret_file)),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--node-config", self._node_config),
        ]
        environment = {_AHEAD: f"{self.ahead:.3f}"}
        self._child = Child.start(
            [_START, *command], name="cropkt.supernode", environment=environment
        )
        self._address, self._started = f"127.0.0.1:{port}", now

    def _ended(self, now: float) -> None:
        """Clear away a SuperNode that ended, say why, and plan the next start."""
        child, self._child, self._address = self._child, None, None
        if child is None:
            return
        child.end()
        words = " ".join(child.output.tail)
        if now - self._started > STEADY:
            self._wait, self._refused_since = FIRST_WAIT, None
        if "[code: 2004]" in words:
            self._refused(now)
        else:
            self._refused_since = None
            cause = _cause(words, child.process.returncode)
            log.warning("the connection process ended: %s", cause)
            self._report(cause)
        limit = LONGEST_WAIT if self._refused_since is None else LONGEST_WAIT_FOR_SESSION
        self._wait = min(self._wait, limit)
        self._due, self._wait = now + self._wait, self._wait * 2
        if child.process.returncode == BARRED:
            self._barred()

    def _refused(self, now: float) -> None:
        """Wait quietly until the old session has expired; it takes longer if we were cut off."""
        if self._refused_since is None:
            self._refused_since = now
            log.info("the coordinator still holds this site's last session; waiting for its end")
        elif now - self._refused_since > SESSION:
            self._refused_since = now
            cause = (
                "the coordinator does not accept this site: it was revoked, or another client "
                "with the same keys is connected"
            )
            log.error("%s", cause)
            self._report(cause)


def _cause(words: str, code: int) -> str:
    """Return in one line why a SuperNode ended, of what it wrote last."""
    lowered = words.lower()
    if "certificate_verify_failed" in lowered:
        return "the coordinator's certificate is not trusted; see the log"
    if "address already in use" in lowered:
        return "its loopback port was taken; another one is tried"
    if code == BARRED:
        return "the coordinator lets this site in no more: revoked, or a clock has just been set"
    if code == GAVE_UP:
        return "the connection to the coordinator broke; see the log"
    return f"it ended with code {code}; see the log"


def _quoted(value: str) -> str:
    """Return a value as Flower's --node-config wants it, which knows no escapes.

    Raises:
        ConfigError: the value holds both kinds of quotation mark, or a line break.
    """
    for mark in ("'", '"'):
        # Between double quotes a backslash would begin an escape; Flower reads them as TOML.
        if mark not in value and "\n" not in value and (mark == "'" or "\\" not in value):
            return f"{mark}{value}{mark}"
    raise ConfigError(value, "Flower cannot carry this path", "Use one without quotation marks")


def free_port() -> int:
    """Return a loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def settle_environment(state: Path) -> None:
    """Set what Flower reads from the environment, here and in the children; before its import.

    It then tells nobody that it runs, writes into the state folder only, and no proxy catches
    what goes to our own SuperNode.
    """
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
    os.environ["FLWR_HOME"] = str(state / "flower")
    # Lower case wins where both are set, so both have to say it.
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    names = dict.fromkeys([*filter(None, known.split(",")), "127.0.0.1", "localhost"])
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(names)


def main() -> None:
    """Run the installed `flower-supernode` in the child, with the child's arguments."""
    wear_leash()
    from cropkt_client.fleet import settle

    settle(float(os.environ.get(_AHEAD, "0")))
    (script,) = entry_points(group="console_scripts", name="flower-supernode")
    sys.argv[0] = script.name
    script.load()()
    # It returns only where its connection broke, and its loopback API would go on without it.
    sys.stdout.flush()
    os._exit(GAVE_UP)
