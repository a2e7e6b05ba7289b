"""What this machine can do, patients to measure with, and how the benchmarks take time."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from cropkt.cancers import Cancer
from cropkt.cohort.bags import Cohort
from cropkt.cohort.pack import Pack, write_pack

Work = Callable[[], object]


def medians(works: Mapping[str, Work], *, repeats: int) -> dict[str, float]:
    """Return the median seconds of each piece of work; they take turns, after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if repeat:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(took) for name, took in times.items()}


def gemm_peak(*, rows: int = 1024, dim: int = 1536, width: int = 2048) -> float:
    """Return the float32 operations a second of a large product: the best of five."""
    one, two = torch.randn(rows, dim), torch.randn(width, dim)
    return 2.0 * rows * dim * width / _best(lambda: one @ two.t())


def memory_bandwidth(size: int = 1 << 28) -> float:
    """Return bytes a second that are read from memory: the best of five sums."""
    values = torch.ones(size // 4)
    return size / _best(values.sum)


def disk_bandwidth(path: Path) -> float:
    """Return bytes a second that a file is read with, mostly from the system's cache."""
    return path.stat().st_size / _best(lambda: np.fromfile(path, dtype=np.uint8))


def describe() -> str:
    """Return the machine, its load and the versions in one line."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    kinds = [name for name in ("avx2", "avx512f", "amx_bf16") if _has(name)]
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} cores of {model} ({', '.join(kinds)}), "
        f"{torch.get_num_threads()} thread, load average {load:.1f}, "
        f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    )


def random_cohort(folder: Path, *, patients: int, patches: int, dim: int) -> Cohort:
    """Return random patients with one float16 slide each, in a pack on disk."""
    rng = np.random.default_rng(0)
    ids = tuple(f"P{i:05d}" for i in range(patients))
    bags = ((i, rng.normal(size=(patches, dim)).astype(np.float16)) for i in ids)
    write_pack(folder / "pack", bags, dim=dim, dtype=np.float16)
    return Cohort(
        cancer=Cancer.UVM,
        endpoint="DSS",
        dim=dim,
        patient_ids=ids,
        days=rng.integers(1, 4000, patients).astype(np.float64),
        event=rng.random(patients) < 0.3,
        hospital=("",) * patients,
        slides=tuple((i,) for i in ids),
        source=Pack(folder / "pack"),
    )


def _best(work: Work) -> float:
    took = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        took.append(time.perf_counter() - started)
    return min(took)


def _has(flag: str) -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and f" {flag}" in info.read_text()
