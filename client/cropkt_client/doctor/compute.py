"""Can this machine train: device, memory, disks; and how long will one expert take here?"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from cropkt.cancers import Cancer
from cropkt.checkup import Finding, disk, fail, ok, skipped, warn
from cropkt.config import StudyConfig
from cropkt.errors import CropktError
from cropkt_client.doctor import machine
from cropkt_client.doctor.folds import at_least
from cropkt_client.doctor.trial import Kernel, Trial
from cropkt_client.worker import Worker

GB = 1e9
CLOSE = 1e-3  # how far a device's product may be from the CPU's: TF32 has ten bits
LITTLE_MEMORY, TOO_LITTLE_MEMORY = 8 * GB, 2 * GB
LITTLE_SHARED = 64e6
NIGHT = 12 * 3600.0  # seconds

_FREE = "Free some, or move `state` in site.yaml to a larger disk"


class Compute:
    """The machine of one site; counts of patients are shown from `fewest` on."""

    def __init__(self, config: Path, state: Path, device: str, *, fewest: int = 0) -> None:
        self._config, self._state, self._device = config, state, device
        self._usable, self._fewest = False, fewest

    def checks(self) -> Iterator[Finding]:
        """Yield a finding a check."""
        yield from self._kernel()
        yield _memory()
        yield disk(self._state, _FREE)
        yield _shared()

    def probe(
        self, cohorts: Mapping[Cancer, int], study: StudyConfig, seconds: float
    ) -> Iterator[Finding]:
        """Yield how long one expert of each cancer will take.

        Args:
            cohorts: cancers whose data can be used, with their patients.
            study: what the study asks.
            seconds: that all trials together may take; 0: none.
        """
        if seconds <= 0 or not cohorts or not self._usable:
            why = "no patients' data can be used" if self._usable else "the device cannot be used"
            yield skipped("one expert", "not asked for" if seconds <= 0 else why)
            return
        for cancer in cohorts:
            yield self._trial(cancer, study, seconds / len(cohorts))

    def _kernel(self) -> Iterator[Finding]:
        check = "device"
        try:
            found = self._try("kernel", self._device)
        except CropktError as error:
            fix = "Check the GPU driver, or use --device cpu"
            yield fail(check, f"{self._device} cannot be used: {error.problem}", fix)
            return
        if not isinstance(found, Kernel) or found.problem:
            problem = found.problem if isinstance(found, Kernel) else "it gave no answer"
            yield fail(check, problem, "Name another with --device, or check the GPU driver")
            return
        if not found.error < CLOSE:
            problem = f"{found.device} computes wrongly: off by {found.error:.1e} from the CPU"
            yield fail(check, problem, "Do not train on it; test its memory, or use --device cpu")
            return
        self._usable = True
        version = machine.driver()
        if found.device == "cpu" and version and self._device == "auto":
            problem = f"torch takes the CPU: it does not find the GPU (driver {version})"
            yield warn(check, problem, "Install a torch built for this driver's CUDA")
            return
        with_driver = f", driver {version}" if found.free is not None and version else ""
        yield ok(check, f"{found.device}{with_driver}: a matrix product is right")
        if found.free is not None and found.total is not None:
            yield _gpu_memory(found.free, found.total)

    def _trial(self, cancer: Cancer, study: StudyConfig, seconds: float) -> Finding:
        check = f"one expert of {cancer}"
        try:
            found = self._try("trial", self._config, cancer, study, self._device, seconds)
        except CropktError as error:
            fix = "See the memory above: train on a machine with more, or with shorter bags"
            return fail(check, f"training broke off: {error.problem}", fix)
        if not isinstance(found, Trial):
            return fail(check, "training gave no answer", "Report this as a fault of cropkt")
        text = (
            f"about {span(found.seconds)} on {found.device} ({found.models} models side by side, "
            f"{found.epochs} epochs, {at_least(found.patients, self._fewest)} patients, "
            f"{found.patches} patches); {found.how}"
        )
        if found.seconds > NIGHT:
            return warn(check, text, "Longer than a night: use a GPU if there is one (--device)")
        return ok(check, text)

    def _try(self, what: str, *arguments: object) -> Kernel | Trial:
        """Return what a function of `trial` finds, in a process of its own.

        Raises:
            TrainingFailedError: it raised, or its process died.
        """
        environment = {"CROPKT_DEVICE": self._device}
        worker = Worker("cropkt_client.doctor.trial:run", environment)
        try:
            found: Kernel | Trial = worker.call(what, *arguments)
        finally:
            worker.stop()
        return found


def span(seconds: float) -> str:
    """Return a time in words: 40 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _gpu_memory(free: int, total: int) -> Finding:
    text = f"{free / GB:.1f} of {total / GB:.1f} GB free"
    if free < total / 2:
        return warn("GPU memory", text, "Another process uses it: see nvidia-smi")
    return ok("GPU memory", text)


def _memory() -> Finding:
    known = machine.memory()
    if known is None:
        return skipped("memory", "this system does not tell")
    available, total = known
    text = f"{available / GB:.1f} of {total / GB:.1f} GB available"
    if available < TOO_LITTLE_MEMORY:
        return fail("memory", text, "Training needs more: end other programs, or raise the limit")
    if available < LITTLE_MEMORY:
        return warn("memory", text, "Large bags may not fit: end other programs")
    return ok("memory", text)


def _shared() -> Finding:
    try:
        free = shutil.disk_usage(machine.SHARED).free
    except OSError:
        return skipped("shared memory", f"this system has no {machine.SHARED}")
    text = f"{free / GB:.2f} GB free in {machine.SHARED}"
    if free < LITTLE_SHARED:
        return warn("shared memory", text, "In a container, start it with --shm-size=1g")
    return ok("shared memory", text)
