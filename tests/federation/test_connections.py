"""Whom the processes speak to: the coordinator, through a proxy if there is one, nobody else."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from cropkt.cancers import Cancer

pytestmark = pytest.mark.timeout(600)
SITES = {"eye-clinic": Cancer.UVM, "skin-clinic": Cancer.SKCM}
HUB = "127.0.0.2"  # the coordinator: told apart from what is between the processes of one side
OWN = "127.0.0.1"
SPIED = """
import json, os, sys
target = os.open(os.environ["SPIED"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
def note(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.bind"):
        what = args[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        what = args[0]
    else:
        return
    what = what.decode() if isinstance(what, bytes) else what
    os.write(target, (json.dumps([os.getpid(), event[7:], what]) + "\\n").encode())
sys.addaudithook(note)
os.write(target, (json.dumps([os.getpid(), "began", sys.orig_argv[1:4]]) + "\\n").encode())
"""


class Seen:
    """What the audit hook of a process and of its children saw."""

    def __init__(self, path: Path) -> None:
        self.by_kind: dict[str, list[Any]] = defaultdict(list)
        for line in path.read_text().splitlines():
            _, kind, what = json.loads(line)
            self.by_kind[kind].append(what)

    @property
    def began(self) -> str:
        """The commands of all processes."""
        return " ".join(map(str, self.by_kind["began"]))

    @property
    def peers(self) -> set[tuple[str, int]]:
        """Addresses that were connected or sent to; sockets of the file system are none."""
        found = self.by_kind["connect"] + self.by_kind["sendto"]
        return {(what[0], what[1]) for what in found if isinstance(what, list)}

    @property
    def own(self) -> set[tuple[str, int]]:
        """Addresses that the processes listen on."""
        return {(what[0], what[1]) for what in self.by_kind["bind"] if isinstance(what, list)}

    @property
    def names(self) -> set[str]:
        """Names that were looked up; an address is none."""
        kinds = ("getaddrinfo", "gethostbyname", "gethostbyaddr")
        looked = {str(what) for kind in kinds for what in self.by_kind[kind] if what}
        return {name for name in looked if not re.fullmatch(r"[\d.]+|[0-9a-f:]+", name)}


def hub_of(federation: Any) -> tuple[str, int]:
    """Let the coordinator listen on an address of its own; return it."""
    port = int(federation.host.rpartition(":")[2])
    federation.host = f"{HUB}:{port}"
    federation.init(listen=HUB, min_sites=len(SITES))
    return HUB, port


def add_sites(federation: Any) -> None:
    for seed, (site, cancer) in enumerate(SITES.items()):
        federation.add_site(site, cancer, seed=seed)


def traced(path: Path) -> list[str]:
    """Return a command that writes to `path` what the kernel was asked to connect or send to."""
    if shutil.which("strace") is None:
        say("there is no strace here: the audit hook is the only witness")
        return []
    calls = "trace=connect,sendto,sendmsg,sendmmsg"
    return ["strace", "-D", "-f", "-qq", "--seccomp-bpf", "-e", calls, "-o", str(path)]


def called(path: Path) -> set[str]:
    """Return the network addresses in what `traced` wrote."""
    text = path.read_text() if path.exists() else ""
    four = re.findall(r'sin_port=htons\((\d+)\), sin_addr=inet_addr\("([^"]+)"\)', text)
    six = re.findall(r'sin6_port=htons\((\d+)\).*?inet_pton\(AF_INET6, "([^"]+)"', text)
    return {f"{address} {port}" for port, address in four + six}


def say(text: str) -> None:
    sys.stderr.write(f"\n{text}\n")


def test_a_study_connects_its_sites_to_the_coordinator_and_nobody_else(federation: Any) -> None:
    add_sites(federation)
    hub = hub_of(federation)
    sides = ("server", *SITES)
    spied = {side: federation.folder / f"{side}.spied" for side in sides}
    trace = {side: federation.folder / f"{side}.trace" for side in sides}
    envs = {side: federation.customised(SPIED, SPIED=str(spied[side])) for side in sides}
    under = {side: traced(trace[side]) for side in sides}
    began = time.monotonic()
    coordinator = federation.start("--linger", "0", env=envs["server"], under=under["server"])
    for site, cancer in SITES.items():
        federation.enrol(site, federation.invite(site, cancer), env=envs[site])
        federation.serve(site, cancer, env=envs[site], under=under[site])
    assert coordinator.wait(300) == 0, federation.logs()
    federation.end()
    say(f"a study of two sites under audit: {time.monotonic() - began:.0f} s")

    server = Seen(spied["server"])
    assert hub in server.own, "the audit hook saw nothing"
    assert server.peers == set()
    assert server.names == set()
    assert called(trace["server"]) == set()
    for site in SITES:
        client = Seen(spied[site])
        for part in ("cli import main", "supernode import main", "worker import main"):
            assert part in client.began, "the audit hook did not see all processes"
        assert hub in client.peers
        others = client.peers - client.own - {hub}
        assert others == set()
        assert {address for address, _ in client.own} <= {OWN, "::1"}
        assert client.names <= {"localhost"}
        if under[site]:
            allowed = {f"{address} {port}" for address, port in client.own | {hub}}
            assert f"{hub[0]} {hub[1]}" in called(trace[site])
            assert called(trace[site]) <= allowed
        say(f"{site}: {len(client.by_kind['connect'])} connections, to {sorted(client.peers)}")


def test_a_proxy_carries_all_that_leaves(federation: Any, proxy: Any) -> None:
    add_sites(federation)
    hub = hub_of(federation)
    spied = federation.folder / "client.spied"
    names = ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy")
    env = federation.customised(SPIED, SPIED=str(spied))
    env = {name: value for name, value in env.items() if name not in names}
    through = {**env, "HTTPS_PROXY": f"http://{proxy.host}"}
    began = time.monotonic()
    coordinator = federation.start("--linger", "0")
    invites = {site: federation.invite(site, cancer) for site, cancer in SITES.items()}

    federation.enrol("skin-clinic", invites["skin-clinic"], {**through, "NO_PROXY": HUB})
    assert proxy.asked == [], "NO_PROXY was not honoured"
    assert hub in Seen(spied).peers
    spied.unlink()

    federation.enrol("eye-clinic", invites["eye-clinic"], through)
    enrolled = len(proxy.asked)
    assert enrolled > 0
    federation.serve("eye-clinic", Cancer.UVM, env=through)
    federation.serve("skin-clinic", Cancer.SKCM)
    assert coordinator.wait(300) == 0, federation.logs()
    federation.end()
    say(
        f"through a proxy: {len(proxy.asked)} connections, {enrolled} of them to enrol; "
        f"the study is finished after {time.monotonic() - began:.0f} s"
    )
    assert len(proxy.asked) > enrolled
    assert set(proxy.asked) == {f"{HUB}:{hub[1]}"}
    client = Seen(spied)
    address, port = proxy.host.split(":")
    assert (address, int(port)) in client.peers
    assert client.peers - client.own == {(address, int(port))}


@pytest.mark.parametrize(
    "engine",
    [
        "local",
        pytest.param(
            "ray",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("ray") is None, reason="Ray is not installed"
            ),
        ),
    ],
)
def test_a_simulation_speaks_to_nobody_else(federation: Any, engine: str) -> None:
    spied, trace = federation.folder / "spied", federation.folder / "trace"
    env = federation.customised(SPIED, SPIED=str(spied))
    under = traced(trace)
    began = time.monotonic()
    command = [sys.executable, "-c", "from cropkt_sim.cli import main; main()", "run"]
    command += ["--preset", "demo", "--cancers", "UVM,UCS,CHOL", "--engine", engine]
    done = subprocess.run(
        [*under, *command, "--out", str(federation.folder / "out")],
        capture_output=True,
        text=True,
        env=env,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    say(f"the simulation on {engine} under audit: {time.monotonic() - began:.0f} s")
    seen = Seen(spied)
    assert "cropkt_sim.cli" in seen.began
    if engine == "ray":
        assert "default_worker.py" in seen.began, "the audit hook did not see Ray's workers"
        assert called(trace) or not under, "strace saw nothing of Ray"
    own = {OWN, "::1", f"::ffff:{OWN}"}
    assert {address for address, _ in seen.peers | seen.own} <= own
    assert {line.split()[0] for line in called(trace)} <= own
    assert seen.names <= {"localhost"}


def test_a_busy_port_is_one_line(federation: Any) -> None:
    federation.init()
    first = federation.start()
    log = federation.folder / "server.log"
    federation.until(lambda: "listens on" in log.read_text())
    federation.study = federation.folder / "other"
    federation.init()
    said = federation.complaint("server", "start", str(federation.study), code=78)
    assert f"{federation.host}: cannot listen there (Address already in use)" in said
    assert "Choose another port" in said
    assert first.poll() is None
