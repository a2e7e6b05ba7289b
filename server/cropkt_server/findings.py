"""What a study's table and replies say: who holds what, who is in the bank, what was decided.

Decisions that later rows rest on (who is averaged in a round, who is in the bank, what a router
may use) are written down when they are first made, and stand.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.errors import MessageError
from cropkt.messages import DescribeReply, Message, TransferReply
from cropkt.survival.metrics import Estimate
from cropkt.transfer.plan import sources_for
from cropkt_server.store import Kind, Store, Task

Reply = TypeVar("Reply", bound=Message)


class Findings:
    """The state of one study folder, read from its store."""

    def __init__(self, folder: Path, config: StudyConfig, *, read_only: bool = False) -> None:
        self.config = config
        self.store = Store(folder, read_only=read_only)
        self._described: dict[str, DescribeReply] = {}

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

    def failures(self) -> list[Task]:
        """Return the rows that failed."""
        return [task for task in self.store.tasks() if task.state == "failed"]

    def trained(self) -> tuple[Cancer, ...]:
        """Return the cancers that have an expert, in the bank or too late for it."""
        return tuple(sorted({t.cancer for t in self.done("fit_expert") if t.cancer}))

    def bank(self) -> tuple[Cancer, ...]:
        """Return the cancers whose expert is in the bank, or so far would be."""
        decided = self.decided("bank")
        if decided is not None:
            return tuple(Cancer(code) for code in decided)
        return tuple(c for c in self.trained() if self.averaged("fit_expert", c) is not None)

    def others(self, cancer: Cancer) -> tuple[Cancer, ...]:
        """Return the cancers whose experts a target scores, in the order of its replies."""
        return tuple(source for source in self.bank() if source != cancer)

    def asked(self, task: Task) -> tuple[Cancer, ...]:
        """Return the cancers whose experts a row was asked about, in the order of its reply."""
        used = self.store.bank.used(task.id)
        return tuple(source for source in used if source != task.cancer)

    def sources(self, cancer: Cancer) -> tuple[Cancer, ...]:
        """Return the experts chosen for a target: the union over its sites."""
        decided = self.decided(f"sources/{cancer}")
        if decided is not None:
            return tuple(Cancer(code) for code in decided)
        chosen: set[Cancer] = set()
        for task in self.done("score_sources", cancer):
            reply = self.answer(task, TransferReply)
            scores = {
                source: [
                    Estimate(c_index=row[i].c_index, se=row[i].se) for row in reply.training_scores
                ]
                for i, source in enumerate(self.asked(task))
            }
            chosen.update(sources_for(scores, limit=self.config.max_sources))
        return tuple(sorted(chosen))

    def late(self) -> list[str]:
        """Return whose experts came too late for the other targets, as site and cancer."""
        if self.decided("bank") is None:
            return []
        return [
            f"{task.site} ({task.cancer})"
            for task in self.done("fit_expert")
            if task.cancer not in self.bank()
            or task.site not in (self.averaged("fit_expert", task.cancer) or ())
        ]

    def shared(self, cancer: Cancer) -> bool:
        """Return whether several sites share one expert of a cancer."""
        sites = self.decided(f"shared/{cancer}")
        return len(self.holders()[cancer] if sites is None else sites) > 1

    def last_round(self, cancer: Cancer) -> int:
        """Return the number of a cancer's final round."""
        return self.config.rounds - 1 if self.shared(cancer) else 0

    def averaged(self, kind: Kind, cancer: Cancer, number: int | None = None) -> list[str] | None:
        """Return the sites whose models a round averages; None until it is complete.

        Args:
            kind: fit_expert or fit_router.
            cancer: whose.
            number: of the round; None is the final one.
        """
        number = self.last_round(cancer) if number is None else number
        return self.decided(f"averaged/{kind}/{cancer}/{number}")

    def trained_everyone(self, number: int) -> list[Task] | None:
        """Return the rows that a round of the model of all cancers averages; None while open."""
        decided = self.decided(f"everyone/{number}")
        if decided is None:
            return None
        rows = (name.rsplit("/", 1) for name in decided)
        return [
            Task(kind="fit_fedavg", site=site, cancer=Cancer(cancer), round=number)
            for site, cancer in rows
        ]

    def decided(self, name: str) -> list[str] | None:
        """Return a decision, None as long as it is open."""
        text = self.store.meta(f"decided/{name}")
        return None if text is None else list(json.loads(text))

    def decide(self, name: str, names: Iterable[str]) -> None:
        """Write a decision down, unless it is made."""
        if self.decided(name) is None:
            self.store.set_meta(f"decided/{name}", json.dumps(list(names)))

    def undecide(self, name: str) -> None:
        """Take back a decision on which nothing rests yet."""
        self.store.forget(f"decided/{name}")

    def _final_round(self, task: Task) -> int:
        rounds = task.kind in ("fit_expert", "fit_router") and task.cancer is not None
        return self.last_round(task.cancer) if rounds and task.cancer else 0


def total(counts: Sequence[int | None]) -> int | None:
    """Return the sum of what sites count; None if one of them tells no count."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def shares(counts: Sequence[float]) -> list[float]:
    """Return counts as shares of their sum; equal ones if all are 0."""
    whole = float(sum(counts))
    return [count / whole if whole else 1 / len(counts) for count in counts]
