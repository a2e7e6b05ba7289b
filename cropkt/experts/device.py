"""Where training runs: a device by name, and bags on their way to it.

A module says where it lies by its parameters; what is computed with it goes there. Whatever is
drawn at random is drawn on the CPU, so that a seed means the same on every device.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from cropkt.cohort.bags import PackedBags
from cropkt.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """Return the device of a name: auto, cuda[:i], cpu or mps.

    `auto` is the first GPU, or Apple's, or else the CPU.

    Raises:
        ConfigError: this machine has no such device; says which it has.
    """
    here = available_devices()
    if name == "auto":
        return torch.device(here[0])
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in here:
        problem = f"torch finds no {name} on this machine, only {', '.join(here)}"
        raise ConfigError("device", problem, "Name one of these, or auto, or check the GPU driver")
    return torch.device(wanted)


def available_devices() -> list[str]:
    """Return the names of this machine's devices, the fastest first."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [*cuda, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def problem_with_device(name: str) -> str:
    """Return why a device cannot be used, or nothing; for a process that itself loads no torch."""
    try:
        resolve_device(name)
    except ConfigError as error:
        return error.problem
    return ""


def device_of(module: nn.Module) -> torch.device:
    """Return where a module lies."""
    return next(module.parameters()).device


def room(device: torch.device) -> int:
    """Return how many numbers the layers of one update may take: 1 GiB, or a quarter of a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // 16
    return 1 << 28


def moved(bags: PackedBags, device: torch.device) -> PackedBags:
    """Return the bags on a device, in the type they were stored in: half as many bytes travel."""
    return replace(bags, patches=bags.patches.to(device), segment=bags.segment.to(device))
