"""A study: which tasks exist, what each asks, and when it is finished.

    describe -> fit_expert (rounds) -> score_sources -> fit_router (rounds) -> evaluate

Nothing is held in memory that the table and the replies do not say, so a study that was killed
goes on where it was. Sites that hold the same cancer share one expert and one router: averages
by events, over `rounds` rounds; their fold models are averaged fold by fold, so that no patient
ever judges a model that learnt from them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np

from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.errors import ConfigError, MessageError
from cropkt.messages import (
    DescribeReply,
    DescribeRequest,
    ExpertReply,
    ExpertRequest,
    Failure,
    Message,
    ReleaseReply,
    ReleaseRequest,
    RouterReply,
    RouterRequest,
    TransferReply,
    TransferRequest,
    Weights,
)
from cropkt.survival.metrics import Estimate
from cropkt.transfer.plan import sources_for
from cropkt_server.store import Kind, Store, Task

MAX_TRIES = 5
Reply = TypeVar("Reply", bound=Message)

MESSAGE_TYPES: dict[Kind, str] = {
    "describe": DescribeRequest.kind,
    "fit_expert": ExpertRequest.kind,
    "score_sources": TransferRequest.kind,
    "fit_router": RouterRequest.kind,
    "evaluate": ReleaseRequest.kind,
}
_REPLIES: dict[Kind, type[Message]] = {
    "describe": DescribeReply,
    "fit_expert": ExpertReply,
    "score_sources": TransferReply,
    "fit_router": RouterReply,
    "evaluate": ReleaseReply,
}


class Study:
    """The durable state machine of one study folder."""

    def __init__(self, folder: Path, config: StudyConfig, sites: Iterable[str]) -> None:
        self.config, self.sites = config, tuple(sites)
        self.store = Store(folder)
        self._check_unchanged()
        self.store.resume()
        self.store.add(Task(kind="describe", site=site) for site in self.sites)
        self._averages: dict[tuple[Kind, Cancer, int], Weights] = {}
        self._described: dict[str, DescribeReply] = {}
        self.advance()

    def _check_unchanged(self) -> None:
        """Refuse to go on under other settings than those the stored work was made with."""
        now = json.dumps(asdict(self.config), sort_keys=True)
        before = self.store.meta("config")
        if before is None:
            self.store.set_meta("config", now)
        elif before != now:
            old, new = _flat(json.loads(before)), _flat(json.loads(now))
            name = next(key for key in sorted(old | new) if old.get(key) != new.get(key))
            raise ConfigError(
                self.store.folder,
                f"{name} was {old.get(name)} when this study began and is {new.get(name)} now",
                "Set it back, or start a new study in another folder",
            )

    @property
    def finished(self) -> bool:
        """Whether no row is left to do."""
        return not any(task.state in ("due", "sent") for task in self.store.tasks())

    def failures(self) -> list[Task]:
        """Return the rows that failed."""
        return [task for task in self.store.tasks() if task.state == "failed"]

    def due(self) -> list[Task]:
        """Return the rows to send."""
        return [task for task in self.store.tasks() if task.state == "due"]

    def record(self, task: Task, reply: Message) -> None:
        """Store a reply before anything acts on it, then add the rows it makes possible."""
        if isinstance(reply, Failure):
            self.store.failed(task, f"{reply.code} (reference {reply.reference})")
        elif not self._answers(task, reply):
            self.store.failed(task, "the reply is not the answer to this task")
        else:
            self.store.done(task, reply)
        self.advance()

    def lost(self, task: Task, cause: str, *, final: bool = False) -> None:
        """The message or its answer was lost: due again, or failed after `MAX_TRIES`."""
        if final or task.tries + 1 >= MAX_TRIES:
            self.store.failed(task, cause)
            self.advance()
        else:
            self.store.due(task, cause)

    def request(self, task: Task) -> Message:
        """Return the message of a row; the same row always asks the same."""
        if task.kind == "describe" or task.cancer is None:
            return DescribeRequest(task=task.id, study=self.config)
        cancer, shared = task.cancer, self._shared(task.cancer)
        if task.kind == "fit_expert":
            start = self._average("fit_expert", cancer, task.round - 1) if task.round else None
            return ExpertRequest(
                task=task.id,
                study=self.config,
                cancer=cancer,
                round=task.round,
                shared=shared,
                weights=start,
            )
        if task.kind == "score_sources":
            sources = self.others(cancer)
            return TransferRequest(
                task=task.id,
                study=self.config,
                cancer=cancer,
                sources=sources,
                weights=self._experts(sources),
            )
        if task.kind == "fit_router":
            sources = self.sources(cancer)
            start = self._average("fit_router", cancer, task.round - 1) if task.round else None
            return RouterRequest(
                task=task.id,
                study=self.config,
                cancer=cancer,
                round=task.round,
                shared=shared,
                sources=sources,
                weights=self._experts(sources),
                own=self._average("fit_expert", cancer, self.config.rounds - 1) if shared else None,
                routers=start,
            )
        routers = self._average("fit_router", cancer, self.config.rounds - 1) if shared else None
        return ReleaseRequest(task=task.id, study=self.config, cancer=cancer, routers=routers)

    def advance(self) -> None:
        """Add every row that what is done makes possible."""
        tasks = self.store.tasks()
        rows: dict[tuple[Kind, Cancer | None, int], list[Task]] = defaultdict(list)
        for task in tasks:
            rows[task.kind, task.cancer, task.round].append(task)
        if not _settled(rows["describe", None, 0]):
            return
        holders = self.holders()
        new: list[Task] = []
        for cancer, sites in holders.items():
            last = self._last_round(cancer)
            new += _rounds("fit_expert", cancer, sites, last, rows)
        banked = all(_settled(rows["fit_expert", c, self._last_round(c)]) for c in holders)
        if banked and len(self.bank()) > 1:
            for cancer in self.bank():
                trained = _done(rows["fit_expert", cancer, self._last_round(cancer)])
                new += [Task(kind="score_sources", site=t.site, cancer=cancer) for t in trained]
                scored = rows["score_sources", cancer, 0]
                if not _settled(scored):
                    continue
                last = self._last_round(cancer)
                sites = [task.site for task in _done(scored)]
                new += _rounds("fit_router", cancer, sites, last, rows)
                routed = rows["fit_router", cancer, last]
                if _settled(routed):
                    new += [
                        Task(kind="evaluate", site=t.site, cancer=cancer) for t in _done(routed)
                    ]
        self.store.add(new)

    def holders(self) -> dict[Cancer, list[str]]:
        """Return the sites of each cancer, as they described themselves."""
        sites: dict[Cancer, list[str]] = defaultdict(list)
        for site, reply in self.descriptions().items():
            for count in reply.cohorts:
                sites[count.cancer].append(site)
        return {cancer: sorted(sites[cancer]) for cancer in sorted(sites)}

    def descriptions(self) -> dict[str, DescribeReply]:
        """Return what each site said of itself."""
        for task in self.store.tasks():
            if (
                task.kind == "describe"
                and task.state == "done"
                and task.site not in self._described
            ):
                self._described[task.site] = self.answer(task, DescribeReply)
        return self._described

    def answer(self, task: Task, kind: type[Reply]) -> Reply:
        """Return the stored reply of a row that is done."""
        reply = self.store.reply(task)
        if not isinstance(reply, kind):
            raise MessageError(task.id, f"the stored reply is not a {kind.__name__}")
        return reply

    def done(self, kind: Kind, cancer: Cancer | None = None) -> list[Task]:
        """Return the rows of a kind that are done, in the final round of their cancer."""
        return [
            task
            for task in self.store.tasks()
            if task.kind == kind
            and task.state == "done"
            and (cancer is None or task.cancer == cancer)
            and task.round == self._final_round(task)
        ]

    def bank(self) -> tuple[Cancer, ...]:
        """Return the cancers whose expert is in the bank."""
        return tuple(sorted({t.cancer for t in self.done("fit_expert") if t.cancer}))

    def others(self, cancer: Cancer) -> tuple[Cancer, ...]:
        """Return the cancers whose experts a target scores, in the order of its replies."""
        return tuple(source for source in self.bank() if source != cancer)

    def sources(self, cancer: Cancer) -> tuple[Cancer, ...]:
        """Return the experts chosen for a target: the union over its sites."""
        chosen: set[Cancer] = set()
        for task in self.done("score_sources", cancer):
            reply = self.answer(task, TransferReply)
            scores = {
                source: [
                    Estimate(c_index=row[i].c_index, se=row[i].se) for row in reply.training_scores
                ]
                for i, source in enumerate(self.others(cancer))
            }
            chosen.update(sources_for(scores, limit=self.config.max_sources))
        return tuple(sorted(chosen))

    def _answers(self, task: Task, reply: Message) -> bool:
        """Return whether a reply is of the task's kind, name and cancer."""
        return (
            isinstance(reply, _REPLIES[task.kind])
            and reply.task in (task.id, "describe/any")
            and getattr(reply, "cancer", task.cancer) == task.cancer
            and getattr(reply, "site", task.site) == task.site
        )

    def _shared(self, cancer: Cancer) -> bool:
        return len(self.holders()[cancer]) > 1

    def _last_round(self, cancer: Cancer) -> int:
        return self.config.rounds - 1 if self._shared(cancer) else 0

    def _final_round(self, task: Task) -> int:
        rounds = task.kind in ("fit_expert", "fit_router") and task.cancer is not None
        return self._last_round(task.cancer) if rounds and task.cancer else 0

    def _experts(self, cancers: Iterable[Cancer]) -> Weights:
        """Return the bank's experts as rows (cancers, parameters)."""
        rows = []
        for cancer in cancers:
            stack = self._average("fit_expert", cancer, self._last_round(cancer))
            published = self.config.source == "fold_0" and len(stack) > 1
            rows.append(stack[1 if published else 0])
        return np.stack(rows)

    def _average(self, kind: Kind, cancer: Cancer, number: int) -> Weights:
        """Return the average by events of a round's models, rows (F, parameters)."""
        key = (kind, cancer, number)
        if key not in self._averages:
            replies = [
                self.store.reply(task)
                for task in self.store.tasks()
                if (task.kind, task.cancer, task.round, task.state) == (*key, "done")
            ]
            models = [r for r in replies if isinstance(r, ExpertReply | RouterReply)]
            weight = np.array([float(model.events) for model in models])
            weight = (
                weight / weight.sum() if weight.sum() else np.full(len(models), 1 / len(models))
            )
            total = np.zeros(models[0].weights.shape, dtype=np.float64)
            for share, model in zip(weight, models, strict=True):
                total += share * model.weights
            self._averages[key] = total.astype(np.float32)
        return self._averages[key]


def _rounds(
    kind: Kind,
    cancer: Cancer,
    sites: Iterable[str],
    last: int,
    rows: dict[tuple[Kind, Cancer | None, int], list[Task]],
) -> list[Task]:
    """Return the rows of the next round, for the sites that came through the one before."""
    new = [Task(kind=kind, site=site, cancer=cancer) for site in sites]
    for number in range(1, last + 1):
        before = rows[kind, cancer, number - 1]
        if not _settled(before):
            break
        new += [Task(kind=kind, site=t.site, cancer=cancer, round=number) for t in _done(before)]
    return new


def _settled(tasks: list[Task]) -> bool:
    return bool(tasks) and all(task.state in ("done", "failed") for task in tasks)


def _done(tasks: list[Task]) -> list[Task]:
    return [task for task in tasks if task.state == "done"]


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested settings as `a.b` to value."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat
