"""What a site does for each message: one function each, from request to reply.

Nothing here knows Flower. A reply holds weights and aggregate numbers only.
"""

from __future__ import annotations

import logging
import platform
import time
from collections import Counter
from dataclasses import replace
from importlib.metadata import version
from typing import Literal

import numpy as np
import torch

import cropkt
from cropkt.cancers import Cancer
from cropkt.cohort.bags import Cohort
from cropkt.cohort.feed import settled
from cropkt.config import ExpertShape, StudyConfig
from cropkt.errors import MessageError
from cropkt.experts.abmil import Abmil, flatten, parameter_count
from cropkt.experts.training import Plan, standardise_for, train_experts
from cropkt.messages import (
    Arm,
    CohortCount,
    DescribeReply,
    DescribeRequest,
    ExpertReply,
    ExpertRequest,
    FedAvgReply,
    FedAvgRequest,
    Fewest,
    ReleaseReply,
    ReleaseRequest,
    RouterReply,
    RouterRequest,
    Score,
    Shots,
    Signed,
    SourceScore,
    TransferReply,
    TransferRequest,
    Weights,
)
from cropkt.prediction.kept import Source
from cropkt.prediction.making import final_risk
from cropkt.prediction.making import release as make_released
from cropkt.survival.metrics import Estimate, out_of_fold
from cropkt.transfer.arms import (
    CONTROLS,
    Job,
    Prediction,
    Spent,
    arms_of,
    predictions,
    router_arm,
    untrained,
)
from cropkt.transfer.few_shot import few_shot
from cropkt.transfer.router_training import RouterStack
from cropkt.transfer.target import Target
from cropkt_client.findings import arm_score, verdict, voices
from cropkt_client.private import (
    PrivateExpert,
    kept_here,
    refuse_rounds,
    refuse_shared,
    withheld,
)
from cropkt_client.signing import accept, accept_models, accept_sources, audited, sign_expert
from cropkt_client.site import Site, folds_of
from cropkt_client.trust import Trust

log = logging.getLogger("cropkt.client")

UNTRAINED = 8  # experts that every source is compared with


def describe(request: DescribeRequest, site: Site) -> DescribeReply:
    """Check every cohort once, values included, and say how many patients there are."""
    counts = []
    for cancer in site.config.cancers:
        cohort, dropped = site.cohort(cancer, request.study, check_values=True)
        for line in dropped:
            log.warning("%s %s: %s", site.config.site, cancer, line)
        counts.append(
            CohortCount(
                cancer=cancer,
                patients=len(cohort),
                events=int(cohort.event.sum()),
                dim=cohort.dim,
            )
        )
    return DescribeReply(
        task=request.task,
        site=site.config.site,
        cohorts=tuple(counts),
        versions={
            "cropkt": cropkt.__version__,
            "torch": version("torch"),
            "flwr": version("flwr"),
            "python": platform.python_version(),
        },
    )


def fit_expert(request: ExpertRequest, site: Site) -> ExpertReply:
    """Train the cross-fitted experts of one cancer and give away the one of all patients."""
    started = time.monotonic()
    study = request.study
    cohort, plan = _patients(site, request.cancer, study)
    models = len(plan.excluded)
    private = PrivateExpert.of(request, site, cohort)  # paid for before any work
    if request.weights is not None:
        accept(
            *(site, study, request.weights, request.signed),
            excluded=plan.excluded,
            cancer=request.cancer,
        )
    experts = _start(site, study, request.weights, models=models)
    experts = train_experts(
        cohort,
        plan,
        initial=experts,
        config=study.training,
        seed=study.seed + 1000 * request.round,
        on_epoch=site.on_epoch(request),
        checkpoint=site.checkpoint(request, cohort),
    )
    weights = flatten(experts).cpu().numpy()
    spent = np.array(time.monotonic() - started)
    site.keep(f"{request.cancer}/experts", {"weights": weights, "seconds": spent})
    shared = plan.model() if study.source == "all_patients" else plan.model(0)
    sent = list(range(models)) if request.shared else [shared]
    patients, events = len(cohort), int(cohort.event.sum())
    leaving = weights[sent] if private is None else private.train()
    score, told = Score(), None
    if private is None:
        target = Target.of(cohort, plan, experts, ask=site.features.ask)
        score, told = _score(target.local_score()), audited(target, site)
    return ExpertReply(
        task=request.task,
        cancer=request.cancer,
        patients=patients,
        events=events,
        weights=leaving,
        score=score,
        seconds=time.monotonic() - started if private is None else 0.0,
        fewest=_fewest(cohort, plan, without=max(len(plan.excluded[i]) for i in sent)),
        signed=sign_expert(
            *(request, site, leaving, [plan.excluded[i] for i in sent]),
            patients=patients,
            events=events,
            epsilon=private.payment.epsilon if private else None,
            delta=private.payment.delta if private else None,
            audit=told,
        ),
    )


def score_sources(request: TransferRequest, site: Site) -> TransferReply:
    """Score the experts of other cancers on this site's patients, per training folds."""
    started = time.monotonic()
    accept_sources(request, site)
    if site.config.privacy is not None:
        cohort, plan = _patients(site, request.cancer, request.study)
        return replace(withheld(request, cohort), fewest=_fewest(cohort, plan))
    target = _target(site, request.cancer, request.study)
    shape = request.study.shape
    sources = _experts(site, shape, request.weights, models=len(request.weights))
    opinions = target.consult(sources, request.study)
    whole, *folds = target.source_scores(opinions)
    control = untrained(request.study, UNTRAINED).to(site.device)
    leads = target.leads_over(opinions[0], target.consult_whole(control, request.study))
    return TransferReply(
        task=request.task,
        cancer=request.cancer,
        patients=len(target.cohort),
        events=int(target.cohort.event.sum()),
        scores=tuple(map(_source_score, whole, *leads)),
        training_scores=tuple(tuple(_score(score) for score in row) for row in folds),
        seconds=time.monotonic() - started,
        fewest=_fewest(target.cohort, target.plan),
    )


def fit_router(request: RouterRequest, site: Site) -> RouterReply:
    """Train the router over the experts chosen for this site."""
    started = time.monotonic()
    private = site.config.privacy is not None
    if private:
        refuse_shared(request)
    accept_sources(request, site)
    site.keep(
        f"{request.cancer}/sources",
        {
            "weights": request.weights,
            "names": np.array(list(request.sources)),
            "cards": np.array([signed.card for signed in request.signed]),
            "signatures": np.array([signed.signature for signed in request.signed]),
        },
    )
    target = _target(
        site, request.cancer, request.study, own=request.own, signed=request.own_signed
    )
    sources = _experts(site, request.study.shape, request.weights, models=len(request.weights))
    opinions = target.consult(sources, request.study)
    stack = RouterStack(target, sources, opinions, request.study)
    if request.routers is not None:
        stack.load(_checked(request.routers, stack.module, models=target.views))
    stack.train(on_epoch=site.on_epoch(request), checkpoint=site.checkpoint(request, target.cohort))
    weights = flatten(stack.module).cpu().numpy()
    spent = np.array(time.monotonic() - started)
    site.keep(f"{request.cancer}/routers", {"weights": weights, "seconds": spent})
    return RouterReply(
        task=request.task,
        cancer=request.cancer,
        patients=len(target.cohort),
        events=int(target.cohort.event.sum()),
        weights=weights if request.shared and not private else None,  # else nobody averages them
        seconds=0.0 if private else time.monotonic() - started,
        fewest=_fewest(target.cohort, target.plan),
    )


def fit_fedavg(request: FedAvgRequest, site: Site) -> FedAvgReply:
    """Train the model of all cancers, of all patients and without each fold."""
    started = time.monotonic()
    study = request.study
    refuse_rounds(request, site)
    cohort, nested = _patients(site, request.cancer, study)
    plan = Plan.one_a_fold(nested.folds, whole=True)
    models = _start(site, study, request.weights, models=len(plan.excluded))
    models = train_experts(
        cohort,
        plan,
        initial=models,
        config=study.training,
        seed=study.seed + 1000 * request.round,
        on_epoch=site.on_epoch(request),
        checkpoint=site.checkpoint(request, cohort),
    )
    return FedAvgReply(
        task=request.task,
        cancer=request.cancer,
        patients=len(cohort),
        events=int(cohort.event.sum()),
        weights=flatten(models).cpu().numpy(),
        seconds=time.monotonic() - started,
        fewest=_fewest(cohort, plan),
    )


def release(request: ReleaseRequest, site: Site) -> ReleaseReply:
    """Judge every arm out of fold."""
    started = time.monotonic()
    study, cancer = request.study, request.cancer
    bank, routers = site.kept(f"{cancer}/sources"), site.kept(f"{cancer}/routers")
    if bank is None or routers is None:
        raise MessageError("ReleaseRequest", f"{cancer} has no router here yet")
    names = [Cancer(name) for name in bank["names"]]
    both = zip(bank["cards"], bank["signatures"], strict=True)
    signed = [Signed(card=str(card), signature=str(signature)) for card, signature in both]
    accept_models(site, study, names, bank["weights"], signed)  # one may be revoked since
    target = _target(site, cancer, study)
    sources = _experts(site, study.shape, bank["weights"], models=len(names))
    opinions = target.consult(sources, study)
    stack = RouterStack(target, sources, opinions, study)
    learnt = routers["weights"] if request.routers is None else request.routers
    stack.load(_checked(learnt, stack.module, models=target.views))
    job = Job(
        target=target,
        study=study,
        sources=sources,
        opinions=opinions,
        router=stack,
        everyone=_everyone(request, study),
        before=_before(site, cancer, study),
        shared=request.routers is not None,
    )
    said = predictions(job, arms_of(study))
    _keep_predictions(site, cancer, job, said)
    cohort = target.cohort
    scores = out_of_fold(
        cohort.days,
        cohort.event,
        target.folds,
        {arm: prediction.risk for arm, (prediction, _) in said.items()},
        seed=study.seed,
        controls=[arm for arm in CONTROLS if arm in said],
    )
    make_released(
        site.released(cancer),
        job,
        site=site.config.site,
        sources=[
            Source(cancer=name, card=one.card, signature=one.signature)
            for name, one in zip(names, signed, strict=True)
        ],
        parents=[
            str(averaged) for averaged in (site.kept(f"{cancer}/experts") or {}).get("hashes", ())
        ],
        scores=scores,
        facts=site.facts(cohort),
    )
    choice: Counter[Literal["vote"] | Cancer] = Counter(
        "vote" if index is None else names[index] for index in job.zero_shot.choice
    )
    _, weights = job.routed
    found = ReleaseReply(
        task=request.task,
        cancer=cancer,
        patients=len(cohort),
        events=int(cohort.event.sum()),
        arms={arm: arm_score(scores[arm], *said[arm], target) for arm in said},
        routing=dict(zip([cancer, *names], map(float, weights.mean(0)), strict=True)),
        zero_shot_choice=dict(choice),
        reason="" if scores["local"].c_index is not None else "no comparable pair within a fold",
        verdict=verdict(job.guarded),
        voices=voices(job.guarded, cancer, names),
        few_shot=tuple(
            Shots(patients=shots, arms=arms) for shots, arms in few_shot(target, job.sources, study)
        ),
        seconds=time.monotonic() - started,
    )
    return found if site.config.privacy is None else kept_here(found, site)


def _everyone(request: ReleaseRequest, study: StudyConfig) -> Weights | None:
    """Return the models of all cancers that came along, checked in number and width."""
    if request.everyone is None:
        return None
    return _checked(request.everyone, Abmil(study.shape), models=1 + study.folds)


def _before(site: Site, cancer: Cancer, study: StudyConfig) -> dict[Arm, float]:
    """Return the seconds that this site spent earlier on what an arm trains."""
    trained: dict[Arm, str] = {"local": "experts", router_arm(study.router): "routers"}
    kept = {arm: site.kept(f"{cancer}/{name}") or {} for arm, name in trained.items()}
    return {arm: float(found["seconds"]) for arm, found in kept.items() if "seconds" in found}


def _keep_predictions(
    site: Site, cancer: Cancer, job: Job, said: dict[Arm, tuple[Prediction, Spent]]
) -> None:
    """Keep on site what each arm says of each patient, and whom it listened to."""
    cohort = job.target.cohort
    site.keep(
        f"{cancer}/predictions",
        {
            "patients": np.array(cohort.patient_ids),
            "folds": job.target.folds,
            "slides": np.array([slide for slides in cohort.slides for slide in slides]),
            "owners": np.repeat(np.arange(len(cohort)), [len(slides) for slides in cohort.slides]),
            "router_weights": job.routed[1],
            "risk_final": final_risk(job),
            **{f"risk_{arm}": prediction.risk for arm, (prediction, _) in said.items()},
        },
    )


def _patients(site: Site, cancer: Cancer, study: StudyConfig) -> tuple[Cohort, Plan]:
    """Return a cohort and its folds, the same at every call; patches stay where there is room."""
    cohort, _ = settled(site.cohort(cancer, study)[0], site.device)
    return cohort, Plan.cross_fitted(folds_of(cohort, study))


def _target(
    site: Site,
    cancer: Cancer,
    study: StudyConfig,
    *,
    own: Weights | None = None,
    signed: Signed | None = None,
) -> Target:
    """Return the target with its own experts, or with the averaged ones just received."""
    cohort, plan = _patients(site, cancer, study)
    if own is not None:
        accept(site, study, own, signed, excluded=plan.excluded, cancer=cancer)
        hashes = [] if signed is None else [signed.hash]
        site.keep(f"{cancer}/experts", {"weights": own, "hashes": np.array(hashes)})
    kept = site.kept(f"{cancer}/experts")
    if kept is None:
        raise MessageError("message", f"{cancer} has no expert here yet")
    for averaged in kept.get("hashes", ()):
        Trust(site.config, site.state).refuse_revoked(f"average of {cancer}", str(averaged))
    experts = _experts(site, study.shape, kept["weights"], models=len(plan.excluded))
    standardise_for(experts, cohort, plan, study.training)
    return Target.of(cohort, plan, experts, ask=site.features.ask)


def _fewest(cohort: Cohort, plan: Plan, *, without: int = 1) -> Fewest:
    """Return the smallest set that a model of a plan learnt from which lacks so many folds."""
    patients, events = plan.fewest(cohort.event, without=without)
    return Fewest(patients=patients, events=events)


def _start(site: Site, study: StudyConfig, weights: Weights | None, *, models: int) -> Abmil:
    """Return the models that a training starts from: those that came, or M0 as often."""
    if weights is not None:
        return _experts(site, study.shape, weights, models=models)
    m0 = Abmil.initial(study.shape, seed=study.seed, hazard=study.initial_hazard, models=models)
    return m0.to(site.device)


def _experts(site: Site, shape: ExpertShape, weights: Weights, *, models: int) -> Abmil:
    """Return experts on the site's device, from rows of weights, checked in number and width."""
    _checked(weights, Abmil(shape), models=models)
    experts = Abmil.from_flat(shape, torch.tensor(weights)).requires_grad_(False)
    return experts.to(site.device)


def _checked(weights: Weights, module: torch.nn.Module, *, models: int) -> Weights:
    want = (models, parameter_count(module))
    if weights.shape != want:
        raise MessageError("message", f"weights have shape {weights.shape}, expected {want}")
    return weights


def _score(estimate: Estimate) -> Score:
    return Score(c_index=estimate.c_index, se=estimate.se)


def _source_score(estimate: Estimate, lead: float, error: float) -> SourceScore:
    known = bool(np.isfinite(lead) and np.isfinite(error))
    return SourceScore(
        c_index=estimate.c_index,
        se=estimate.se,
        lead=float(lead) if known else None,
        lead_se=min(1.0, float(error)) if known else None,
    )
