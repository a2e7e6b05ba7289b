"""This site's signature on the experts that it gives, and its checks of those that it gets.

What the coordinator sends is believed only as far as the signatures go: weights that a site did
not sign as an expert of this cancer, study, M0, bins and encoder are not used.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime

from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.errors import MessageError, NotEstimableError
from cropkt.experts.artifact import m0_hash
from cropkt.experts.audit import audit
from cropkt.experts.card import (
    AuditSummary,
    Card,
    Folds,
    check_models,
    check_study,
    models_of,
    name_of,
    public_text,
    sign,
    training_hash,
    verified,
)
from cropkt.messages import ExpertRequest, RouterRequest, Signed, TransferRequest, Weights
from cropkt.transfer.target import Target
from cropkt_client.enrol import Keys
from cropkt_client.policy import rounded
from cropkt_client.site import Site
from cropkt_client.trust import Trust

log = logging.getLogger("cropkt.client")


def sign_expert(
    request: ExpertRequest,
    site: Site,
    weights: Weights,
    excluded: Sequence[Folds],
    *,
    patients: int,
    events: int,
    epsilon: float | None = None,
    delta: float | None = None,
    audit: AuditSummary | None = None,
) -> Signed:
    """Return the signed card of an expert that this site trained.

    Args:
        request: that asked for it.
        site: this one.
        weights: (F, parameters), as they are to leave.
        excluded: of each of the F models, the folds that it did not learn from.
        patients: of the cohort; the card has them rounded, or not at all, as the policy says.
        events: of the cohort, likewise.
        epsilon: of the cohort's privacy budget that is spent, if training was private.
        delta: of the same.
        audit: how well membership can be told from the expert, if that was measured.
    """
    study, key, policy = request.study, Keys.of(site.state).signing, site.config.release
    told: tuple[int | None, int | None] = (None, None)
    if policy is not None:
        step = policy.round_counts_to
        told = (
            rounded(patients, policy.minimum_patients, step),
            rounded(events, policy.minimum_events, step),
        )
    card = Card(
        cancer=request.cancer,
        site=site.config.site,
        round=request.round,
        patients=told[0],
        events=told[1],
        endpoint=study.endpoint,
        encoder=site.config.encoder,
        shape=study.shape,
        models=models_of(weights, excluded),
        m0=m0_hash(study),
        study=study.hash(),
        training=training_hash(study),
        epsilon=epsilon,
        delta=delta,
        audit=audit,
        parents=() if request.signed is None else (request.signed.hash,),
        licence=site.config.licence,
        created=datetime.now(UTC).date().isoformat(),
        signer=public_text(key),
    )
    text, signature = sign(card, key)
    return Signed(card=text, signature=signature)


def audited(target: Target, site: Site) -> AuditSummary | None:
    """Return how well membership is told from the target's own experts, None if not estimable.

    The figures are rounded, and the count is the card's: exact ones would tell of single patients.
    """
    policy = site.config.release
    try:
        found = audit(target.own, target.cohort, target.plan, opinions=target.opinions)
    except NotEstimableError as error:
        log.warning("membership audit: %s", error)
        return None
    log.info("membership audit of %s: %s", target.cohort.cancer, found.sentence())
    rate, count = found.tpr_at_1_percent, None
    if policy is not None:
        count = rounded(found.patients, policy.minimum_patients, policy.round_counts_to)
    if count is None:
        return None  # nothing of so few leaves
    return AuditSummary(
        method=found.method,
        auroc=round(found.auroc, 3),
        low=round(found.low, 3),
        high=round(found.high, 3),
        patients=count,
        detectable=round(found.detectable, 3),
        tpr_at_1_percent=None if rate is None else round(rate.value, 2),
    )


def accept_sources(request: TransferRequest | RouterRequest, site: Site) -> None:
    """Check the experts of other cancers that a request brings: one model of each.

    Raises:
        ArtifactError: one of them is not what it must be; says which and why.
        MessageError: they are not as many as the request names.
    """
    accept_models(site, request.study, request.sources, request.weights, request.signed)


def accept_models(
    site: Site,
    study: StudyConfig,
    sources: Sequence[Cancer],
    weights: Weights,
    signed: Sequence[Signed],
) -> None:
    """Check one model each of experts of `sources`, as `accept_sources` does."""
    if not len(sources) == len(weights) == len(signed):
        raise MessageError("message", "as many experts and signatures as sources are needed")
    shared: Folds = () if study.source == "all_patients" else (0,)
    for cancer, row, card in zip(sources, weights, signed, strict=True):
        accept(site, study, row[None], card, excluded=[shared], cancer=cancer)


def accept(
    site: Site,
    study: StudyConfig,
    weights: Weights,
    signed: Signed | None,
    *,
    excluded: Sequence[Folds],
    cancer: Cancer,
) -> None:
    """Check that weights are the signed models of an expert that this site may use.

    Args:
        site: this one.
        study: that the expert must have been made for.
        weights: (F, parameters).
        signed: the card of the expert and its signature.
        excluded: of each of the F models, the folds that it must not have learnt from.
        cancer: whose expert is wanted.

    Raises:
        ArtifactError: the expert is not what it must be; says why.
        MessageError: it is not signed at all.
    """
    if signed is None:
        raise MessageError("message", f"the expert of {cancer} is not signed")
    card, trust = verified(signed.card, signed.signature), Trust(site.config, site.state)
    trust.check(card)
    trust.refuse_revoked(name_of(card), signed.hash, *card.parents)
    check_study(card, study, m0=m0_hash(study))
    check_models(card, weights, excluded, cancer=cancer)
    trust.pin(card)
