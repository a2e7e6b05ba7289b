"""Losses of training as TensorBoard reads them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.errors import ConfigError
from cropkt.experts.training import Epoch
from cropkt.messages import ExpertRequest
from cropkt_client import tasks
from cropkt_client.curves import writing
from cropkt_client.site import Site


def test_every_epoch_has_its_loss(tmp_path: Path) -> None:
    folder = tmp_path / "curves" / "fit_expert" / "leiden"
    write = writing(folder)
    for number in (1, 2, 3):
        write(Epoch(number=number, of=3, loss=1 / number))
    told = EventAccumulator(str(folder)).Reload().Scalars("loss")
    assert [event.step for event in told] == [1, 2, 3]
    assert [event.value for event in told] == pytest.approx([1, 1 / 2, 1 / 3])
    assert folder.stat().st_mode & 0o077 == 0


def test_a_site_writes_them_where_site_yaml_says(
    make_site: Callable[..., Site], study: StudyConfig
) -> None:
    site = make_site(Cancer.UVM)
    assert site.on_epoch(ExpertRequest(task="t", study=study, cancer=Cancer.UVM)) is None
    site = replace(site, config=replace(site.config, tensorboard=Path("curves")))
    request = ExpertRequest(task="fit/../../../x", study=study, cancer=Cancer.UVM)
    tasks.fit_expert(request, site)
    (folder,) = (site.folder / "curves").iterdir()
    assert folder.name == "fit-..-..-..-x"
    losses = EventAccumulator(str(folder)).Reload().Scalars("loss")
    assert losses[0].value > losses[-1].value > 0


def test_without_tensorboard_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"cropkt\[tensorboard\]"):
        writing(tmp_path)
