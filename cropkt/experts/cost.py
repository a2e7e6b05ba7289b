"""What a computation costs: operations counted from shapes, and this process's peak memory."""

from __future__ import annotations

from pathlib import Path

import torch

from cropkt.config import ExpertShape

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
BACKWARD = 2  # forward passes that a backward pass costs


def attention_flop(shape: ExpertShape, patches: int) -> float:
    """Return the floating-point operations of one attention network on `patches` patches."""
    pooled = shape.dim * shape.embed + 2 * shape.embed * shape.attention
    return 2.0 * patches * (pooled + shape.attention + shape.embed)


def expert_flop(shape: ExpertShape, patches: int, bags: int) -> float:
    """Return the floating-point operations of one expert's forward pass over `bags` bags."""
    return attention_flop(shape, patches) + 2.0 * bags * shape.embed * shape.bins


class Memory:
    """The peak memory of this process since the object was made.

    On a GPU what torch allocated there; else resident memory, where the system tells (Linux).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: float | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device) / 1e6
        else:
            try:
                _CLEAR.write_text("5")  # the peak becomes what is resident now
                self._before = _resident_peak()
            except OSError:
                self._before = None

    def peak_megabytes(self) -> float | None:
        """Return the peak above what was held at first, in 1e6 bytes; None if nobody knows."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device) / 1e6
        else:
            peak = _resident_peak()
        return max(0.0, peak - self._before)


def _resident_peak() -> float:
    """Return the peak resident memory of this process in 1e6 bytes.

    Raises:
        OSError: this system has no such file, or it lacks the line.
    """
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("no VmHWM")
