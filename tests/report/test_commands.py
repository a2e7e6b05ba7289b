"""`cropkt-sim report` and `cropkt-server report` as they are typed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from cropkt.report.schema import Results
from cropkt.report.write import canonical_json
from cropkt_server.cli import app as server
from cropkt_server.settings import Settings, save_settings
from cropkt_server.store import Store, Task
from cropkt_sim.cli import app as sim


def sim_report(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(sim, ["report", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def run_folder(results: Results, folder: Path) -> Path:
    folder.mkdir()
    (folder / "results.json").write_bytes(canonical_json(results))
    return folder


def test_one_run_keeps_its_report(few: Results, tmp_path: Path) -> None:
    run = run_folder(few, tmp_path / "run")
    before = (run / "results.json").read_bytes()
    assert sim_report(run).stdout == f"{run / 'report.html'}\n"
    assert (run / "results.json").read_bytes() == before
    assert (run / "figures" / "gained.svg").exists()
    assert (run / "arms.csv").exists()
    sim_report(run, "--out", tmp_path / "elsewhere")
    page = (tmp_path / "elsewhere" / "report.html").read_bytes()
    assert page == (run / "report.html").read_bytes()


def test_several_runs_need_a_folder(seeded: Callable[[int], Results], tmp_path: Path) -> None:
    runs = [run_folder(seeded(seed), tmp_path / f"seed-{seed}") for seed in (0, 1)]
    failed = sim_report(*runs, code=64)
    assert "--out: several runs need a folder" in failed.stderr
    sim_report(*runs, "--out", tmp_path / "means")
    assert "seeds 0, 1" in (tmp_path / "means" / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, 64, "holds no results.json"),
        ("{", 65, "is not JSON"),
        ('{"targets": 3}', 65, "targets is not an object"),
    ],
)
def test_what_is_no_run_gets_one_line(
    tmp_path: Path, content: str | None, code: int, words: str
) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    failed = sim_report(tmp_path, code=code)
    assert words in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "report.html").exists()
    assert "no such folder" in sim_report(tmp_path / "nowhere", code=64).stderr


def test_the_server_reports_a_study_under_way_and_changes_nothing(tmp_path: Path) -> None:
    save_settings(Settings(name="eye", sites=("a", "b")), tmp_path)
    sent = Task(kind="describe", site="a")
    store = Store(tmp_path)
    store.add([sent])
    store.sent(sent)
    done = CliRunner().invoke(server, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / 'report' / 'report.html'}\n"
    assert store.state(sent) == "sent"
    assert [task.id for task in store.tasks()] == [sent.id]
    assert store.meta("began") is None
    store.close()
    page = (tmp_path / "report" / "report.html").read_text()
    assert "No target was evaluated." in page
    assert "describe/b" in page


def test_the_server_refuses_a_folder_without_a_study(tmp_path: Path) -> None:
    failed = CliRunner().invoke(server, ["report", str(tmp_path)])
    assert failed.exit_code == 78
    assert "study.yaml: no such file" in failed.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["cropkt_sim.cli", "cropkt_server.cli"])
def test_help_loads_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, {module} as cli\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(cli.app, ['report', '--help']).exit_code == 0\n"
        "assert not {'matplotlib', 'jinja2', 'torch', 'flwr', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=dict(os.environ))
