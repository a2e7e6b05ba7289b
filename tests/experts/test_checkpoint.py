"""A training's file: what it takes to resume, and everything that may be wrong with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cropkt.config import ExpertShape, TrainingConfig
from cropkt.experts import checkpoint as module
from cropkt.experts.abmil import Abmil, flatten
from cropkt.experts.checkpoint import Checkpoint
from cropkt.experts.training import Epoch, Plan, train_experts

CONFIG = TrainingConfig(epochs=5, learning_rate=1e-2)
Train = Callable[..., bytes]


@pytest.fixture(autouse=True)
def every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setattr(module, "SHARE", 1.0)


@pytest.fixture
def train(make_cohort: Callable[..., Any], shape: ExpertShape) -> Train:
    """Train three models; return their weights."""
    cohort = make_cohort()
    folds = np.arange(len(cohort)) % 2

    def run(checkpoint: Checkpoint | None = None, *, stop_after: int = 0) -> bytes:
        def hook(epoch: Epoch) -> None:
            if epoch.number == stop_after:
                raise KeyboardInterrupt

        experts = train_experts(
            cohort,
            Plan(folds, ((), (0,), (1,))),
            initial=Abmil.initial(shape, seed=1, models=3),
            config=CONFIG,
            seed=2,
            on_epoch=hook,
            checkpoint=checkpoint,
        )
        return flatten(experts).numpy().tobytes()

    return run


@pytest.fixture
def stopped(train: Train, tmp_path: Path) -> Path:
    """Return the file of a training that was stopped after three epochs."""
    path = tmp_path / "training.npz"
    with pytest.raises(KeyboardInterrupt):
        train(Checkpoint(path, key="a"), stop_after=3)
    return path


@pytest.mark.parametrize("epoch", range(1, 6))
def test_resumed_after_any_epoch_it_is_the_same(train: Train, tmp_path: Path, epoch: int) -> None:
    path = tmp_path / "training.npz"
    with pytest.raises(KeyboardInterrupt):
        train(Checkpoint(path, key="a"), stop_after=epoch)
    assert train(Checkpoint(path, key="a")) == train()


def _shorter(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flipped(content: bytes) -> bytes:
    middle = content.index(b"module/project.npy") + 300
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [_shorter, _flipped, lambda _: b"", lambda _: b"\x80\x04N.", lambda _: b"nonsense"]
)
def test_a_damaged_file_is_not_used(
    train: Train,
    stopped: Path,
    damage: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    stopped.write_bytes(damage(stopped.read_bytes()))
    assert train(Checkpoint(stopped, key="a")) == train()
    assert "is damaged" in caplog.text


def test_another_trainings_file_is_not_used(
    train: Train, stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(Checkpoint(stopped, key="b")) == train()
    assert "is of another training" in caplog.text


def test_a_file_with_other_tensors_is_not_used(
    train: Train, stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with np.load(stopped) as stored:
        arrays = {name: stored[name] for name in stored.files}
    arrays["module/head"] = arrays["module/head"][:1]
    np.savez(stopped, **arrays)
    assert train(Checkpoint(stopped, key="a")) == train()
    assert "is damaged (ValueError)" in caplog.text


def test_the_file_holds_no_pickle(stopped: Path) -> None:
    with np.load(stopped, allow_pickle=False) as stored:
        assert all(stored[name].dtype != object for name in stored.files)


def test_what_a_cut_off_write_left_is_cleared(train: Train, stopped: Path) -> None:
    torn = stopped.with_name(f".{stopped.name}.0123abcd")
    torn.write_bytes(b"half")
    train(Checkpoint(stopped, key="a"))
    assert not torn.exists()


def test_a_short_training_writes_nothing(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE", 60.0)
    train(Checkpoint(tmp_path / "training.npz", key="a"))
    assert not list(tmp_path.iterdir())


def test_slow_writes_are_rare(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARE", 0.001)
    writes: list[Path] = []

    def slow(path: Path, _: object) -> None:
        writes.append(path)
        time.sleep(0.05)

    monkeypatch.setattr(module, "write_atomically", slow)
    train(Checkpoint(tmp_path / "training.npz", key="a"))
    assert len(writes) == 1


def test_a_full_disk_ends_no_training(
    train: Train,
    stopped: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cropkt.files.os.fsync", full)
    with caplog.at_level(logging.WARNING):
        assert train(Checkpoint(stopped, key="a")) == train()
    assert "cannot be written: No space left" in caplog.text
    assert [file.name for file in stopped.parent.iterdir()] == [stopped.name]


def test_the_global_generator_is_left_alone(train: Train, stopped: Path) -> None:
    before = torch.get_rng_state()
    train(Checkpoint(stopped, key="a"))
    assert torch.equal(torch.get_rng_state(), before)
