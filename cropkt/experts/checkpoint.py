"""Where a training stands, in one file, so that a killed training goes on instead of anew.

A training that is resumed gives the same weights, bit for bit, as one that was never stopped; only
a private one goes on with other noise. A kill costs at most one epoch; or two seconds, or ten
times what a write takes, where that is longer: many short epochs do not wait for the disk. The
file is a plain npz archive, never a pickle, and its checksums are verified when it is read.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cropkt.files import write_atomically

PAUSE = 2.0  # seconds between writes, at least
SHARE = 0.1  # of the time, at most, is spent on writes
Arrays = dict[str, NDArray[Any]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """All that changes while a training runs, but for the epoch. Restored in place."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    rng: np.random.Generator | None = None  # of the order of patients; None: a secret one, not kept
    generators: Sequence[torch.Generator] = ()  # of dropout, on the CPU

    def arrays(self) -> Arrays:
        """Return the tensors by name."""
        found = {f"module/{name}": value for name, value in self.module.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
        found |= {f"generator/{i}": g.get_state() for i, g in enumerate(self.generators)}
        return {name: value.cpu().numpy() for name, value in found.items()}

    def restore(self, arrays: Arrays, rng: dict[str, Any] | None) -> None:
        """Take over what `arrays` gave and the generator's state.

        Raises:
            ValueError: the tensors are not those of this training; nothing was changed.
        """
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        parts: dict[str, dict[str, Tensor]] = {"module": {}, "optimizer": {}, "generator": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        own = self.module.state_dict()
        if {n: v.shape for n, v in own.items()} != {n: v.shape for n, v in parts["module"].items()}:
            raise ValueError("weights of another shape")
        if len(parts["generator"]) != len(self.generators):
            raise ValueError("another number of generators")
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, what = name.partition("/")
            state.setdefault(int(index), {})[what] = tensor
        if self.rng is not None:
            if rng is None:
                raise ValueError("no state of the order of patients")
            self.rng.bit_generator.state = rng  # checks what it gets
        self.module.load_state_dict(parts["module"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        for i, generator in enumerate(self.generators):
            generator.set_state(parts["generator"][str(i)])


class Checkpoint:
    """The file of one training.

    Args:
        path: where it lies; whatever was there is replaced.
        key: what is trained, from which data: another key's file is not resumed from.
    """

    def __init__(self, path: Path, *, key: str) -> None:
        self.path, self.key = path, key
        self._settled: dict[str, bool] = {}
        self._due = time.monotonic() + PAUSE

    def resume(self, training: Training) -> int:
        """Bring `training` to where it stood; return how many epochs that were, 0 for none.

        A file that is damaged, or another training's, is not used, with a warning.
        """
        for torn in self.path.parent.glob(f".{self.path.name}.*"):
            torn.unlink()  # of a write that was cut off
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                about = json.loads(str(stored["about"]))
                if about["key"] != self.key:
                    log.warning("%s is of another training; it begins anew", self.path)
                    return 0
                arrays = {name: stored[name] for name in stored.files if name != "about"}
            epoch = int(about["epoch"])
            training.restore(arrays, about["rng"])
        except FileNotFoundError:
            log.info("training begins")
            return 0
        except Exception as error:  # whatever zip, npy or JSON make of a damaged file
            log.warning("%s is damaged (%s); it begins anew", self.path, type(error).__name__)
            return 0
        log.info("training resumes after epoch %d", epoch)
        return epoch

    def settled(self, name: str, choose: Callable[[], bool]) -> bool:
        """Return how a question was settled when this training began, by `choose` if it begins.

        So a training that is resumed goes on in the same way, on whatever machine.
        """
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                about = json.loads(str(stored["about"]))
                if about["key"] == self.key:
                    self._settled |= about.get("settled", {})
        except Exception:  # `resume` says what is wrong with the file
            self._settled = {}
        if name not in self._settled:
            self._settled[name] = choose()
        return self._settled[name]

    def save(self, training: Training, epoch: int) -> None:
        """Keep where `training` stands after `epoch` epochs, unless the last write is recent."""
        started = time.monotonic()
        if started < self._due:
            return
        rng = None if training.rng is None else training.rng.bit_generator.state
        about = {"key": self.key, "epoch": epoch, "rng": rng}
        if self._settled:
            about["settled"] = self._settled
        contents: dict[str, Any] = {"about": np.array(json.dumps(about)), **training.arrays()}
        try:
            write_atomically(self.path, lambda file: np.savez(file, **contents))
        except OSError as error:  # a full disk must not end the training
            log.warning("%s cannot be written: %s", self.path, error.strerror)
        ended = time.monotonic()
        self._due = ended + max(PAUSE, (ended - started) * (1 - SHARE) / SHARE)
