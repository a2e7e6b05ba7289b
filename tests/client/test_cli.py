"""What the command line says without a coordinator: help, errors of one line, exit codes."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from cropkt.bundle import bundle_hash
from cropkt.cancers import Cancer
from cropkt.cohort.features import write_slide_h5
from cropkt_client.cli import app
from cropkt_client.enrol import Enrolment


def run(*arguments: object) -> tuple[int, str]:
    """Return exit code and what a command says."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def one_line(said: str) -> str:
    (line,) = said.strip().splitlines()
    assert line.startswith("cropkt-client: ")
    return line


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "site": "lumc",
                "outcomes": "o.csv",
                "slides": ["f"],
                "encoder": "UNI2-h",
                "cancers": ["UVM", "SKCM"],
            }
        )
    )
    return path


def enrolled(config: Path, *cancers: Cancer) -> None:
    state = config.parent / "state"
    state.mkdir()
    Enrolment(
        host="127.0.0.1:1",
        study="eye",
        site="lumc",
        cancers=cancers,
        coordinator_key=base64.b64encode(bytes(32)).decode(),
        bundle=bundle_hash(),
    ).save(state)


BOTH = ["--cancer", "UVM", "--cancer", "SKCM"]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from cropkt_client.cli import main; sys.argv = ['cropkt-client', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'flwr', 'numpy', 'httpx', 'rich'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "enrol" in out.stdout
    assert "--detach" in out.stdout
    assert out.stdout.splitlines()[-1] == "[]"


def test_serving_loads_no_torch(config: Path) -> None:
    """Torch is for the child that trains: the client itself lives for weeks."""
    code = (
        "import sys; import cropkt_client.executor, cropkt_client.serve\n"
        "from cropkt_client.cli import app\n"
        "for command in ('status', 'stop'):\n"
        f"    app([command, '--config', {str(config)!r}], standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "False"


def test_without_options_it_shows_its_help() -> None:
    code, said = run()
    assert code == 64
    assert "Usage" in said


@pytest.mark.parametrize("command", [["--site", "lumc", *BOTH], ["status"], ["stop"]])
def test_a_missing_config_is_one_line(tmp_path: Path, command: list[str]) -> None:
    code, said = run(*command, "--config", tmp_path / "none.yaml")
    assert code == 78
    assert "none.yaml: no such file" in one_line(said)


def test_a_site_that_never_enrolled_is_told_how(config: Path) -> None:
    code, said = run("--site", "lumc", *BOTH, "--config", config)
    assert code == 78
    assert "cropkt-client enrol INVITE" in one_line(said)
    code, said = run("status", "--config", config)
    assert code == 3
    assert said.splitlines() == ["not enrolled", "not running"]
    code, said = run("stop", "--config", config)
    assert (code, said.strip()) == (0, "not running")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--site", "amc", *BOTH], 78, "its site is lumc, not amc"),
        (["--site", "lumc", "--cancer", "XYZ"], 64, "unknown code 'XYZ'"),
        (
            ["--site", "lumc", "--cancer", "UVM", "--cancer", "KIPAN"],
            78,
            "its cancers are SKCM UVM; KIPAN is not among them",
        ),
        (["--site", "lumc", "--cancer", "UVM"], 78, "ca.pem: missing"),  # a part may be served
        (["--site", "lumc"], 64, "--site lumc --cancer UVM --cancer SKCM"),
        (["--site", "lumc", *BOTH, "--device", "tpu"], 64, "unknown device 'tpu'"),
        (["--site", "lumc", *BOTH], 78, "ca.pem: missing"),
    ],
)
def test_a_command_line_that_does_not_fit_is_one_line(
    config: Path, arguments: list[str], code: int, words: str
) -> None:
    enrolled(config, Cancer.UVM, Cancer.SKCM)
    got, said = run(*arguments, "--config", config)
    assert got == code
    assert words in one_line(said)


def test_a_site_that_names_no_encoder_does_not_serve(config: Path) -> None:
    enrolled(config, Cancer.UVM, Cancer.SKCM)
    config.write_text(config.read_text().replace("encoder: UNI2-h", 'encoder: ""'))
    code, said = run("--site", "lumc", *BOTH, "--config", config)
    assert code == 78
    assert "encoder: is empty" in one_line(said)


def test_a_cancer_beyond_the_enrolment_is_one_line(config: Path) -> None:
    enrolled(config, Cancer.UVM)
    code, said = run("--site", "lumc", *BOTH, "--config", config)
    assert code == 78
    assert "not enrolled for SKCM" in one_line(said)


@pytest.mark.parametrize("text", ["nonsense", "cropkt1.abc", "cropkt1." + "A" * 200])
def test_an_invite_that_is_none_is_one_line(config: Path, text: str) -> None:
    code, said = run("enrol", text, "--config", config)
    assert code == 76
    assert "invite" in one_line(said)
    assert not (config.parent / "state").exists()


def test_a_state_folder_that_cannot_be_is_one_line(config: Path) -> None:
    (config.parent / "state").write_text("a file")
    code, said = run("status", "--config", config)
    assert code == 74
    assert "state" in one_line(said)


def test_a_terminal_shows_the_same_lines(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain = run("status", "--config", config)
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, coloured = run("status", "--config", config)
    assert code == 3
    assert "\x1b[31mnot running\x1b[0m" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


def test_slides_of_site_yaml_are_packed(config: Path) -> None:
    (config.parent / "f").mkdir()
    write_slide_h5(config.parent / "f" / "s1.h5", np.ones((3, 2), dtype=np.float16))
    code, said = run("--config", config, "pack")
    assert code == 0
    assert "1 slides, 3 patches" in said
    assert "pack: pack" in said
    assert run("--config", config, "pack", "--verify")[0] == 0
    code, said = run("--config", config, "pack")
    assert code == 65
    assert "exists already" in one_line(said)
