"""Losses of training as TensorBoard event files, which stay at the hospital."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cropkt.errors import ConfigError
from cropkt.experts.training import Epoch


def writing(folder: Path) -> Callable[[Epoch], None]:
    """Return what writes the loss of each epoch into a folder of event files.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        fix = "Install cropkt[tensorboard], or leave tensorboard out of site.yaml"
        raise ConfigError("site.yaml", "tensorboard: it is not installed", fix) from None
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    writer = SummaryWriter(str(folder))

    def write(epoch: Epoch) -> None:
        writer.add_scalar("loss", epoch.loss, epoch.number)
        writer.flush()
        if epoch.number == epoch.of:
            writer.close()

    return write
