"""Signatures on the coordinator's side: checks what sites sign, and signs what it averages.

An expert of one site goes on to others under that site's own signature. The coordinator signs
averages only, and names in them the experts that they were made from.
"""

from __future__ import annotations

from collections.abc import Sequence

from cropkt.cancers import Cancer
from cropkt.errors import (
    ArtifactError,
    CardError,
    RevokedExpertError,
    UnknownSignerError,
)
from cropkt.experts.artifact import m0_hash
from cropkt.experts.card import (
    Card,
    check_models,
    check_study,
    models_of,
    name_of,
    public_text,
    read_card,
    sign,
    verified,
)
from cropkt.experts.training import cross_fitted
from cropkt.messages import ExpertReply, ExpertRequest, Message, Signed, Weights
from cropkt_server.findings import Findings, total
from cropkt_server.pki import Keys
from cropkt_server.store import Task


class Experts:
    """The signed experts of one study."""

    def __init__(self, findings: Findings) -> None:
        self._findings, self._store, self._bank = findings, findings.store, findings.store.bank
        self._keys = Keys.of(findings.store.folder)

    def objection(
        self, task: Task, reply: ExpertReply, request: ExpertRequest, *, key: str | None
    ) -> str:
        """Return why an expert cannot be taken in, judged by its signature; nothing if it can.

        Args:
            task: the row that asked for it.
            reply: that brings it.
            request: that asked for it.
            key: of the site, as it enrolled. None, in a simulation: the first that it shows.
        """
        if reply.signed is None:
            return "its expert is not signed"
        known = key or self._store.meta(f"signer/{task.site}")
        try:
            self._check(task, reply.signed, reply.weights, request, known)
        except ArtifactError as error:
            return str(error)
        return ""

    def take(self, task: Task, reply: Message) -> None:
        """Take the expert in a reply, all of which was found right, into the bank."""
        if isinstance(reply, ExpertReply) and reply.signed is not None:
            self._bank.add(reply.signed, task=task.id)
            if self._store.meta(f"signer/{task.site}") is None:
                self._store.set_meta(f"signer/{task.site}", read_card(reply.signed.card).signer)

    def signed(self, cancer: Cancer, number: int, average: Weights) -> Signed:
        """Return the signed card of a round's experts: a single site's own, or the average's.

        Args:
            cancer: whose.
            number: of the round.
            average: (F, parameters), of the experts of that round.
        """
        given = self._given(cancer, number)
        if len(given) == 1:
            return given[0]
        cards, key = [read_card(signed.card) for signed in given], self._keys.signing()
        parents = tuple(signed.hash for signed in given)
        text, signature = sign(_joint(cards, parents, average, public_text(key)), key)
        joint = Signed(card=text, signature=signature)
        self._bank.add(joint)
        return joint

    def _given(self, cancer: Cancer, number: int) -> list[Signed]:
        """Return the signed experts of the sites whose models a round averages."""
        found = []
        for site in self._findings.averaged("fit_expert", cancer, number) or ():
            task = Task(kind="fit_expert", site=site, cancer=cancer, round=number)
            signed = self._findings.answer(task, ExpertReply).signed
            if signed is None:
                raise CardError(task.id, "the stored expert is not signed", "Start a new study")
            found.append(signed)
        return found

    def _check(
        self,
        task: Task,
        signed: Signed,
        weights: Weights,
        request: ExpertRequest,
        known: str | None,
    ) -> None:
        """Check that an expert is all that its row asked for, and signed by its site.

        Raises:
            ArtifactError: it is not; says why.
        """
        card = verified(signed.card, signed.signature)
        name, study = name_of(card), self._findings.config
        if card.site != task.site or (known is not None and card.signer != known):
            problem = f"it is not signed with the key of {task.site}"
            raise UnknownSignerError(name, problem, "Enrol again if the site has new keys")
        if signed.hash in self._bank.revoked():
            raise RevokedExpertError(name, "it was revoked", "Let the site train another")
        parents = () if request.signed is None else (request.signed.hash,)
        if (card.round, card.parents) != (task.round, parents):
            raise CardError(name, "its card names another round, or other parents")
        check_study(card, study, m0=m0_hash(study))
        excluded = cross_fitted(study.folds)
        if not request.shared:
            excluded = ((),) if study.source == "all_patients" else ((0,),)
        check_models(card, weights, excluded, cancer=request.cancer)


def _joint(cards: Sequence[Card], parents: tuple[str, ...], average: Weights, signer: str) -> Card:
    """Return the card of an average; the same for the same parents."""
    one = cards[0]
    epsilons, deltas = [c.epsilon for c in cards], [c.delta for c in cards]
    return Card(
        cancer=one.cancer,
        site=None,
        round=one.round,
        patients=total([card.patients for card in cards]),
        events=total([card.events for card in cards]),
        endpoint=one.endpoint,
        encoder=one.encoder,
        shape=one.shape,
        models=models_of(average, [model.excluded for model in one.models]),
        m0=one.m0,
        study=one.study,
        training=one.training,
        # Each patient is in one site's cohort: of several budgets the largest was spent on anyone.
        epsilon=max((e for e in epsilons if e), default=None) if all(epsilons) else None,
        delta=max((d for d in deltas if d), default=None) if all(deltas) else None,
        parents=parents,
        licence=one.licence if len({card.licence for card in cards}) == 1 else "",
        created=max(card.created for card in cards),
        signer=signer,
    )
