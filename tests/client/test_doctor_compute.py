"""What the doctor says of a machine, and of how long an expert will take on it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cropkt.cancers import Cancer
from cropkt.checkup import Finding, disk, show
from cropkt.config import StudyConfig
from cropkt.errors import TrainingFailedError
from cropkt_client.doctor import compute, machine
from cropkt_client.doctor.compute import Compute, span
from cropkt_client.doctor.trial import Kernel, Trial, Update, kernel, run, trial
from cropkt_client.site import Site

DOCTOR = [sys.executable, "-c", "from cropkt_client.cli import main; main()", "doctor"]


@pytest.mark.slow
def test_a_command_from_end_to_end(make_site: Callable[..., Site], tmp_path: Path) -> None:
    make_site()
    config = tmp_path / "UVM" / "site.yaml"
    config.write_text(f"{config.read_text()}encoder: UNI2-h\n")
    command = [*DOCTOR, "--config", str(config), "--probe", "1", "--device", "cpu"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (ran.returncode, ran.stderr) == (1, "")  # nobody invited this site
    lines = ran.stdout.splitlines()
    assert {line.split()[0] for line in lines[:-1]} <= {"ok", "warn", "fail", "skipped"}
    failed = [line for line in lines if line.startswith("fail")]
    assert len(failed) == 1
    assert "connection: enrolment" in failed[0]
    assert any("compute: device: cpu: a matrix product is right" in line for line in lines)
    (time,) = [line for line in lines if "time: one expert of UVM: about" in line]
    assert "16 models side by side, 20 epochs, 48 patients" in time
    assert "SECRET" not in ran.stdout
    assert lines[-1].endswith("1 fail, 11 skipped")


def test_a_device_that_is_not_there(tmp_path: Path, make_site: Callable[..., Site]) -> None:
    site = make_site()
    config = site.folder / "site.yaml"
    checked = Compute(config, site.state, "cuda:7")
    found = {finding.check: finding for finding in checked.checks()}
    assert found["device"].word == "fail"
    assert "torch finds no cuda:7 on this machine" in found["device"].found
    assert "--device" in found["device"].fix
    (skipped,) = checked.probe({Cancer.UVM: 48}, StudyConfig(), 5.0)
    assert (skipped.word, skipped.found) == ("skipped", "the device cannot be used")
    assert show([found["device"]], as_json=True) == 1


def test_a_training_that_breaks_off(make_site: Callable[..., Site], study: StudyConfig) -> None:
    site = make_site()
    checked = Compute(site.folder / "site.yaml", site.state, "cpu")
    checked._usable = True
    (site.folder / "outcomes.csv").unlink()
    (failed,) = checked.probe({Cancer.UVM: 48}, study, 5.0)
    assert failed.word == "fail"
    assert "training broke off: it raised OutcomeTableError" in failed.found
    (none,) = checked.probe({Cancer.UVM: 48}, study, 0.0)
    assert (none.word, none.found) == ("skipped", "not asked for")


def test_the_kernel_is_a_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < kernel("cpu").error < 1e-5
    assert "torch finds no cuda:7" in kernel("cuda:7").problem
    product = torch.Tensor.__matmul__

    def wrong(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return product(left, right) * (1.01 if left.dtype == torch.float32 else 1)

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    assert kernel("cpu").error > compute.CLOSE


@pytest.mark.parametrize(
    ("found", "word", "says"),
    [
        (Kernel(device="cpu", error=0.1), "fail", "computes wrongly"),
        (Kernel(device="cpu", error=float("nan")), "fail", "computes wrongly"),
        (Kernel(device="cpu", error=1e-7), "warn", "does not find the GPU (driver 999.1)"),
        (Kernel(device="cuda:0 (X)", free=9, total=10), "ok", "cuda:0 (X), driver 999.1"),
    ],
)
def test_what_a_kernel_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Kernel, word: str, says: str
) -> None:
    monkeypatch.setattr(Compute, "_try", lambda *_: found)
    monkeypatch.setattr(machine, "driver", lambda: "999.1")
    first = next(iter(Compute(tmp_path, tmp_path, "auto").checks()))
    assert first.word == word
    assert says in first.found
    assert bool(first.fix) == (word != "ok")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Let torch say that it has a GPU, for which the CPU computes; return its memory."""
    memory = {"free": 70_000_000_000, "total": 80_000_000_000}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (memory["free"], memory["total"]))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, _: tensor)
    monkeypatch.setattr(Compute, "_try", lambda _, what, *arguments: run(what, *arguments))
    monkeypatch.setattr(machine, "driver", lambda: "999.1")
    return memory


@pytest.mark.parametrize(("name", "free", "word"), [("auto", 70, "ok"), ("cuda", 30, "warn")])
def test_a_gpu_is_said_with_its_driver_and_its_memory(
    tmp_path: Path, gpu: dict[str, int], name: str, free: int, word: str
) -> None:
    gpu["free"] = free * 10**9
    found = {finding.check: finding for finding in Compute(tmp_path, tmp_path, name).checks()}
    right = "cuda:0 (NVIDIA X), driver 999.1: a matrix product is right"
    assert (found["device"].word, found["device"].found) == ("ok", right)
    memory = found["GPU memory"]
    assert (memory.word, memory.found) == (word, f"{free}.0 of 80.0 GB free")
    assert ("nvidia-smi" in memory.fix) is (word == "warn")


@pytest.mark.usefixtures("gpu")
def test_a_second_gpu_is_not_made_up(tmp_path: Path) -> None:
    first = next(iter(Compute(tmp_path, tmp_path, "cuda:1").checks()))
    assert first.word == "fail"
    assert first.found == "torch finds no cuda:1 on this machine, only cuda:0, cpu"


def test_a_gpu_whose_driver_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> Kernel:
        raise TrainingFailedError("training", "its process died (signal 11)")

    monkeypatch.setattr(Compute, "_try", dies)
    checked = Compute(tmp_path, tmp_path, "cuda:0")
    first = next(iter(checked.checks()))
    assert first.word == "fail"
    assert first.found == "cuda:0 cannot be used: its process died (signal 11)"
    assert "--device cpu" in first.fix
    (skipped,) = checked.probe({Cancer.UVM: 48}, StudyConfig(), 5.0)
    assert skipped.found == "the device cannot be used"


@pytest.mark.parametrize(
    ("script", "version"),
    [("echo 999.1; echo 999.1", "999.1"), ("echo 999.1; exit 9", None), ("true", None), ("", None)],
)
def test_the_driver_is_what_its_own_program_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, version: str | None
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o700)
    assert machine.driver() == version


@pytest.mark.parametrize(("free", "word"), [(32e6, "warn"), (65e6, "ok")])
def test_shared_memory(monkeypatch: pytest.MonkeyPatch, free: float, word: str) -> None:
    known = {machine.SHARED: SimpleNamespace(free=free)}
    monkeypatch.setattr("shutil.disk_usage", known.__getitem__)
    finding = compute._shared()
    assert finding.word == word
    assert finding.found == f"{free / 1e9:.2f} GB free in /dev/shm"
    assert ("--shm-size" in finding.fix) is (word == "warn")


def test_a_system_that_hides_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SHARED", tmp_path / "shm")
    monkeypatch.setattr(machine, "_MEMORY", tmp_path / "meminfo")
    assert (compute._shared().word, compute._memory().word) == ("skipped", "skipped")


@pytest.mark.parametrize(("available", "word"), [(1e9, "fail"), (5e9, "warn"), (50e9, "ok")])
def test_the_memory_of_a_machine(
    monkeypatch: pytest.MonkeyPatch, available: float, word: str
) -> None:
    monkeypatch.setattr(machine, "memory", lambda: (int(available), int(64e9)))
    assert compute._memory().word == word


def test_a_container_has_the_memory_that_it_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "info").write_text(
        "MemTotal:  8000000 kB\nMemFree: 1 kB\nMemAvailable: 6000000 kB\n"
    )
    (tmp_path / "max").write_text("2000000000\n")
    (tmp_path / "now").write_text("500000000\n")
    monkeypatch.setattr(machine, "_MEMORY", tmp_path / "info")
    monkeypatch.setattr(machine, "_LIMITS", ())
    assert machine.memory() == (6_144_000_000, 8_192_000_000)
    monkeypatch.setattr(machine, "_LIMITS", ((tmp_path / "max", tmp_path / "now"),))
    assert machine.memory() == (1_500_000_000, 2_000_000_000)
    (tmp_path / "max").write_text("max\n")
    assert machine.memory() == (6_144_000_000, 8_192_000_000)


def test_a_disk_that_cannot_be_written() -> None:
    finding = disk(Path("/proc/nowhere"), "Move it")
    assert finding.word == "fail"
    assert "/proc cannot be written" in finding.found
    assert finding.fix.endswith("Move it")


@pytest.mark.parametrize(("free", "word"), [(0.5e9, "fail"), (5e9, "warn"), (50e9, "ok")])
def test_room_on_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, word: str
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    assert disk(tmp_path / "state", "Free some").word == word
    assert not (tmp_path / "state").exists()


def test_a_trial_trains_whole_updates_and_keeps_nothing(
    make_site: Callable[..., Site], study: StudyConfig
) -> None:
    site = make_site()
    before = sorted(site.folder.rglob("*"))
    found = trial(site.folder / "site.yaml", Cancer.UVM, study, "cpu", 5.0)
    assert sorted(site.folder.rglob("*")) == before
    cohort, _ = site.cohort(Cancer.UVM, study)
    assert (found.patients, found.patches) == (48, sum(cohort.patches(i) for i in range(48)))
    assert (found.models, found.updates, found.epochs) == (7, 3, 30)  # 90 updates
    assert any(update.whole for update in found.tried)
    sizes = [update.patches for update in found.tried if not update.whole]
    assert sizes == sorted(sizes)
    twice = replace(found, epochs=60)
    assert twice.seconds == pytest.approx(2 * found.seconds)


def test_whole_updates_count_by_their_patches() -> None:
    tried = (Update(10, 5.0), Update(100, 1.0, whole=True), Update(300, 3.0, whole=True))
    found = _trial(*tried)
    assert found.seconds == pytest.approx(20 * 4000 * 0.01)
    assert "2 whole updates" in found.how


def test_smaller_updates_are_a_constant_and_a_share_for_each_patch() -> None:
    found = _trial(Update(100, 1.0), Update(300, 5.0), Update(600, 2.0))
    each = 1.0 / 500
    assert found.seconds == pytest.approx(20 * (10 * (1.0 - 100 * each) + 4000 * each))
    assert "scaled up from smaller updates of 100 to 600 patches" in found.how
    assert _trial(Update(100, 1.0)).seconds == pytest.approx(20 * 4000 / 100)


def test_an_expert_that_takes_longer_than_a_night(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compute, "_try", lambda *_: _trial(Update(1, 1.0, whole=True)))
    checked = Compute(tmp_path, tmp_path, "cpu")
    checked._usable = True
    (finding,) = checked.probe({Cancer.UVM: 48}, StudyConfig(), 5.0)
    assert finding.word == "warn"
    assert "about 22 h 13 min on cpu" in finding.found
    assert "GPU" in finding.fix


@pytest.mark.parametrize(
    ("seconds", "words"), [(7.4, "7 s"), (720, "12 min"), (12_000, "3 h 20 min")]
)
def test_a_time_in_words(seconds: float, words: str) -> None:
    assert span(seconds) == words


def test_findings_as_json_and_as_lines(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("a", "ok", "fine", part="p"), Finding("b", "warn", "so\x1b[2J so", "do")]
    assert show(findings, as_json=True) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first == {"check": "a", "word": "ok", "found": "fine", "fix": "", "part": "p"}
    assert second["fix"] == "do"
    assert show(findings, as_json=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["ok      p: a: fine", "warn    b: so [2J so. do", "1 ok, 1 warn"]
    assert show([*findings, Finding("c", "fail", "bad", "mend")], as_json=False) == 1


def _trial(*tried: Update) -> Trial:
    return Trial(
        device="cpu", models=16, epochs=20, updates=10, patients=80, patches=4000, tried=tried
    )
