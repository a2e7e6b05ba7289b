"""The one expert that a private site gives away, and what else it keeps to itself.

With `privacy:` in `site.yaml`, everything computed from patients that leaves this site is the
weights of an expert trained by DP-SGD, paid for from the cohort's budget before its training
begins. Counts leave too, rounded as the release policy says: they are taken as known to everybody,
and the training takes nothing else from the cohort than the rounded count. Everything else stays
here: scores, arms, routing, routers, and the experts without noise that this site trains for its
own use. How long a task took is not told either, since it grows with the patients' slides. What is
told without noise is whether a task could be done, by a code.

Noise on scores would not help. One patient takes part in up to n - 1 comparable pairs, so hiding
them in the concordant and discordant counts of 25 sources for an epsilon of 2 moves each C-index
by about 50 / n: at a thousand patients .05, twice its standard error. And the score of a site's own
models has no such bound, because a patient changes the models too.
"""

from __future__ import annotations

from dataclasses import dataclass

from cropkt.cohort.bags import Cohort
from cropkt.config import StudyConfig
from cropkt.errors import ConfigError, RefusedError
from cropkt.experts.abmil import Abmil, flatten
from cropkt.experts.card import digest
from cropkt.files import write_private
from cropkt.messages import (
    ArmScore,
    ExpertRequest,
    FedAvgRequest,
    ReleaseReply,
    RouterRequest,
    Score,
    SourceScore,
    TransferReply,
    TransferRequest,
    Weights,
    pack,
)
from cropkt_client.budget import Budget, Payment
from cropkt_client.policy import WITHHELD, rounded
from cropkt_client.settings import Privacy
from cropkt_client.site import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateExpert:
    """An expert that is paid for, to be trained."""

    request: ExpertRequest
    site: Site
    cohort: Cohort
    privacy: Privacy
    budget: Budget
    payment: Payment

    @classmethod
    def of(cls, request: ExpertRequest, site: Site, cohort: Cohort) -> PrivateExpert | None:
        """Pay for an expert, unless it is paid; None where the site is not private.

        Raises:
            BudgetError: not so much is left.
            ConfigError: the study's training, or the cohort's size, does not allow it.
            RefusedError: the cancer is shared.
        """
        privacy, budget = site.config.privacy, Budget.of(site.folder, site.config)
        if privacy is None or budget is None:
            return None
        _check(request.study, privacy, patients=len(cohort))
        refuse_shared(request)
        from cropkt.experts.accountant import calibrated
        from cropkt.experts.private import schedule

        digest = site.digest(request)
        payment = budget.paid(digest)
        if payment is None:
            rate, steps = schedule(_known(site, len(cohort)))
            mechanism = calibrated(
                epsilon=privacy.of_one, delta=privacy.delta, sample_rate=rate, steps=steps
            )
            payment = budget.pay(
                mechanism, cancer=request.cancer, task=request.task, request=digest
            )
        return cls(
            request=request,
            site=site,
            cohort=cohort,
            privacy=privacy,
            budget=budget,
            payment=payment,
        )

    def train(self) -> Weights:
        """Return the expert's weights (1, parameters); from then on the payment is used.

        Raises:
            BudgetError: another process has used it.
        """
        from cropkt.experts.private import train_private

        study, mechanism, clip = self.request.study, self.payment.mechanism, self.privacy.clip
        m0 = Abmil.initial(study.shape, seed=study.seed, hazard=study.initial_hazard)
        expert = train_private(
            self.cohort,
            initial=m0.to(self.site.device),
            config=study.training,
            mechanism=mechanism,
            clip=clip,
            lot=mechanism.sample_rate * _known(self.site, len(self.cohort)),
            checkpoint=self.site.checkpoint(
                self.request, self.cohort, private=repr((mechanism, clip))
            ),
        )
        weights: Weights = flatten(expert).cpu().numpy()
        self.budget.use(self.payment, digest(weights[0]))
        return weights


def refuse_shared(request: ExpertRequest | RouterRequest) -> None:
    """Refuse to take part in the averages of a cancer that several sites hold.

    Raises:
        RefusedError: the request asks for the fold models or routers, round after round.
    """
    if request.shared:
        raise RefusedError(
            "site.yaml: privacy",
            f"{request.cancer} is shared by several sites, which average all fold models and "
            "routers over several rounds; a private site gives one expert, once",
            "Run a study where this site alone holds the cancer",
        )


def refuse_rounds(request: FedAvgRequest, site: Site) -> None:
    """Refuse a private site's part in the model of all cancers.

    Raises:
        RefusedError: the site is private, and the model would leave it round after round.
    """
    if site.config.privacy is not None:
        raise RefusedError(
            "site.yaml: privacy",
            f"{request.kind} takes models of all patients and without each fold, every round; "
            "a private site gives one expert, once",
            "Run a study with fedavg_rounds: 0",
        )


def withheld(request: TransferRequest, cohort: Cohort) -> TransferReply:
    """Return the answer of a site that tells no scores."""
    return TransferReply(
        task=request.task,
        cancer=request.cancer,
        patients=len(cohort),
        events=int(cohort.event.sum()),
        scores=(SourceScore(),) * len(request.sources),
        training_scores=((Score(),) * len(request.sources),) * request.study.folds,
        seconds=0.0,
    )


def kept_here(reply: ReleaseReply, site: Site) -> ReleaseReply:
    """Write what a site found into `<state>/<cancer>/release.json`; return what may leave."""
    text, _ = pack(reply)
    path = site.state / reply.cancer / "release.json"
    write_private(path, text.encode())
    return ReleaseReply(  # named one by one: a field that is added here stays here
        task=reply.task,
        cancer=reply.cancer,
        patients=reply.patients,
        events=reply.events,
        arms={arm: ArmScore() for arm in reply.arms},
        routing={},
        zero_shot_choice={},
        reason=WITHHELD,
        seconds=0.0,
    )


def _known(site: Site, patients: int) -> int:
    """Return the cohort's size as everybody may know it."""
    step = site.config.release.round_counts_to if site.config.release else 1
    return max(step, rounded(patients, 0, step) or 0)


def _check(study: StudyConfig, privacy: Privacy, *, patients: int) -> None:
    from cropkt.experts.private import check_private

    check_private(study.training)
    if study.source != "all_patients":
        problem = f"{study.source} depends on which patients share a fold"
        raise ConfigError("source", problem, "Ask the coordinator for a study with all_patients")
    if privacy.delta * patients >= 1:
        raise ConfigError(
            "site.yaml: privacy.delta",
            f"{privacy.delta:g} allows the release of a whole patient of {patients}",
            "Set it well below one over the number of patients",
        )
