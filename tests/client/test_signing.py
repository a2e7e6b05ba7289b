"""What a site signs, and what it refuses of what the coordinator sends it."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from cropkt import errors
from cropkt.bundle import bundle_hash
from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.experts.card import Card, fingerprint, hash_of, public_text, read_card, sign, verified
from cropkt.messages import (
    ExpertReply,
    ExpertRequest,
    ReleaseRequest,
    RouterRequest,
    Signed,
    TransferRequest,
)
from cropkt_client import tasks
from cropkt_client.cli import app
from cropkt_client.enrol import Enrolment, Keys
from cropkt_client.settings import ReleasePolicy
from cropkt_client.site import Site
from cropkt_client.trust import COORDINATOR, note_revoked, revoked

UVM, SKCM = Cancer.UVM, Cancer.SKCM
Ask = Callable[[], object]


def trained(site: Site, study: StudyConfig, cancer: Cancer, **options: Any) -> ExpertReply:
    return tasks.fit_expert(ExpertRequest(task="t", study=study, cancer=cancer, **options), site)


def card_in(reply: ExpertReply) -> Card:
    assert reply.signed is not None
    return verified(reply.signed.card, reply.signed.signature)


def resigned(reply: ExpertReply, key: Ed25519PrivateKey, **changes: Any) -> Signed:
    """Return a reply's card with other values, signed with any key."""
    card = replace(card_in(reply), **{"signer": public_text(key), **changes})
    text, signature = sign(card, key)
    return Signed(card=text, signature=signature)


@dataclass
class Meeting:
    """A target, and another site's expert that the coordinator sends it."""

    target: Site
    other: Site
    study: StudyConfig
    reply: ExpertReply

    def request(self, **changes: Any) -> TransferRequest:
        values = {"sources": (SKCM,), "weights": self.reply.weights, "signed": (self.reply.signed,)}
        return TransferRequest(task="t", study=self.study, cancer=UVM, **{**values, **changes})

    def score(self, **changes: Any) -> None:
        tasks.score_sources(self.request(**changes), self.target)

    def route(self) -> None:
        request = self.request()
        tasks.fit_router(
            RouterRequest(
                task="r",
                study=self.study,
                cancer=UVM,
                sources=request.sources,
                weights=request.weights,
                signed=request.signed,
            ),
            self.target,
        )

    def resigned(self, **changes: Any) -> Signed:
        """Return another card of the other site, signed by itself."""
        return resigned(self.reply, Keys.of(self.other.state).signing, **changes)


@pytest.fixture
def meeting(make_site: Callable[..., Site], study: StudyConfig) -> Meeting:
    study = replace(study, training=replace(study.training, epochs=1, minimum_updates=0))
    target, other = make_site(UVM), make_site(SKCM, seed=1)
    trained(target, study, UVM)
    return Meeting(target, other, study, trained(other, study, SKCM))


# What it signs


def test_a_site_signs_what_it_gives_and_tells_no_exact_count(meeting: Meeting) -> None:
    card = card_in(meeting.reply)
    assert card.signer == Keys.of(meeting.other.state).public()["signing_key"]
    assert (card.cancer, card.site, card.round, card.parents) == (SKCM, "site-SKCM", 0, ())
    assert [model.excluded for model in card.models] == [()]
    assert meeting.reply.patients == 48
    assert card.patients == 50  # to the nearest 5
    assert card.events is not None
    assert card.events % 5 == 0


@pytest.mark.parametrize("policy", [None, ReleasePolicy(minimum_patients=49, minimum_events=49)])
def test_a_count_below_the_minimum_is_not_on_the_card(
    meeting: Meeting, policy: ReleasePolicy | None
) -> None:
    site = replace(meeting.other, config=replace(meeting.other.config, release=policy))
    card = card_in(trained(site, meeting.study, SKCM))
    assert (card.patients, card.events) == (None, None)


def test_the_published_source_is_signed_as_the_model_that_it_is(
    make_site: Callable[..., Site], study: StudyConfig
) -> None:
    study = replace(study, source="fold_0")
    site = make_site()
    assert [m.excluded for m in card_in(trained(site, study, UVM)).models] == [(0,)]
    shared = card_in(trained(site, study, UVM, shared=True))
    assert [m.excluded for m in shared.models] == [
        *((), (0,), (1,), (2,)),
        *((0, 1), (0, 2), (1, 2)),
    ]


def test_an_expert_names_the_average_that_it_began_with(
    make_site: Callable[..., Site], study: StudyConfig
) -> None:
    site = make_site()
    first = trained(site, study, UVM, shared=True)
    assert first.signed is not None
    second = trained(
        site, study, UVM, shared=True, round=1, weights=first.weights, signed=first.signed
    )
    assert card_in(second).parents == (first.signed.hash,)


def test_the_signature_decides_no_weight(
    make_site: Callable[..., Site], study: StudyConfig, meeting: Meeting
) -> None:
    again = trained(meeting.other, meeting.study, SKCM)
    (meeting.other.state / "keys" / "signing.key").unlink()
    anew = trained(meeting.other, meeting.study, SKCM)
    assert card_in(anew).signer != card_in(again).signer
    assert np.array_equal(anew.weights, again.weights)


# What it refuses


def test_an_expert_of_another_site_is_taken_and_its_key_is_pinned(
    meeting: Meeting, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        meeting.score()
    signer = card_in(meeting.reply).signer
    assert fingerprint(signer) in caplog.text
    assert json.loads((meeting.target.state / "signers.json").read_text()) == {"site-SKCM": signer}
    meeting.score()


def test_weights_that_the_coordinator_altered_are_refused(meeting: Meeting) -> None:
    weights = meeting.reply.weights.copy()
    weights[0, 3] = np.nextafter(weights[0, 3], np.float32(9))
    with pytest.raises(errors.WeightsChangedError):
        meeting.score(weights=weights)


def test_a_card_that_the_coordinator_altered_is_refused(meeting: Meeting) -> None:
    signed = meeting.reply.signed
    assert signed is not None
    text = signed.card.replace('"events":', '"events":1')
    with pytest.raises(errors.CardChangedError):
        meeting.score(signed=(replace(signed, card=text),))
    with pytest.raises(errors.CardError):
        meeting.score(signed=(replace(signed, card=signed.card + " "),))


def test_an_expert_that_nobody_signed_is_refused(meeting: Meeting) -> None:
    with pytest.raises(errors.MessageError, match="as many experts and signatures"):
        meeting.score(signed=())
    with pytest.raises(errors.MessageError, match="the expert of UVM is not signed"):
        trained(meeting.target, meeting.study, UVM, weights=meeting.reply.weights)


def test_another_key_under_a_known_name_is_refused(meeting: Meeting) -> None:
    meeting.score()
    forged = resigned(meeting.reply, Ed25519PrivateKey.generate())
    with pytest.raises(errors.UnknownSignerError, match="Telephone"):
        meeting.score(signed=(forged,))


def test_nobody_signs_in_this_sites_own_name(meeting: Meeting) -> None:
    forged = resigned(meeting.reply, Ed25519PrivateKey.generate(), site="site-UVM")
    with pytest.raises(errors.UnknownSignerError):
        meeting.score(signed=(forged,))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"cancer": Cancer.KIPAN}, errors.OtherExpertError),
        ({"encoder": "another"}, errors.EncoderMismatchError),
        ({"bin_days": 30}, errors.BinsMismatchError),
        ({"m0": "0" * 64}, errors.StartMismatchError),
        ({"study": "0" * 16}, errors.StudyMismatchError),
    ],
)
def test_an_expert_for_something_else_is_refused(
    meeting: Meeting, changes: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        meeting.score(signed=(meeting.resigned(**changes),))
    assert not (meeting.target.state / "signers.json").exists()  # its key does not count yet


def test_another_model_of_the_same_expert_is_refused(meeting: Meeting) -> None:
    """Which of a site's models other targets get is the study's to say, not the coordinator's."""
    shared = trained(meeting.other, meeting.study, SKCM, shared=True)
    meeting.score(weights=shared.weights[:1], signed=(shared.signed,))
    with pytest.raises(errors.WeightsChangedError):
        meeting.score(weights=shared.weights[1:2], signed=(shared.signed,))


def test_only_signers_that_are_named_count_if_any_are(meeting: Meeting) -> None:
    signer = card_in(meeting.reply).signer

    def only(**signers: str) -> None:
        config = replace(meeting.target.config, signers=signers)
        meeting.target = replace(meeting.target, config=config)
        meeting.score()

    with pytest.raises(errors.UnknownSignerError, match="does not name site-SKCM"):
        only(**{"site-KIPAN": fingerprint(signer)})
    with pytest.raises(errors.UnknownSignerError, match="is signed by"):
        only(**{"site-SKCM": fingerprint(base64.b64encode(bytes(32)).decode())})
    only(**{"site-SKCM": fingerprint(signer)})
    assert not (meeting.target.state / "signers.json").exists()


def test_damaged_memory_of_signers_is_not_replaced(meeting: Meeting) -> None:
    path = meeting.target.state / "signers.json"
    path.write_text('{"site-SKCM": "nonsense"}')
    with pytest.raises(errors.ConfigError, match="damaged"):
        meeting.score()
    assert "nonsense" in path.read_text()


# Averages


@pytest.fixture
def coordinator(meeting: Meeting) -> Ed25519PrivateKey:
    """Enrol the target with a coordinator that has this key."""
    key = Ed25519PrivateKey.generate()
    Enrolment(
        host="127.0.0.1:1",
        study="eye",
        site="site-UVM",
        cancers=(UVM,),
        coordinator_key=public_text(key),
        bundle=bundle_hash(),
    ).save(meeting.target.state)
    return key


def test_averages_are_signed_by_the_coordinator_alone_and_nothing_else_is(
    meeting: Meeting, coordinator: Ed25519PrivateKey
) -> None:
    parents = ("1" * 64, "2" * 64)
    average = {"site": None, "parents": parents}
    meeting.score(signed=(resigned(meeting.reply, coordinator, **average),))
    with pytest.raises(errors.UnknownSignerError, match="only a site signs"):
        meeting.score(signed=(resigned(meeting.reply, coordinator, site=None),))
    with pytest.raises(errors.UnknownSignerError):  # a site cannot make an average
        meeting.score(signed=(meeting.resigned(**average),))
    meeting.score()
    with pytest.raises(errors.UnknownSignerError):  # nor the coordinator a site's expert
        meeting.score(signed=(resigned(meeting.reply, coordinator),))


def test_the_averaged_own_experts_are_checked_before_they_replace_a_sites_own(
    meeting: Meeting, coordinator: Ed25519PrivateKey
) -> None:
    mine = trained(meeting.target, meeting.study, UVM, shared=True)
    average = resigned(mine, coordinator, site=None, parents=("1" * 64, "2" * 64))
    request = meeting.request()
    before = (meeting.target.state / "UVM" / "experts.npz").read_bytes()

    def route(own: np.ndarray, signed: Signed | None) -> None:
        tasks.fit_router(
            RouterRequest(
                task="r",
                study=meeting.study,
                cancer=UVM,
                shared=True,
                sources=request.sources,
                weights=request.weights,
                signed=request.signed,
                own=own,
                own_signed=signed,
            ),
            meeting.target,
        )

    with pytest.raises(errors.WeightsChangedError):
        route(mine.weights[::-1].copy(), average)
    with pytest.raises(errors.MessageError, match="not signed"):
        route(mine.weights, None)
    assert (meeting.target.state / "UVM" / "experts.npz").read_bytes() == before
    route(mine.weights, average)
    note_revoked(meeting.target.state, [average.hash])
    with pytest.raises(errors.RevokedExpertError, match="average of UVM"):
        tasks.release(ReleaseRequest(task="e", study=meeting.study, cancer=UVM), meeting.target)


# Revocation


def test_a_revoked_expert_is_used_no_more(meeting: Meeting) -> None:
    meeting.score()
    meeting.route()
    assert meeting.reply.signed is not None
    note_revoked(meeting.target.state, [meeting.reply.signed.hash])
    release = ReleaseRequest(task="e", study=meeting.study, cancer=UVM)
    asks: list[Ask] = [
        meeting.score,
        meeting.route,
        lambda: tasks.release(release, meeting.target),
    ]
    for ask in asks:
        with pytest.raises(errors.RevokedExpertError, match="expert SKCM of site-SKCM"):
            ask()


def test_what_was_made_from_a_revoked_expert_is_used_no_more(meeting: Meeting) -> None:
    child = meeting.resigned(parents=("3" * 64,))
    note_revoked(meeting.target.state, ["3" * 64])
    with pytest.raises(errors.RevokedExpertError):
        meeting.score(signed=(child,))


def test_what_is_revoked_stays_revoked(tmp_path: Path) -> None:
    note_revoked(tmp_path, ["1" * 64])
    note_revoked(tmp_path, ["2" * 64])
    note_revoked(tmp_path, [])
    assert revoked(tmp_path) == {"1" * 64, "2" * 64}
    (tmp_path / "revoked.json").write_text("[]nonsense")
    with pytest.raises(errors.ConfigError, match="damaged"):
        note_revoked(tmp_path, ["3" * 64])


def test_signers_can_be_read_out(meeting: Meeting, coordinator: Ed25519PrivateKey) -> None:
    meeting.score()
    config = meeting.target.folder / "site.yaml"
    shown = CliRunner().invoke(app, ["signers", "--config", str(config), "--json"])
    assert shown.exit_code == 0, shown.output
    own = Keys.of(meeting.target.state).public()["signing_key"]
    assert json.loads(shown.stdout) == {
        "site-UVM": fingerprint(own),
        "site-SKCM": fingerprint(card_in(meeting.reply).signer),
        COORDINATOR: fingerprint(public_text(coordinator)),
    }
    lines = CliRunner().invoke(app, ["signers", "--config", str(config)]).stdout.splitlines()
    assert lines[0] == f"{fingerprint(own)}  site-UVM  (this site)"


def test_the_hash_of_an_expert_is_that_of_its_card(meeting: Meeting) -> None:
    signed = meeting.reply.signed
    assert signed is not None
    assert signed.hash == hash_of(signed.card.encode())
    assert read_card(signed.card) == card_in(meeting.reply)
