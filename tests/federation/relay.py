"""What stands between sites and coordinator, on loopback: a network, and a hospital's proxy.

The relay forwards bytes, counts them, and can do what networks do: refuse, cut, fall silent, be
slow. The proxy notes whom it was asked for.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time

PIECE = 16 << 10  # bytes forwarded at once


class Relay:
    """Forwards one loopback port to another; all its settings may change at any time.

    Args:
        address: of the port that it opens.

    Attributes:
        host: "address:port" that it opens.
        target: the port of 127.0.0.1 that it forwards to.
        rate: bytes a second each way, all connections together; None for no limit.
        cut: chance that a piece is lost and its connection with it.
        opened: when each connection was made, by `time.monotonic`.
        up, down: bytes forwarded to the target, and from it.
    """

    def __init__(self, address: str = "127.0.0.1") -> None:
        self._listener = socket.create_server((address, 0))
        self._where = self._listener.getsockname()
        self.host = f"{address}:{self._where[1]}"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.target: int = probe.getsockname()[1]
        self.rate: float | None = None
        self.cut, self._random = 0.0, random.Random(7)
        self.opened: list[float] = []
        self.up = self.down = self.cuts = 0
        self._silent = threading.Event()
        self._links: dict[socket.socket, threading.Event] = {}
        self._turn = {True: threading.Lock(), False: threading.Lock()}
        self._closed = False
        self._accept(self._listener)

    def lose(self) -> None:
        """Cut every connection and refuse new ones."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for link in list(self._links):
            _break(link)

    def restore(self) -> None:
        """Take connections again."""
        self._listener = socket.create_server(self._where)
        self._accept(self._listener)

    def fall_silent(self) -> None:
        """Swallow what comes, and say nothing, on every connection there is and will be."""
        self._silent.set()
        for mute in list(self._links.values()):
            mute.set()

    def speak(self) -> None:
        """Forward new connections again; the silent ones stay silent."""
        self._silent.clear()

    def close(self) -> None:
        """Cut everything, for good."""
        self._closed = True
        with contextlib.suppress(OSError):
            self.lose()

    def _accept(self, listener: socket.socket) -> None:
        def run() -> None:
            while True:
                try:
                    near, _ = listener.accept()
                except OSError:
                    return  # lost
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

        threading.Thread(target=run, daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        self.opened.append(time.monotonic())
        mute = threading.Event()
        if self._silent.is_set():
            mute.set()
        with near:
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return  # the coordinator is not there
            with far:
                self._links |= {near: mute, far: mute}
                back = threading.Thread(target=self._forward, args=(far, near, mute, False))
                back.start()
                self._forward(near, far, mute, True)
                back.join()
                del self._links[near], self._links[far]

    def _forward(
        self, source: socket.socket, sink: socket.socket, mute: threading.Event, up: bool
    ) -> None:
        try:
            while piece := source.recv(PIECE):
                if mute.is_set():
                    continue
                if self._random.random() < self.cut:
                    self.cuts += 1
                    raise ConnectionAbortedError
                if self.rate is not None:
                    with self._turn[up]:
                        time.sleep(len(piece) / self.rate)
                sink.sendall(piece)
                if up:
                    self.up += len(piece)
                else:
                    self.down += len(piece)
            if not mute.is_set():
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            _break(source)
            _break(sink)


def _break(link: socket.socket) -> None:
    """End a connection at once, and wake whoever reads from it."""
    with contextlib.suppress(OSError):
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        link.shutdown(socket.SHUT_RDWR)


class Proxy:
    """An HTTP proxy that knows CONNECT alone; `asked` are the "host:port" that were asked for."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked: list[str] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += near.recv(1)
            method, where, _ = head.split(b" ", 2)
            if method != b"CONNECT":
                near.sendall(b"HTTP/1.1 405 Method Not Allowed\r\n\r\n")
                return
            self.asked.append(where.decode())
            address, _, port = where.decode().rpartition(":")
            with socket.create_connection((address, int(port))) as far:
                near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=_copy, args=(far, near))
                back.start()
                _copy(near, far)
                back.join()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    """Forward until one side ends."""
    with contextlib.suppress(OSError):
        while piece := source.recv(PIECE):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)
