"""The board's own process: alone, or as the child of a coordinator that it never disturbs."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import typer
import uvicorn

from cropkt.errors import UsageError
from cropkt.files import write_private
from cropkt_server.settings import load_settings

log = logging.getLogger("cropkt.server")

URL_NAME = "board.url"  # holds the token: for the owner of the study's folder alone
_FAREWELL = 3  # seconds that answers under way get
_START = "from cropkt_server.cli import main; main()"


def serve(folder: Path, *, host: str, port: int, with_parent: bool = False) -> None:
    """Show the board of a study until it is interrupted; print its address first.

    Args:
        folder: the study's.
        host: the address of this machine to listen on.
        port: and the port; 0 chooses one.
        with_parent: end when standard input does, which is when the parent process does.

    Raises:
        ConfigError: there is no study, or the port is taken.
        UsageError: the host is no address.
    """
    from cropkt_server.board.app import board  # torch loads here
    from cropkt_server.public import listening

    load_settings(folder)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        fix = "Give one of this machine, such as 127.0.0.1"
        raise UsageError("--host", f"{host!r} is no address", fix) from None
    listener, token = listening(str(address), port), secrets.token_urlsafe(32)
    port = int(listener.getsockname()[1])
    app = board(folder, token=token, host=str(address), port=port)
    server = _Server(
        uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            loop="asyncio",
            http="h11",
            access_log=False,  # it would write the token
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_FAREWELL,
        )
    )
    typer.echo(f"http://{_shown(address)}:{port}/?token={token}")
    if not address.is_loopback:
        warning = "whoever sees this network sees the token; ssh -L and 127.0.0.1 are safer"
        typer.secho(f"cropkt-server: {warning}", fg="yellow", err=True)
    if with_parent:
        threading.Thread(target=_end_with_parent, args=(server,), daemon=True).start()
    server.run([listener])
    if server.interrupted:
        raise KeyboardInterrupt


class _Server(uvicorn.Server):
    """Remembers whether Ctrl-C ended it, which `run` does not always tell."""

    interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end."""
        self.interrupted |= sig == signal.SIGINT
        super().handle_exit(sig, frame)


@contextlib.contextmanager
def beside(folder: Path, port: int, tell: Callable[[str], None]) -> Iterator[None]:
    """Show the board from a child process while the block runs.

    Whatever becomes of the child, the block goes on. Its address is in `board.url`, too.

    Args:
        folder: the study's.
        port: for the board.
        tell: takes the address.
    """
    url = folder / URL_NAME
    url.unlink(missing_ok=True)
    command = [sys.executable, "-P", "-c", _START, "board", str(folder)]
    child = subprocess.Popen(
        [*command, "--port", str(port), "--with-parent"],
        stdin=subprocess.PIPE,  # closed by the kernel when this process ends, however it ends
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C is the coordinator's
    )

    def listen() -> None:
        for line in child.stdout or ():
            if "?token=" in line:
                write_private(url, line.encode())
                tell(f"the board: {line.strip()}")
            else:
                log.warning("the board: %s", line.strip())
        if not ending.is_set():
            log.warning("the board has ended with code %d; the study goes on", child.wait())

    ending = threading.Event()
    thread = threading.Thread(target=listen, name="cropkt-board", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(2 * _FAREWELL)
        child.kill()
        child.wait()
        thread.join(_FAREWELL)
        url.unlink(missing_ok=True)
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()


def _end_with_parent(server: uvicorn.Server) -> None:
    sys.stdin.buffer.read()
    server.should_exit = True


def _shown(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """Return an address as a browser takes it."""
    if address.is_unspecified:
        return "localhost"
    return f"[{address}]" if address.version == 6 else str(address)
