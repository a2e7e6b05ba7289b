"""Patches on their way to a computation: read ahead, or kept where they are used.

A pass over a cohort reads every bag. Where all bags fit in the memory of the GPU they stay there,
where they fit in that of this machine they stay there after the first pass, else they are read
again in each pass, one group ahead of the computation.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cropkt.cohort.bags import Cohort, PackedBags
from cropkt.cohort.features import SlideFolders
from cropkt.cohort.source import SlideSource

AHEAD = 512 << 20  # bytes of a group up to which the next one is read while it is worked on
GPU_SHARE = 0.4  # of the free memory of a GPU that a cohort may take
HOST_SHARE = 0.4  # of this process's part of the free memory

Place = Literal["device", "host", "streamed"]

log = logging.getLogger(__name__)


def packed(
    cohort: Cohort, groups: Sequence[NDArray[np.int64]]
) -> Iterator[tuple[NDArray[np.int64], PackedBags]]:
    """Yield each group of patients with its bags, reading the next one meanwhile.

    At most two groups are in memory; one, where a group is large or nothing is read.
    """
    if isinstance(cohort.source, Held):
        for group in groups:
            yield group, cohort.pack(group)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        coming = None
        for at, group in enumerate(groups):
            bags = cohort.pack(group) if coming is None else coming.result()
            more = at + 1 < len(groups) and bags.patches.nbytes <= AHEAD
            coming = pool.submit(cohort.pack, groups[at + 1]) if more else None
            yield group, bags


def settled(cohort: Cohort, device: torch.device) -> tuple[Cohort, Place]:
    """Return the cohort with its patches kept where there is room, and where that is.

    Nothing is read before it is asked for.

    Args:
        cohort: of slides on disk.
        device: where it will be computed on.
    """
    first, started = cohort.slides[0][0], time.perf_counter()
    read = cohort.source.features(first)
    seconds = time.perf_counter() - started
    each = read.element_size() * cohort.dim
    size = each * sum(cohort.patches(i) for i in range(len(cohort)))
    place = place_of(size, device)
    where = {"device": str(device), "host": "memory", "streamed": "the disk"}[place]
    again = ", and are read again in each pass" if place == "streamed" else ""
    log.info("%s: %.2f GB of features stay on %s%s", cohort.cancer, size / 1e9, where, again)
    if isinstance(cohort.source, SlideFolders) and cohort.source.compressed(first):
        log.info(
            "%s: the slides are compressed, which takes about %.1f s of each reading; a pack "
            "(cropkt-client pack, or cropkt-sim pack) takes %.2f GB of disk and no such time",
            *(cohort.cancer, seconds * size / read.nbytes, size / 1e9),
        )
    if place == "streamed":
        return cohort, place
    target = device if place == "device" else torch.device("cpu")
    return replace(cohort, source=Held(cohort.source, target)), place


def place_of(size: int, device: torch.device) -> Place:
    """Return where so many bytes of features should lie, by the memory that is free now."""
    if device.type == "cuda" and size <= GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    return "host" if size <= HOST_SHARE * free_memory() else "streamed"


def free_memory() -> float:
    """Return this process's part of the memory that is free: others may run on the other cores."""
    processes = max(1, (os.cpu_count() or 1) // torch.get_num_threads())
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        return 1024 * free / processes
    except (OSError, StopIteration):  # not Linux: half of what is built in
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 / processes


class Held(SlideSource):
    """Slides of another source, each kept from when it is first read.

    A copy that travels to another process takes no patches along.
    """

    def __init__(self, source: SlideSource, device: torch.device) -> None:
        self.source, self.device = source, device
        self._kept: dict[str, Tensor] = {}

    def __contains__(self, slide_id: object) -> bool:
        return slide_id in self.source

    def shape(self, slide_id: str) -> tuple[int, int]:
        """Return (patches, width)."""
        kept = self._kept.get(slide_id)
        return self.source.shape(slide_id) if kept is None else (kept.shape[0], kept.shape[1])

    def features(self, slide_id: str) -> Tensor:
        """Return (N, D) features in storage dtype; shared by all who ask, so not to be changed."""
        kept = self._kept.get(slide_id)
        if kept is None:
            kept = self._kept[slide_id] = self.source.features(slide_id).to(self.device)
        return kept

    def stamp(self, slide_id: str) -> str:
        """Return what changes when the slide's features do."""
        return self.source.stamp(slide_id)

    def coords(self, slide_id: str) -> Tensor | None:
        """Return (N, 2) positions, or None."""
        return self.source.coords(slide_id)

    def slide_ids(self) -> Iterable[str]:
        """Return the ids of all slides, sorted."""
        return self.source.slide_ids()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}
