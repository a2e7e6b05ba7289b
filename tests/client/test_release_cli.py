"""`cropkt-client release` and `ledger`, as people type them."""

from __future__ import annotations

import csv
import io
import json
import os
import pwd
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import Result
from flwr.app import Message as FlowerMessage
from typer.testing import CliRunner

from cropkt.cancers import Cancer
from cropkt.config import ExpertShape, StudyConfig
from cropkt.messages import (
    REPLIES,
    ArmScore,
    CohortCount,
    DescribeReply,
    DescribeRequest,
    ExpertReply,
    ExpertRequest,
    Failure,
    Fewest,
    HeldRequest,
    Message,
    Score,
)
from cropkt.wire import from_record, to_record
from cropkt_client.cli import app
from cropkt_client.gate import Gate
from cropkt_client.ledger import COLUMNS, Entry, Ledger
from cropkt_client.words import _ENVELOPE, _OF_ARM, _WORDS

UVM = Cancer.UVM
STUDY = StudyConfig(folds=3, shape=ExpertShape(dim=255, embed=128, attention=64, bins=4))
SIZE = STUDY.shape.parameters
EXPERT = ExpertRequest(task="fit_expert/leiden/UVM/0", study=STUDY, cancer=UVM)
DESCRIBE = DescribeRequest(task="describe/leiden", study=STUDY)
Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def flower_identity() -> None:
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 2


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A hospital whose answers somebody has to approve."""
    path = tmp_path / "site.yaml"
    values = {"site": "leiden", "cancers": ["UVM"], "outcomes": "o.csv", "release": {}}
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def run(config: Path) -> Run:
    def run(*arguments: object, code: int = 0) -> Result:
        result = CliRunner().invoke(app, ["--config", str(config), *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result

    return run


def asked(request: Message) -> FlowerMessage:
    return FlowerMessage(to_record(request), dst_node_id=2, message_type=request.kind)


def leave(config: Path) -> None:
    """Let the site's tasks answer two questions."""
    expert = ExpertReply(
        task=EXPERT.task,
        cancer=UVM,
        patients=48,
        events=22,
        weights=np.ones((1, SIZE), np.float32),
        score=Score(c_index=0.6123, se=0.1),
        seconds=1.0,
        fewest=Fewest(patients=48, events=22),
    )
    count = CohortCount(cancer=UVM, patients=48, events=3, dim=4)
    described = DescribeReply(task=DESCRIBE.task, site="leiden", cohorts=(count,))
    gate = Gate.of(config)
    gate.release(expert, EXPERT, to=asked(EXPERT))
    gate.release(described, DESCRIBE, to=asked(DESCRIBE))


def again(config: Path, task: str) -> Message:
    request = HeldRequest(task=task)
    reply = Gate.of(config).again(request, to=asked(request))
    return from_record(reply.content, expected=REPLIES)


def test_somebody_looks_at_what_would_leave_and_decides(config: Path, run: Run) -> None:
    assert run("release", "list").output == "nothing waits for approval\n"
    leave(config)
    listed = run("release", "list").output
    assert listed.count("It waits since") == 2
    (expert,) = re.findall(r"^(\w{8})  fit_expert/leiden/UVM/0  0\.2 MB", listed, re.MULTILINE)
    shown = run("release", "show", expert).output
    for part in (
        "the answer to train.expert, UVM",
        "for research",
        f"1 expert of {SIZE:,} numbers, trained on these patients",
        "counts: about 50 patients, about 20 events",
        "C-index 0.612 (standard error 0.100)",
        f"1 x {SIZE} float32, finite",
        "at least 20 patients and 10 events",
    ):
        assert part in shown
    assert "48" not in re.sub(r"SHA-256 \w+", "", shown)
    (described,) = re.findall(r"^(\w{8})  describe", listed, re.MULTILINE)
    assert (
        "about 50 patients, fewer than the minimum events"
        in run("release", "show", described[:5]).output
    )
    run("release", "approve", expert, "--by", "Dr A")
    run("release", "refuse", described)
    assert isinstance(again(config, EXPERT.task), ExpertReply)
    refused = again(config, DESCRIBE.task)
    assert isinstance(refused, Failure)
    assert refused.code == "refused_release"
    user = pwd.getpwuid(os.getuid()).pw_name
    (row,) = [r for r in Ledger(config.parent / "state").rows() if r.message == "train.expert"]
    assert row.approved == f"approved by {user} (Dr A)"
    assert run("release", "list").output == "nothing waits for approval\n"
    held = json.loads(run("release", "list", "--all", "--json").stdout)
    assert {h["decision"] for h in held} == {"approved", "refused"}


def test_all_that_wait_can_be_approved_at_once(config: Path, run: Run) -> None:
    leave(config)
    assert json.loads(run("status", "--json", code=3).stdout)["held"] == 2
    assert "waiting for approval: 2" in run("status", code=3).stdout
    run("release", "approve", "--all")
    assert isinstance(again(config, EXPERT.task), ExpertReply)
    assert isinstance(again(config, DESCRIBE.task), DescribeReply)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "0123abcd"], "no answer has this id"),
        (["approve"], "which?"),
        (["approve", "--all", "--by", "a\nb"], "--by: is not a name"),
        (["refuse", ""], "no answer has this id"),
    ],
)
def test_a_wrong_request_is_one_line(
    config: Path, run: Run, arguments: list[str], said: str
) -> None:
    leave(config)
    result = run("release", *arguments, code=64)
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert all(row.message.startswith("failure") for row in Ledger(config.parent / "state").rows())


def test_the_ledger_is_shown_verified_and_exported(config: Path, run: Run, tmp_path: Path) -> None:
    leave(config)
    run("release", "approve", "--all")
    again(config, EXPERT.task)
    shown = run("ledger", "show", "--last", 1).output
    assert re.search(r"^3  20\S+  train\.expert \(fit_expert/leiden/UVM/0\)  0\.2 MB  app", shown)
    assert len(json.loads(run("ledger", "show", "--json").stdout)) == 3
    assert run("ledger", "verify").output.startswith("whole: 3 rows")
    run("ledger", "export", tmp_path / "out.csv")
    rows = list(csv.reader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert tuple(rows[0]) == COLUMNS
    kept = Ledger(config.parent / "state").rows()
    assert [row[COLUMNS.index("hash")] for row in rows[1:]] == [row.hash for row in kept]
    run("ledger", "export", tmp_path / "out.pdf", code=64)


class Page(HTMLParser):
    """Reads a page strictly enough to see what a browser would."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data + " "

    @classmethod
    def of(cls, path: Path) -> Page:
        page = cls()
        page.feed(path.read_text())
        page.close()
        assert page._open == []
        return page


def test_the_page_stands_alone_and_says_who_what_how_much_and_when(
    config: Path, run: Run, tmp_path: Path
) -> None:
    leave(config)
    run("release", "approve", "--all", "--by", "<script>alert(1)</script>")
    again(config, EXPERT.task)
    ledger = Ledger(config.parent / "state")
    hostile = Entry(
        study="<b>",
        task="<i>t",
        message="<u>",
        recipient="<s>",
        bytes=7,
        sha256="<p>",
        checked="<em>",
        approved="<q>",
        epsilon=1.5,
    )
    ledger.append(hostile)
    run("ledger", "export", tmp_path / "out.html")
    page = Page.of(tmp_path / "out.html")
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "b", "i", "u", "s", "em", "q"})
    assert not [a for _, attributes in page.tags for a in attributes if a in ("src", "href")]
    for part in (
        "What left leiden",
        "The ledger is whole. 4 rows",
        "train.expert",
        "fit_expert/leiden/UVM/0",
        "<script>alert(1)</script>",
        "<i>t",
        "at most 1.50",
        ledger.rows()[-1].time,
        "20 patients, 10 events",
        "shown to who approves; blocks nothing",
        "differential privacy none",
    ):
        assert part in re.sub(r"\s+", " ", page.text)
    assert "@media print" in (tmp_path / "out.html").read_text()


def test_a_ledger_that_is_not_whole_is_said_everywhere(
    config: Path, run: Run, tmp_path: Path
) -> None:
    import sqlite3

    leave(config)
    database = sqlite3.connect(config.parent / "state" / "ledger.sqlite")
    database.executescript("DROP TRIGGER egress_stays; UPDATE egress SET bytes = 1")
    database.close()
    result = run("ledger", "verify", code=65)
    assert "row 1: its content was changed after it was signed" in result.stdout
    found = json.loads(run("ledger", "verify", "--json", code=65).stdout)
    assert not found["whole"]
    run("ledger", "export", tmp_path / "out.html")
    assert "The ledger is not whole." in Page.of(tmp_path / "out.html").text


def test_a_site_that_never_enrolled_has_nothing_to_verify(run: Run) -> None:
    assert "signing.key: no such file" in run("ledger", "verify", code=78).stderr
    assert run("ledger", "show").output == "nothing has left\n"


@pytest.mark.parametrize("command", [["release"], ["ledger"], ["release", "approve"]])
def test_help_loads_neither_torch_nor_flower(command: list[str]) -> None:
    code = (
        "import sys\nfrom cropkt_client.cli import app\n"
        f"app({[*command, '--help']!r}, standalone_mode=False)\n"
        "assert not {'torch', 'flwr', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert time.monotonic() - began < 5  # half a second where nothing else runs


@pytest.mark.parametrize("kind", [kind for kind in REPLIES if kind is not Failure])
def test_every_field_of_an_answer_is_told_in_words(kind: type[Message]) -> None:
    assert {item.name for item in fields(kind)} <= set(_WORDS) | _ENVELOPE
    assert {item.name for item in fields(ArmScore)} - {
        *("c_index", "se", "high", "gain_se", "gain_low", "gain_high")  # told with the others
    } == set(_OF_ARM)
