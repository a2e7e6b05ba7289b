"""What this machine does faster, found by a short measurement, once a process, and logged.

Both choices change results by rounding alone. They are asked only where the work is large: small
models take one way on every machine, so that the same seed gives the same digits.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from functools import cache

import torch

LARGE = 1 << 18  # weights of a first layer from which on its precision is worth a measurement
PAYS = 1.5  # bfloat16 is used where it is at least so many times faster
REPEATS = 5

log = logging.getLogger(__name__)


def compute_type(device: torch.device, dim: int, embed: int) -> torch.dtype:
    """Return the type of an expert's products: bfloat16 where its products are much faster.

    Args:
        device: where they run.
        dim: width of the features.
        embed: width of the embedding.
    """
    if dim * embed < LARGE or device.type == "mps":
        return torch.float32
    return _faster_type(device)


def faster(
    one: Callable[[], object],
    other: Callable[[], object],
    device: torch.device,
    *,
    repeats: int = REPEATS,
) -> float:
    """Return how many times faster `other` is than `one`: the ratio of medians, interleaved."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for work, took in zip((one, other), times, strict=True):
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:  # the first one warms up
                took.append(time.perf_counter() - started)
    return statistics.median(times[0]) / statistics.median(times[1])


@cache
def _faster_type(device: torch.device) -> torch.dtype:
    rows = 256 if device.type == "cpu" else 8192
    wide = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(0)).to(device)
    weight = torch.ones(512, 1024, device=device)
    narrow = wide.bfloat16(), weight.bfloat16()
    with torch.inference_mode():
        gain = faster(lambda: wide @ weight.t(), lambda: narrow[0] @ narrow[1].t(), device)
    chosen = torch.bfloat16 if gain >= PAYS else torch.float32
    log.info("bfloat16 products are %.2f times as fast on %s: %s is used", gain, device, chosen)
    return chosen
