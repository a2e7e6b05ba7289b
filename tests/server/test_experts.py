"""Signatures and revocation on the coordinator's side, with real keys and no site."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from cropkt.cancers import Cancer
from cropkt.config import ExpertShape, StudyConfig
from cropkt.errors import ConfigError, UsageError
from cropkt.experts.abmil import Abmil, parameter_count
from cropkt.experts.artifact import load_artifact
from cropkt.experts.card import check_models, public_text, read_card, verified
from cropkt.messages import (
    ExpertReply,
    ExpertRequest,
    Failure,
    Message,
    RouterRequest,
    Signed,
    TransferReply,
    TransferRequest,
)
from cropkt_server.bank import Bank
from cropkt_server.cli import app
from cropkt_server.enrolment import Enrolment
from cropkt_server.membership import Member
from cropkt_server.pki import Keys, make_keys
from cropkt_server.results import results
from cropkt_server.revocation import CAUSE, NOTHING_LEFT
from cropkt_server.roster import Roster
from cropkt_server.settings import Settings, save_settings
from cropkt_server.store import Store, Task
from cropkt_server.study import Study

pytestmark = pytest.mark.usefixtures("all_admitted", "all_signed")

UVM, SKCM, KIPAN = Cancer.UVM, Cancer.SKCM, Cancer.KIPAN
CONFIG = StudyConfig(folds=3, rounds=2)
EXPERT_B = Task(kind="fit_expert", site="b", cancer=SKCM)


class Driver:
    """A study whose sites answer at once; a and d share a cancer."""

    def __init__(self, folder: Path, sites: Any, config: StudyConfig = CONFIG) -> None:
        self.folder, self.sites, self.config = folder, sites, config
        self.study = self.open()

    def open(self, members: tuple[Member, ...] = ()) -> Study:
        return Study(self.folder, self.config, members or tuple(map(Member, self.sites.holdings)))

    def answer(self, task: Task) -> Message:
        reply: Message = self.sites.answer(task, self.study.request(task))
        return reply

    def run(self, *, until: Callable[[Task], bool] = lambda _: False) -> None:
        """Answer what is due, except for the rows that are held back."""
        while due := [task for task in self.study.due() if not until(task)]:
            self.study.record(due[0], self.answer(due[0]))

    def revoke(self, signed: Signed | None) -> list[str]:
        """Revoke as the command does, in another process; return the hashes."""
        assert signed is not None
        bank = Bank(self.folder)
        gone = bank.revoke(signed.hash)
        bank.close()
        self.study.add_sites(self.study._members)  # as the dispatcher does in every round
        return [expert.signed.hash for expert in gone]

    def expert(self, site: str, cancer: Cancer, number: int = 0) -> Signed:
        task = Task(kind="fit_expert", site=site, cancer=cancer, round=number)
        signed = self.study.answer(task, ExpertReply).signed
        assert signed is not None
        return signed

    def request(self, kind: Any, site: str, cancer: Cancer, number: int = 0) -> Any:
        return self.study.request(Task(kind=kind, site=site, cancer=cancer, round=number))

    def state(self, name: str) -> str:
        (task,) = [task for task in self.study.store.tasks() if task.id == name]
        return task.cause or task.state


@pytest.fixture
def driver(tmp_path: Path, sites: Any) -> Driver:
    return Driver(tmp_path, sites)


# What it takes


@pytest.fixture
def refused(
    driver: Driver, sign_reply: Callable[..., ExpertReply], signer: Callable[[str], Any]
) -> Callable[..., str]:
    """Return the cause for which b's expert is refused, whose reply is changed first."""

    def give(
        change: Callable[[ExpertReply], ExpertReply] = lambda reply: reply,
        *,
        key: Ed25519PrivateKey | None = None,
        **card: Any,
    ) -> str:
        driver.run(until=lambda task: task.kind != "describe")
        request, reply = driver.study.request(EXPERT_B), driver.answer(EXPERT_B)
        assert isinstance(reply, ExpertReply)
        whole = sign_reply(EXPERT_B, reply, request, key=key or signer("b"), **card)
        driver.study.record(EXPERT_B, change(whole))
        return driver.state(EXPERT_B.id)

    return give


def test_a_signed_expert_is_taken(driver: Driver, refused: Callable[..., str]) -> None:
    assert refused() == "done"
    (expert,) = driver.study.store.bank.experts()
    assert (expert.card.site, expert.task, expert.revoked_at) == ("b", EXPERT_B.id, None)


@pytest.mark.parametrize("where", [(Bank, "add"), (Store, "done")])
def test_a_coordinator_killed_while_it_takes_an_expert_has_its_reply_and_takes_it_again(
    driver: Driver,
    sign_reply: Callable[..., ExpertReply],
    signer: Callable[[str], Any],
    where: tuple[type, str],
) -> None:
    driver.run(until=lambda task: task.kind != "describe")
    request, plain = driver.study.request(EXPERT_B), driver.answer(EXPERT_B)
    reply, store = sign_reply(EXPERT_B, plain, request, key=signer("b")), driver.study.store
    store.sent(EXPERT_B)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*where, killed)
        with pytest.raises(KeyboardInterrupt):
            driver.study.record(EXPERT_B, reply)
    kept = store.reply(EXPERT_B)
    assert isinstance(kept, ExpertReply)
    assert kept.signed == reply.signed
    assert store.state(EXPERT_B) == "sent"
    store.close()
    driver.study = driver.open()
    driver.study.record(EXPERT_B, reply)
    assert driver.state(EXPERT_B.id) == "done"
    assert [expert.signed for expert in driver.study.store.bank.experts()] == [reply.signed]


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_an_expert_that_is_not_signed_fails_its_row(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, driver: Driver
) -> None:
    unsigned = Signed(card="{}", signature="0" * 128)
    assert "not as agreed" in refused(lambda reply: replace(reply, signed=unsigned))
    assert driver.study.store.bank.experts() == []


def test_a_changed_weight_or_card_fails_its_row(refused: Callable[..., str]) -> None:
    cause = refused(lambda reply: replace(reply, weights=np.nextafter(reply.weights, 9)))
    assert "its weights are not those that were signed" in cause


def test_a_changed_card_fails_its_row(refused: Callable[..., str]) -> None:
    def change(reply: ExpertReply) -> ExpertReply:
        assert reply.signed is not None
        text = reply.signed.card.replace('"patients":100', '"patients":900')
        assert text != reply.signed.card
        return replace(reply, signed=replace(reply.signed, card=text))

    assert "its card is not what was signed" in refused(change)


@pytest.mark.parametrize(
    ("card", "cause"),
    [
        ({"site": "c"}, "not signed with the key of b"),
        ({"site": None, "parents": ("1" * 64, "2" * 64)}, "not signed with the key of b"),
        ({"round": 1}, "another round"),
        ({"parents": ("1" * 64,)}, "another round, or other parents"),
        ({"cancer": UVM}, "an expert of SKCM is wanted"),
        ({"encoder": "other"}, "reads features of 'other'"),
        ({"m0": "0" * 64}, "not trained from the study's M0"),
        ({"bin_days": 30}, "bins of 30 days"),
        ({"study": "0" * 16}, "other settings"),
    ],
)
def test_an_expert_of_something_else_fails_its_row(
    refused: Callable[..., str], card: dict[str, Any], cause: str
) -> None:
    assert cause in refused(**card)


def test_the_key_that_a_site_enrolled_with_counts(
    driver: Driver, refused: Callable[..., str], signer: Callable[[str], Any]
) -> None:
    members = [replace(m, key=public_text(signer(m.name))) for m in driver.study._members]
    driver.study.add_sites(members)
    assert "not signed with the key of b" in refused(key=Ed25519PrivateKey.generate())
    driver.study.store.due(EXPERT_B)
    assert refused() == "done"


def test_in_a_simulation_the_first_key_that_a_site_shows_counts(
    driver: Driver, refused: Callable[..., str], sign_reply: Callable[..., ExpertReply]
) -> None:
    assert refused() == "done"
    driver.study.store.due(EXPERT_B)
    assert "not signed with the key of b" in refused(key=Ed25519PrivateKey.generate())


def test_a_reply_with_another_number_of_scores_fails_its_row(driver: Driver) -> None:
    driver.run(until=lambda task: task.kind == "score_sources")
    task = next(task for task in driver.study.due() if task.site == "b")
    reply = driver.answer(task)
    assert isinstance(reply, TransferReply)
    driver.study.record(task, replace(reply, scores=reply.scores[:1]))
    assert "not one score a fold and expert" in driver.state(task.id)


# What it sends


def test_a_sites_expert_goes_on_under_its_own_signature(driver: Driver) -> None:
    driver.run()
    request = driver.request("score_sources", "c", KIPAN)
    assert isinstance(request, TransferRequest)
    assert request.sources == (SKCM, UVM)
    skcm, uvm = (verified(signed.card, signed.signature) for signed in request.signed)
    assert request.signed[0] == driver.expert("b", SKCM)
    assert (skcm.site, uvm.site) == ("b", None)
    for card, row, cancer in zip((skcm, uvm), request.weights, request.sources, strict=True):
        check_models(card, row[None], [()], cancer=cancer)


def test_an_average_is_signed_by_the_coordinator_and_names_its_parents(driver: Driver) -> None:
    driver.run()
    expert = driver.request("fit_expert", "a", UVM, 1)
    assert isinstance(expert, ExpertRequest)
    assert expert.signed is not None
    assert expert.weights is not None
    first = verified(expert.signed.card, expert.signed.signature)
    assert first.parents == (driver.expert("a", UVM).hash, driver.expert("d", UVM).hash)
    assert first.signer == public_text(Keys.of(driver.folder).signing())
    assert (first.patients, first.events) == (200, 20)
    check_models(first, expert.weights, [m.excluded for m in first.models], cancer=UVM)
    router = driver.request("fit_router", "a", UVM)
    assert isinstance(router, RouterRequest)
    assert router.own is not None
    assert router.own_signed is not None
    own = read_card(router.own_signed.card)
    assert own.parents == (driver.expert("a", UVM, 1).hash, driver.expert("d", UVM, 1).hash)
    check_models(own, router.own, [m.excluded for m in own.models], cancer=UVM)


def test_the_same_row_asks_the_same_after_a_restart(driver: Driver) -> None:
    driver.run()
    before = driver.request("fit_router", "a", UVM)
    driver.study.store.close()
    driver.study = driver.open()
    after = driver.request("fit_router", "a", UVM)
    assert (after.signed, after.own_signed) == (before.signed, before.own_signed)


def test_a_lost_coordinators_key_is_not_made_anew(tmp_path: Path) -> None:
    keys = Keys.of(tmp_path)
    make_keys(keys, ["localhost"], study="eye")
    keys.signing_key.unlink()
    with pytest.raises(ConfigError, match=r"coordinator\.key: no such file"):
        keys.signing()


# Revocation


def test_what_is_revoked_before_it_is_sent_is_not_sent(driver: Driver) -> None:
    driver.run(until=lambda task: task.kind == "score_sources")
    driver.revoke(driver.expert("b", SKCM))
    driver.run()
    assert driver.request("score_sources", "c", KIPAN).sources == (UVM,)
    assert driver.request("fit_router", "a", UVM).sources == (KIPAN,)
    assert driver.study.finished
    assert results(driver.study)["failed"] == []
    assert set(results(driver.study)["transfer"]["KIPAN"]) == {"KIPAN", "UVM"}
    # The site itself still learns from the others, with its own expert.
    assert driver.request("fit_router", "b", SKCM).sources == (KIPAN, UVM)


def test_scores_of_a_revoked_expert_keep_their_place(driver: Driver) -> None:
    scored = "score_sources/c/KIPAN/0"
    driver.run(
        until=lambda t: t.id != scored and t.kind in ("score_sources", "fit_router", "evaluate")
    )
    driver.revoke(driver.expert("b", SKCM))
    driver.run()
    found = results(driver.study)
    assert set(found["transfer"]["KIPAN"]) == {"KIPAN", "SKCM", "UVM"}  # it was scored before
    assert set(found["transfer"]["UVM"]) == {"KIPAN", "UVM"}
    assert driver.request("fit_router", "c", KIPAN).sources == (UVM,)


def test_a_router_that_used_it_is_trained_again(driver: Driver) -> None:
    driver.run(until=lambda task: task.kind == "evaluate")
    before = driver.request("fit_router", "a", UVM)
    assert before.sources == (KIPAN, SKCM)
    driver.revoke(driver.expert("b", SKCM))
    again = {task.id for task in driver.study.due()}
    assert {"fit_router/a/UVM/0", "fit_router/d/UVM/0", "fit_router/c/KIPAN/0"} <= again
    assert "fit_router/b/SKCM/0" not in again  # it did not use its own as a source
    driver.run()
    for site in ("a", "d"):
        for number in (0, 1):
            request = driver.request("fit_router", site, UVM, number)
            assert request.sources == (KIPAN,)
    assert driver.study.finished
    assert results(driver.study)["failed"] == []


def test_a_target_that_was_evaluated_is_only_listed(driver: Driver) -> None:
    driver.run()
    rows = driver.study.store.tasks()
    driver.revoke(driver.expert("b", SKCM))
    assert driver.study.store.tasks() == rows


def test_a_row_under_way_is_waited_for(driver: Driver) -> None:
    driver.run(until=lambda task: task.kind == "fit_router" and task.cancer == KIPAN)
    (task,) = [task for task in driver.study.due() if task.kind == "fit_router"]
    reply = driver.answer(task)
    driver.study.store.sent(task)
    driver.revoke(driver.expert("b", SKCM))
    assert driver.state(task.id) == "sent"
    driver.study.record(task, Failure(task=task.id, code="refused", reference="ab12"))
    assert reply.task == task.id
    driver.study.add_sites(driver.study._members)
    driver.run()
    assert driver.request("fit_router", "c", KIPAN).sources == (UVM,)
    assert driver.study.finished
    assert results(driver.study)["failed"] == []


def test_a_refused_scoring_is_asked_again_without_it(driver: Driver) -> None:
    driver.run(until=lambda task: task.kind == "score_sources")
    (task,) = [t for t in driver.study.due() if t.site == "c"]
    driver.study.request(task)
    driver.study.store.sent(task)
    driver.study.record(task, Failure(task=task.id, code="refused", reference="ab12"))
    driver.revoke(driver.expert("b", SKCM))
    driver.run()
    assert driver.request("score_sources", "c", KIPAN).sources == (UVM,)
    assert driver.study.finished


def test_what_was_made_from_it_is_revoked_with_it(driver: Driver) -> None:
    driver.run(until=lambda task: task.kind == "score_sources")
    driver.study.request(next(t for t in driver.study.due() if t.site == "c"))
    gone = driver.revoke(driver.expert("a", UVM))
    assert {driver.expert("a", UVM, 1).hash, driver.expert("d", UVM, 1).hash} < set(gone)
    assert len(gone) == 5  # it, the first average, what a and d made of it, the last average
    driver.run()
    assert driver.request("score_sources", "c", KIPAN).sources == (SKCM,)
    assert driver.state("score_sources/a/UVM/0") == CAUSE
    assert driver.state("evaluate/c/KIPAN/0") == "done"
    assert driver.study.finished


def test_an_average_made_later_of_a_revoked_expert_is_revoked(driver: Driver) -> None:
    driver.run(until=lambda task: task.kind == "fit_expert" and task.round == 1)
    assert len(driver.revoke(driver.expert("a", UVM))) == 1
    driver.run()
    assert driver.state("fit_expert/d/UVM/1") == CAUSE
    assert driver.request("score_sources", "c", KIPAN).sources == (SKCM,)


def test_an_expert_that_was_not_averaged_yet_is_put_away(driver: Driver) -> None:
    last = "fit_expert/d/UVM/0"
    driver.run(until=lambda task: task.id == last)
    signed = driver.expert("a", UVM)
    driver.revoke(signed)
    assert driver.state("fit_expert/a/UVM/0") == CAUSE
    driver.run()
    request = driver.request("score_sources", "c", KIPAN)
    (uvm,) = [s for c, s in zip(request.sources, request.signed, strict=True) if c == UVM]
    assert uvm == driver.expert("d", UVM, 1)  # of one site alone: its own, not an average
    driver.study.store.retry("a")
    driver.run()
    assert "it was revoked" in driver.state("fit_expert/a/UVM/0")


def test_without_any_expert_left_the_study_ends(driver: Driver) -> None:
    driver.run(until=lambda task: task.kind == "score_sources")
    driver.revoke(driver.expert("b", SKCM))
    driver.revoke(driver.expert("c", KIPAN))
    driver.run()
    assert driver.state("score_sources/a/UVM/0") == NOTHING_LEFT
    assert driver.state("score_sources/b/SKCM/0") == "done"
    assert driver.study.finished


# The commands


@pytest.fixture
def folder(driver: Driver) -> Path:
    driver.run()
    make_keys(Keys.of(driver.folder / "made"), ["localhost"], study="eye")
    settings = Settings(name="eye", host="localhost:8443", study=CONFIG)
    save_settings(settings, driver.folder)
    return driver.folder


def said(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output


def test_experts_and_who_uses_them_are_listed(folder: Path, driver: Driver) -> None:
    found = json.loads(said("experts", folder, "--json"))
    assert len(found) == 8  # b, c; a and d twice; two averages
    (skcm,) = [expert for expert in found if expert["cancer"] == "SKCM"]
    assert (skcm["site"], skcm["patients"], skcm["c_index"]) == ("b", 100, 0.6)
    assert skcm["used_by"] == ["a (UVM)", "c (KIPAN)", "d (UVM)"]
    averages = [expert for expert in found if expert["site"] is None]
    assert [len(expert["parents"]) for expert in averages] == [2, 2]
    assert averages[1]["used_by"] == ["a (UVM)", "b (SKCM)", "c (KIPAN)", "d (UVM)"]
    line = f"{skcm['hash'][:16]} SKCM of b, round 0, 100 patients, C-index 0.600, used by a (UVM)"
    assert line in said("experts", folder)


def test_revoke_lists_every_router_that_used_it(folder: Path, driver: Driver) -> None:
    expert = driver.expert("b", SKCM)
    told = said("revoke", folder, "--expert", expert.hash[:12]).splitlines()
    assert told == [
        f"revoked {expert.hash[:16]} SKCM of b",
        "used by the router of a (UVM)",
        "used by the router of c (KIPAN)",
        "used by the router of d (UVM)",
    ]
    found = json.loads(said("experts", folder, "--json"))
    assert [e["hash"] for e in found if e["revoked"]] == [expert.hash]
    assert "REVOKED" in said("experts", folder)
    assert "no expert has this hash" in said("revoke", folder, "--expert", "0" * 64, code=64)
    assert "takes one thing" in said("revoke", folder, code=64)
    made = said("revoke", folder, "--expert", driver.expert("a", UVM).hash)
    assert made.count("and, made from it, ") == 4


def test_the_beginning_of_a_hash_must_name_one_expert(folder: Path, driver: Driver) -> None:
    for beginning in ("", driver.expert("b", SKCM).hash[:7]):
        with pytest.raises(UsageError):
            driver.study.store.bank.revoke(beginning)
    assert driver.study.store.bank.revoked() == frozenset()


def test_sites_learn_of_it_from_the_hello(folder: Path, driver: Driver) -> None:
    bank, roster = driver.study.store.bank, Roster(folder)
    keys = Keys.of(folder / "made")
    door = Enrolment(study="eye", host="h:1", keys=keys, roster=roster, revoked=bank.revoked)
    assert door.hello()["revoked"] == []
    said("revoke", folder, "--expert", driver.expert("c", KIPAN).hash)
    assert door.hello()["revoked"] == [driver.expert("c", KIPAN).hash]
    roster.close()


def test_experts_leave_the_bank_as_signed_files(
    tmp_path: Path, sites: Any, signer: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = ExpertShape(dim=3, embed=4, attention=2)
    width, answer = parameter_count(Abmil(shape)), sites.answer

    def whole(task: Task, request: Message) -> Message:
        reply = answer(task, request)
        if not isinstance(reply, ExpertReply):
            return reply
        return replace(reply, weights=np.repeat(reply.weights[:, :1], width, axis=1))

    monkeypatch.setattr(sites, "answer", whole)
    driver = Driver(tmp_path / "study", sites, replace(CONFIG, shape=shape))
    driver.run()
    settings = Settings(name="eye", host="localhost:8443", study=driver.config)
    save_settings(settings, driver.folder)
    driver.revoke(driver.expert("b", SKCM))
    out = said("experts", driver.folder, "--export", tmp_path / "files")
    assert out.count("wrote ") == 7  # c; a and d twice; two averages
    keys = {site: public_text(signer(site)) for site in sites.holdings}
    ours = public_text(Keys.of(driver.folder).signing())
    found = [
        load_artifact(
            path,
            trusted=lambda card: card.signer == (keys[card.site] if card.site else ours),
            study=driver.config,
        )
        for path in sorted((tmp_path / "files").iterdir())
    ]
    assert sorted(str(artifact.card.cancer) for artifact in found) == ["KIPAN"] + ["UVM"] * 6
    request = driver.request("score_sources", "c", KIPAN)
    (average,) = [a for a in found if a.hash == request.signed[-1].hash]
    assert np.array_equal(average.weights[:1], request.weights[-1:])
