"""Tells a signed request from its repetition.

A site signs the time of a request and nothing else of it, and Flower takes a signature for
minutes: whoever got hold of one could ask with it again. Every honest request, and every attempt
to send one again, is signed anew, so a signature that has come before comes from somebody else.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

WINDOW = 310.0  # seconds: Flower takes a signature from 5 before its time until 305 after it
MOST = 1 << 16  # signatures kept of one key: hundreds a second; beyond it the oldest go


class Seen:
    """The signatures that came within `WINDOW`; may be used from several threads.

    Of an ECDSA signature (r, s) only r counts: (r, -s) signs the same, and takes no key to make.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._seen: defaultdict[str, dict[int, float]] = defaultdict(dict)  # in order of time

    def first(self, key: str, signature: bytes) -> bool:
        """Note a signature; return whether it is one, and came for the first time."""
        try:
            r, _ = decode_dss_signature(signature)
        except ValueError:
            return False
        now = self._clock()
        with self._lock:
            seen = self._seen[key]
            while seen and (len(seen) >= MOST or seen[next(iter(seen))] <= now - WINDOW):
                del seen[next(iter(seen))]
            if r in seen:
                return False
            seen[r] = now
            return True

    def forget(self, key: str, signature: bytes) -> None:
        """Let go of a signature with which nothing was done; only its owner's take up memory."""
        with self._lock:
            self._seen[key].pop(decode_dss_signature(signature)[0], None)
