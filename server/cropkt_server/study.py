"""A study: which tasks exist, and when it is finished.

    describe -> fit_expert (rounds) -> score_sources -> fit_router (rounds) -> evaluate
                                    -> fit_fedavg (rounds, where asked for) ->

Nothing is held in memory that the table and the replies do not say, so a study that was killed
goes on where it was. Sites that hold the same cancer share one expert and one router: averages
by events, over `rounds` rounds; their fold models are averaged fold by fold, so that no patient
ever judges a model that learnt from them.

Who is waited for. A site trains its expert as soon as it has described itself. Scoring begins
once nobody is awaited: every invited site has enrolled and described itself, at least `min_sites`
did, and every expert is there or has failed; or once the deadline has passed and `min_sites`
sites have given an expert: then with those. From that moment the bank is fixed. Who comes later
is late: it trains an expert, and is scored and routed with the bank as it is, but no other target
is scored again with its expert. Within a shared cancer it joins the next round; after the last
one it trains from the average without changing it. An open invite keeps the study open until it
expires; after the deadline neither an invite does, nor a late site that is away.

A revoked site's rows fail at once; what it gave before stays. If rows of it were still to come, it
is missing, as one that never answered. A row whose answer waits for approval at its site is
`held`: it is not tried again and not failed, the site is asked now and then whether it may leave,
and after the deadline the study ends without it as without a site that is away.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.errors import ConfigError
from cropkt.messages import (
    DescribeReply,
    ExpertReply,
    ExpertRequest,
    Failure,
    Message,
    TransferReply,
)
from cropkt.versions import together
from cropkt_server.findings import Findings
from cropkt_server.membership import Member, missing
from cropkt_server.quarantine import Quarantine
from cropkt_server.questions import ANSWERS, Questions
from cropkt_server.revocation import Revocation
from cropkt_server.store import OPEN, Kind, Store, Task

MAX_TRIES = 100  # in the weeks of one training a site may go and come back as often
REVOKED = "revoked"
Rows = Mapping[tuple[Kind, Cancer | None, int], list[Task]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathering:
    """How a deployed study waits for its sites."""

    min_sites: int = 1
    deadline: Callable[[float], float | None] = lambda began: None  # of when the study began


class Study(Findings):
    """The durable state machine of one study folder.

    Args:
        folder: where it lies.
        config: what the sites are asked to do.
        sites: names, or members of a roster.
        gathering: None where the sites are fixed, as in a simulation.
        clock: now, in seconds since 1970.
    """

    def __init__(
        self,
        folder: Path,
        config: StudyConfig,
        sites: Iterable[str | Member],
        *,
        gathering: Gathering | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(folder, config)
        self._gathering, self._clock = gathering, clock
        self._check_unchanged()
        self.store.resume()
        self._questions = Questions(self)
        self._quarantine = Quarantine(self, self._questions)
        self._revocation = Revocation(self, self._questions)
        self._members: tuple[Member, ...] = ()
        if self.store.meta("began") is None:
            self.store.set_meta("began", str(clock()))
        self.add_sites(Member(site) if isinstance(site, str) else site for site in sites)

    def _check_unchanged(self) -> None:
        """Refuse to go on under other settings than those the stored work was made with."""
        if self.store.meta("config") is None:
            self.store.set_meta("config", json.dumps(asdict(self.config), sort_keys=True))
        check_unchanged(self.store, self.config)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that may take part now."""
        return tuple(member.name for member in self._members if member.state == "enrolled")

    @property
    def overdue(self) -> bool:
        """Whether the deadline has passed."""
        if self._gathering is None:
            return False
        deadline = self._gathering.deadline(float(self.store.meta("began") or 0))
        return deadline is not None and self._clock() >= deadline

    def add_sites(self, members: Iterable[Member]) -> None:
        """Take in who takes part now: add rows for new sites, fail those of revoked ones."""
        members, changed = tuple(members), self._revocation.apply()
        unknown = self.overdue and self.decided("gathered") is None
        if members == self._members and not unknown and not changed:
            return
        self._members = members
        revoked = {member.name for member in members if member.state == "revoked"}
        for task in self.store.tasks():
            if task.site in revoked and task.state in OPEN:
                self.store.failed(task, REVOKED)
            elif task.site in self.sites and (task.state, task.cause) == ("failed", REVOKED):
                self.store.due(task)  # the coordinator invited it again
        self.store.add(Task(kind="describe", site=site) for site in self.sites)
        self.advance()

    @property
    def finished(self) -> bool:
        """Whether no row is left to do, and nobody is awaited."""
        return self.finished_without(())

    def finished_without(self, away: Collection[str]) -> bool:
        """Return whether nothing is left but the rows of late sites that are `away`."""
        if len(self._open()) > len(self._given_up(away)):
            return False
        if self._gathering is None:
            return True
        invited = any(member.state == "invited" for member in self._members)
        return self._gathered(self._rows()) and (self.overdue or not invited)

    def give_up(self, away: Collection[str]) -> None:
        """Fail the rows of late sites that are `away`."""
        for task in self._given_up(away):
            why = "had not approved it" if task.state == "held" else "was away"
            self.store.failed(task, f"missing: the site {why} when the study finished")

    def due(self) -> list[Task]:
        """Return the rows to send."""
        return [task for task in self.store.tasks() if task.state == "due"]

    def held(self) -> list[Task]:
        """Return the rows whose answers wait for approval at sites that take part."""
        return [t for t in self.store.tasks() if t.state == "held" and t.site in self.sites]

    def missing(self) -> dict[str, str]:
        """Return the sites that never answered, or were revoked on the way, and why."""
        return missing(self._members, self.store.tasks())

    def record(self, task: Task, reply: Message) -> None:
        """Store a reply before anything acts on it, then add the rows it makes possible."""
        state = self.store.state(task)
        if state not in OPEN:
            return  # answered before, or its site was revoked meanwhile
        if isinstance(reply, Failure) and reply.code == "awaiting_approval":
            self.store.held(task)
        elif isinstance(reply, Failure) and reply.code == "not_held" and state == "held":
            self.store.due(task)
        elif isinstance(reply, Failure):
            self.store.failed(task, _cause(reply))
        elif not _answers(task, reply):
            self.store.failed(task, "the reply is not the answer to this task")
        elif cause := self._unfit(task, reply):
            self.store.failed(task, cause)
        elif self._quarantine.takes(task, reply):
            self.store.keep(task, reply)
            self._questions.signatures.take(task, reply)
            self.store.done(task)
        self.advance()

    def lost(self, task: Task, cause: str, *, final: bool = False) -> None:
        """The message or its answer was lost: due again, or failed after `MAX_TRIES`."""
        if self.store.state(task) not in ("due", "sent"):
            return
        if final or task.tries + 1 >= MAX_TRIES:
            self.store.failed(task, cause)
            self.advance()
        else:
            self.store.due(task, cause)

    def request(self, task: Task) -> Message:
        """Return the message of a row; the same row always asks the same."""
        due = self.store.state(task) == "due"
        return self._questions.sending(task) if due else self._questions.of(task)

    def advance(self) -> None:
        """Add every row that what is done makes possible."""
        before = -1
        while before != self._quarantine.put_away:  # a row that was put away: look again
            before = self._quarantine.put_away
            self._advance()

    def _advance(self) -> None:
        rows = self._rows()
        awaited = self._awaited(rows)
        if any(member.cancers is None for member in awaited):
            return  # it may hold anything: nobody knows yet what is shared
        holders, experts = self.holders(), list[Task]()
        for cancer, sites in holders.items():
            coming = {member.name for member in awaited if cancer in (member.cancers or ())}
            self.decide(f"shared/{cancer}", sorted(coming.union(sites)))
            experts += self._rounds("fit_expert", cancer, sites, rows, hold=bool(coming))
        self._add(experts)
        rows = self._rows()
        self._decide_bank(rows)
        if self.decided("bank") is not None:
            self._add(self._everyone(rows))
            self._add(task for cancer in holders for task in self._use_of_bank(cancer, rows))

    def _add(self, tasks: Iterable[Task]) -> None:
        self.store.add(task for task in tasks if task.site in self.sites)

    def _rounds(
        self, kind: Kind, cancer: Cancer, sites: Iterable[str], rows: Rows, *, hold: bool = False
    ) -> list[Task]:
        """Complete the rounds that can be; return the rows of the round that may begin.

        Args:
            kind: fit_expert or fit_router.
            cancer: whose.
            sites: that take part.
            rows: the table.
            hold: more sites are awaited in the first round.
        """
        last, number = self.last_round(cancer), 0
        while number <= last and self.averaged(kind, cancer, number) is not None:
            number += 1
        if number <= last and _done(here := rows[kind, cancer, number]):
            first = number == 0 and kind == "fit_expert"
            if (_settled(here) and not (first and hold)) or (first and self._goes_on(rows)):
                if self._quarantine.thins_round(_done(here)):
                    return []
                name = f"averaged/{kind}/{cancer}/{number}"
                self.decide(name, sorted(task.site for task in _done(here)))
                number += 1
        under_way = 0 < number <= last and rows[kind, cancer, number]
        if under_way:
            return []  # who comes now joins the next round
        number = min(number, last)
        mine = [task for n in range(last + 1) for task in rows[kind, cancer, n]]
        out = {task.site for task in mine if task.round == number or task.state != "done"}
        return [
            Task(kind=kind, site=site, cancer=cancer, round=number)
            for site in sites
            if site not in out
        ]

    def _use_of_bank(self, cancer: Cancer, rows: Rows) -> list[Task]:
        """Return the rows of a target, from scoring the bank to the final evaluation."""
        last = self.last_round(cancer)
        if self.averaged("fit_expert", cancer) is None or not self.others(cancer):
            return []
        trained = _done(rows["fit_expert", cancer, last])
        new = [Task(kind="score_sources", site=task.site, cancer=cancer) for task in trained]
        scored = rows["score_sources", cancer, 0]
        if self.decided(f"sources/{cancer}") is None:
            if not _settled(scored) or not _done(scored):
                return new
            self.decide(f"sources/{cancer}", self.sources(cancer))
        new += self._rounds("fit_router", cancer, [task.site for task in _done(scored)], rows)
        if self.averaged("fit_router", cancer) is not None and self._everyone_is_trained():
            routed = _done(rows["fit_router", cancer, last])
            new += [Task(kind="evaluate", site=task.site, cancer=cancer) for task in routed]
        return new

    def _everyone(self, rows: Rows) -> list[Task]:
        """Complete the rounds of the model of all cancers; return the rows that may begin.

        All who gave an expert take part in a round together. If nobody is left, the study goes on
        without the model.
        """
        for number in range(self.config.fedavg_rounds):
            if self.decided(f"everyone/{number}") is not None:
                continue
            here = [
                task
                for (kind, _, n), tasks in rows.items()
                if kind == "fit_fedavg" and n == number
                for task in tasks
            ]
            if not here:
                return [
                    Task(kind="fit_fedavg", site=task.site, cancer=task.cancer, round=number)
                    for task in self.done("fit_expert")
                ]
            if not _settled(here):
                return []
            self.decide(f"everyone/{number}", sorted(f"{t.site}/{t.cancer}" for t in _done(here)))
        return []

    def _everyone_is_trained(self) -> bool:
        last = self.config.fedavg_rounds - 1
        return last < 0 or self.decided(f"everyone/{last}") is not None

    def _awaited(self, rows: Rows) -> list[Member]:
        """Return the sites whose description the study waits for."""
        if self.decided("gathered") is not None or self._goes_on(rows):
            return []
        known = {t.site for t in rows["describe", None, 0] if t.settled}
        return [
            member
            for member in self._members
            if member.state in ("invited", "enrolled") and member.name not in known
        ]

    def _goes_on(self, rows: Rows) -> bool:
        """Return whether the deadline has passed with enough experts; note whose."""
        if self.overdue and self._gathering and self.decided("gathered") is None:
            given = {t.site for c in self.holders() for t in _done(rows["fit_expert", c, 0])}
            if len(given) >= self._gathering.min_sites:
                self.decide("gathered", sorted(given))
                self.decide("goes_on", ())
        return self.decided("goes_on") is not None

    def _gathered(self, rows: Rows) -> bool:
        """Return whether nobody is awaited."""
        if self._gathering is None or self.decided("gathered") is not None:
            return not self._awaited(rows)
        return len(self.descriptions()) >= self._gathering.min_sites and not self._awaited(rows)

    def _decide_bank(self, rows: Rows) -> None:
        """Fix the bank, once nobody is awaited and every expert is there or has failed."""
        if self.decided("bank") is not None or not self._gathered(rows):
            return
        for cancer in self.holders():
            late = self._goes_on(rows) and self.averaged("fit_expert", cancer, 0) is None
            numbers = range(self.last_round(cancer) + 1)
            tasks = [task for n in numbers for task in rows["fit_expert", cancer, n]]
            open_ = any(task.state in OPEN for task in tasks)
            if self.averaged("fit_expert", cancer) is None and open_ and not late:
                return
        if self._quarantine.thins_bank():
            return
        bank = self.bank()
        if len(bank) > 1:
            self.decide("gathered", sorted(self.descriptions()))
            self.decide("bank", bank)

    def _objection(self, reply: DescribeReply) -> str:
        """Return why a site that describes itself so cannot take part; nothing if it can."""
        ours, theirs = version("cropkt"), reply.versions.get("cropkt")
        if theirs is not None and not together(ours, theirs):
            return f"the coordinator runs cropkt {ours}, the site cropkt {theirs}"
        invited = next((m.cancers for m in self._members if m.name == reply.site), None)
        described = [count.cancer for count in reply.cohorts]
        if len(set(described)) < len(described):
            return "it describes a cancer twice"
        extra = set(described) - set(invited or Cancer)
        if extra:
            return f"it describes {' '.join(sorted(extra))}, for which it was not invited"
        return ""

    def _unfit(self, task: Task, reply: Message) -> str:
        """Return why a reply, judged by what was asked, cannot be used; nothing if it can."""
        if isinstance(reply, DescribeReply):
            return self._objection(reply)
        if isinstance(reply, TransferReply):
            rows = (reply.scores, *reply.training_scores)
            good = len(rows) == 1 + self.config.folds
            good = good and all(len(row) == len(self.asked(task)) for row in rows)
            return "" if good else "it has not one score a fold and expert"
        if not isinstance(reply, ExpertReply):
            return ""
        key = next((m.key for m in self._members if m.name == task.site), None)
        request = self._questions.of(task)
        if not isinstance(request, ExpertRequest):
            return "it is no answer to what was asked"
        return self._questions.signatures.objection(task, reply, request, key=key)

    def _given_up(self, away: Collection[str]) -> list[Task]:
        """Return the rows, once the deadline has passed, of late sites away, or held there."""
        if not self.overdue:
            return []
        late = set(self.sites).union(away) - set(self.decided("gathered") or ())
        return [
            task
            for task in self._open()
            if task.site in late and (task.site in away or task.state == "held")
        ]

    def _open(self) -> list[Task]:
        return [task for task in self.store.tasks() if task.state in OPEN]

    def _rows(self) -> Rows:
        rows: dict[tuple[Kind, Cancer | None, int], list[Task]] = defaultdict(list)
        for task in self.store.tasks():
            rows[task.kind, task.cancer, task.round].append(task)
        return rows


def check_unchanged(store: Store, config: StudyConfig) -> None:
    """Compare settings with those that a study began with, if it did.

    Raises:
        ConfigError: one is another; names it.
    """
    before, now = store.meta("config"), json.dumps(asdict(config), sort_keys=True)
    if before not in (None, now):
        old, new = _flat(json.loads(str(before))), _flat(json.loads(now))
        name = next(key for key in sorted(old | new) if old.get(key) != new.get(key))
        raise ConfigError(
            store.folder,
            f"{name} was {old.get(name)} when this study began and is {new.get(name)} now",
            "Set it back, or start a new study in another folder",
        )


def _answers(task: Task, reply: Message) -> bool:
    """Return whether a reply is of the task's kind, name, cancer and site."""
    return (
        isinstance(reply, ANSWERS[task.kind])
        and reply.task in (task.id, "describe/any")
        and getattr(reply, "cancer", task.cancer) == task.cancer
        and getattr(reply, "site", task.site) == task.site
    )


def _cause(failure: Failure) -> str:
    """Return a site's code with what it means, where the site decided so itself."""
    meaning = {
        "budget": ": the cohort's privacy budget is used up, or its record is lost",
        "policy": ", which lets no such answer leave the site",
        "suppressed": ": too few patients or events at the site",
        "refused_release": ": the site does not release its answer",
    }.get(failure.code, "")
    reference = f" (reference {failure.reference})" if failure.reference else ""
    return f"{failure.code}{meaning}{reference}"


def _settled(tasks: list[Task]) -> bool:
    return bool(tasks) and all(task.settled for task in tasks)


def _done(tasks: list[Task]) -> list[Task]:
    return [task for task in tasks if task.state == "done"]


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested settings as `a.b` to value."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat
