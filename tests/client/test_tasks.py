"""Each message's task on a real small site, from describe to release."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cropkt.cancers import Cancer
from cropkt.config import PUBLISHED, StudyConfig
from cropkt.errors import ConfigError, MessageError, OtherExpertError
from cropkt.messages import (
    DescribeRequest,
    ExpertReply,
    ExpertRequest,
    FedAvgRequest,
    Fewest,
    ReleaseReply,
    ReleaseRequest,
    RouterRequest,
    TransferReply,
    TransferRequest,
    pack,
)
from cropkt.transfer.arms import arms_of
from cropkt_client import tasks
from cropkt_client.site import Site

UVM, SKCM, KIPAN = Cancer.UVM, Cancer.SKCM, Cancer.KIPAN


def expert(site: Site, study: StudyConfig, cancer: Cancer, **options: object) -> ExpertReply:
    request = ExpertRequest(task="t", study=study, cancer=cancer, **options)  # type: ignore[arg-type]
    return tasks.fit_expert(request, site)


Sources = dict[str, Any]  # of a request: the other cancers, their experts' weights and cards


@pytest.fixture
def experts_of(make_site: Callable[..., Site]) -> Callable[[StudyConfig], Sources]:
    """Return experts of two other cancers with the same planted truth, trained in a study."""
    sites = {c: make_site(c, seed=i + 1) for i, c in enumerate((KIPAN, SKCM))}

    def train(study: StudyConfig) -> Sources:
        replies = [expert(site, study, cancer) for cancer, site in sites.items()]
        return {
            "sources": tuple(sites),
            "weights": np.concatenate([reply.weights for reply in replies]),
            "signed": tuple(reply.signed for reply in replies),
        }

    return train


@pytest.fixture
def sources(experts_of: Callable[[StudyConfig], Sources], study: StudyConfig) -> Sources:
    return experts_of(study)


def whole(site: Site, study: StudyConfig, sources: Sources) -> tuple[TransferReply, ReleaseReply]:
    """Take a site through every task of one study."""
    expert(site, study, UVM)
    scores = tasks.score_sources(
        TransferRequest(task="t", study=study, cancer=UVM, **sources), site
    )
    tasks.fit_router(RouterRequest(task="t", study=study, cancer=UVM, **sources), site)
    return scores, tasks.release(ReleaseRequest(task="t", study=study, cancer=UVM), site)


def test_describe_counts_and_checks(make_site: Callable[..., Site], study: StudyConfig) -> None:
    reply = tasks.describe(DescribeRequest(task="t", study=study), make_site())
    (count,) = reply.cohorts
    assert (count.cancer, count.patients, count.dim) == (UVM, 48, 6)
    assert 10 < count.events < 48
    assert reply.versions["cropkt"]


@pytest.mark.parametrize("encoder", ["UNI2-h", ""])
def test_features_of_another_encoder_are_not_used(
    make_site: Callable[..., Site], study: StudyConfig, encoder: str
) -> None:
    site = make_site()
    site = replace(site, config=replace(site.config, encoder="CONCH"))
    with pytest.raises(ConfigError, match=f"CONCH is named, the study's is {encoder or 'none'}"):
        tasks.describe(DescribeRequest(task="d", study=replace(study, encoder=encoder)), site)
    with pytest.raises(ConfigError, match=r"site\.yaml: encoder"):
        expert(site, replace(study, encoder=encoder), UVM)
    assert expert(site, replace(study, encoder="CONCH"), UVM).patients == 48


def test_an_expert_learns_and_only_one_leaves(
    make_site: Callable[..., Site], study: StudyConfig
) -> None:
    reply = expert(make_site(), study, UVM)
    assert reply.weights.shape[0] == 1
    assert reply.score.c_index is not None
    assert reply.score.c_index > 0.65
    assert reply.fewest == Fewest(patients=48, events=reply.events)  # it learnt from all
    again = expert(make_site(SKCM, seed=0), study, SKCM)
    assert reply.weights.shape == again.weights.shape


def test_a_shared_cancer_gives_its_fold_models_too(
    make_site: Callable[..., Site], study: StudyConfig
) -> None:
    site = make_site()
    reply = expert(site, study, UVM, shared=True)
    assert reply.weights.shape[0] == 1 + 3 + 3
    assert reply.fewest is not None
    assert reply.fewest.patients == 16  # without two of three folds
    assert reply.fewest.events < reply.events / 2
    following = expert(
        site, study, UVM, shared=True, round=1, weights=reply.weights, signed=reply.signed
    )
    assert not np.array_equal(following.weights, reply.weights)


@pytest.mark.parametrize("variant", ["plain", "standardised", "hospital", "published"])
def test_a_whole_study_of_one_site(
    make_site: Callable[..., Site],
    study: StudyConfig,
    experts_of: Callable[[StudyConfig], Sources],
    variant: str,
) -> None:
    if variant == "standardised":
        study = replace(study, training=replace(study.training, standardise="site"))
    elif variant == "hospital":
        study = replace(study, split="hospital")
    elif variant == "published":
        router = replace(PUBLISHED.router, epochs=2)
        study = replace(study, source="fold_0", router=router)
    scores, release = whole(make_site(), study, experts_of(study))
    assert len(scores.scores) == 2
    assert len(scores.training_scores) == 3
    assert all(score.c_index is not None and score.c_index > 0.6 for score in scores.scores)
    assert set(release.arms) == set(arms_of(study))
    assert ("roupkt+" in release.arms) == (variant != "published")
    auto = release.arms["auto"]
    assert set(auto.against) == {"self_only", "random_init"}
    assert auto.cost is not None
    assert auto.cost.received > 0
    assert auto.brier is not None
    assert 0 < auto.brier < 0.3
    assert len(auto.auc) == 3
    assert auto.log_rank is not None
    assert release.verdict is not None
    assert sum(release.verdict.candidates.values()) == 3
    assert set(release.voices) == {UVM, KIPAN, SKCM}
    assert sum(voice.weight for voice in release.voices.values()) == pytest.approx(1)
    assert all(score.lead is not None and score.lead_se for score in scores.scores)
    zero_shot = release.arms["zero_shot"]
    assert zero_shot.c_index is not None
    assert zero_shot.c_index > 0.6
    assert zero_shot.low is not None
    assert zero_shot.gain is not None
    assert set(release.routing) == {UVM, KIPAN, SKCM}
    if variant != "published":  # there the weights of the top k are not renormalised
        assert sum(release.routing.values()) == pytest.approx(1)
    assert sum(release.zero_shot_choice.values()) == 3


def test_the_same_study_gives_the_same_numbers(
    make_site: Callable[..., Site],
    study: StudyConfig,
    sources: Sources,
) -> None:
    site = make_site()
    first, second = whole(site, study, sources)[1], whole(site, study, sources)[1]
    assert numbers_of(first) == numbers_of(second)


def numbers_of(reply: ReleaseReply) -> ReleaseReply:
    """Return a reply without what the machine decides: seconds and memory."""
    arms = {arm: replace(score, cost=None) for arm, score in reply.arms.items()}
    return replace(reply, seconds=0, arms=arms)


def test_a_model_of_all_cancers_is_trained_on_and_judged_by_fold(
    make_site: Callable[..., Site],
    study: StudyConfig,
    experts_of: Callable[[StudyConfig], Sources],
) -> None:
    site = make_site()
    study = replace(study, fedavg_rounds=2, arms=("fedavg", "fedavg_tuned"))
    whole(site, study, experts_of(study))
    first = tasks.fit_fedavg(FedAvgRequest(task="t", study=study, cancer=UVM), site)
    assert first.weights.shape[0] == 1 + study.folds
    assert not np.array_equal(first.weights[0], first.weights[1])
    again = tasks.fit_fedavg(
        FedAvgRequest(task="t", study=study, cancer=UVM, round=1, weights=first.weights), site
    )
    assert not np.array_equal(first.weights, again.weights)
    found = tasks.release(
        ReleaseRequest(task="t", study=study, cancer=UVM, everyone=again.weights), site
    )
    assert set(found.arms) == {"local", "roupkt+", "fedavg", "fedavg_tuned"}
    with pytest.raises(MessageError, match="weights have shape"):
        tasks.fit_fedavg(
            FedAvgRequest(task="t", study=study, cancer=UVM, round=1, weights=again.weights[:2]),
            site,
        )
    with pytest.raises(MessageError, match="weights have shape"):
        tasks.release(
            ReleaseRequest(task="t", study=study, cancer=UVM, everyone=again.weights[:2]), site
        )


def test_few_shots_are_told_by_draw(
    make_site: Callable[..., Site],
    study: StudyConfig,
    experts_of: Callable[[StudyConfig], Sources],
) -> None:
    study = replace(study, shots=(16,), draws=2, arms=("auto",))
    _, found = whole(make_site(), study, experts_of(study))
    (shots,) = found.few_shot
    assert shots.patients == 16
    assert all(len(values) == 2 for values in shots.arms.values())


def test_weights_of_another_shape_are_refused(
    make_site: Callable[..., Site], study: StudyConfig
) -> None:
    site = make_site()
    signed = expert(site, study, UVM).signed
    with pytest.raises(OtherExpertError, match="1 models came, 7 are wanted"):
        expert(site, study, UVM, weights=np.zeros((1, 7), dtype=np.float32), signed=signed)


def test_release_before_a_router_is_refused(
    make_site: Callable[..., Site], study: StudyConfig
) -> None:
    with pytest.raises(MessageError, match="no router here yet"):
        tasks.release(ReleaseRequest(task="t", study=study, cancer=UVM), make_site())


def test_replies_never_hold_an_id(
    make_site: Callable[..., Site],
    study: StudyConfig,
    sources: Sources,
) -> None:
    site = make_site()
    for reply in whole(site, study, sources):
        text, arrays = pack(reply)
        assert "SECRETPATIENT" not in text
        assert not arrays
