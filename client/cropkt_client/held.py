"""Answers that wait until somebody at the hospital approves them, and what was decided.

Of each there are two files in `<state>/held`: the answer exactly as it would leave, and a JSON
text about it. A decision is about one payload for one recipient and purpose: other bytes, or the
same for somebody or something else, have to be approved anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cropkt.cancers import Cancer
from cropkt.config import Purpose
from cropkt.errors import ConfigError, UsageError
from cropkt.files import write_private
from cropkt.messages import REPLIES, Message, TaskId, load, save
from cropkt_client.settings import Asked

Decision = Literal["waiting", "approved", "refused"]
_SHORT = 8  # characters of a hash that make an id


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a request asked, as far as the gate has to know to judge the answer."""

    kind: Asked
    task: TaskId
    purpose: Purpose
    cancer: Cancer | None = None
    models: int = 0  # that come back, if any do
    parameters: int = 0  # of each


@dataclass(frozen=True, kw_only=True)
class Held:
    """One answer and what became of it."""

    question: Question
    study: str
    recipient: str
    bytes: int  # of the payload
    sha256: str
    checked: str  # what the gate has made sure of ...
    policy: str  # ... under which version of the policy
    since: float  # unix seconds
    decision: Decision = "waiting"
    by: str = ""  # who decided
    at: float | None = None

    @property
    def id(self) -> str:
        """The name that people type; short, so that two may come to share one."""
        return hashlib.sha256("\n".join(self.what).encode()).hexdigest()[:_SHORT]

    @property
    def what(self) -> tuple[str, str, str, str]:
        """What a decision is about: these bytes, for this recipient and purpose."""
        return self.sha256, self.study, self.recipient, self.question.purpose


class Shelf:
    """The answers held in one site's state folder."""

    def __init__(self, state: Path) -> None:
        self._folder = state / "held"

    def put(self, held: Held, answer: Message) -> Held:
        """Keep an answer; what was decided of the same one before stands."""
        before = self._read(self._file(held, "json"))
        if before is None or before.what != held.what:
            save(answer, self._file(held, "npz"))
        else:
            held = replace(before, question=held.question, checked=held.checked, policy=held.policy)
        if held != before:
            self._write(held)
        return held

    def of_task(self, task: str) -> Held | None:
        """Return the newest answer to a task."""
        return next((held for held in reversed(self.all()) if held.question.task == task), None)

    def all(self) -> list[Held]:
        """Return every answer that was ever held, oldest first."""
        found = [self._read(path) for path in sorted(self._folder.glob("*.json"))]
        return sorted((held for held in found if held), key=lambda held: held.since)

    def named(self, name: str) -> Held:
        """Return the answer with an id, or with the beginning of one.

        Raises:
            UsageError: there is none, or there are several.
        """
        found = [held for held in self.all() if name and held.id.startswith(name)]
        if len(found) != 1:
            problem = "several answers have such an id" if found else "no answer has this id"
            raise UsageError(name, problem, "See cropkt-client release list --all")
        return found[0]

    def answer(self, held: Held) -> Message:
        """Return the answer as it would leave."""
        return load(self._file(held, "npz"), expected=REPLIES)

    def decide(self, held: Held, decision: Decision, *, by: str = "") -> Held:
        """Write down what was decided, by the user of this process."""
        who = _user() + (f" ({by})" if by else "")
        decided = replace(held, decision=decision, by=who, at=time.time())
        self._write(decided)
        return decided

    def _write(self, held: Held) -> None:
        text = json.dumps(asdict(held), indent=1, sort_keys=True) + "\n"
        write_private(self._file(held, "json"), text.encode())

    def _file(self, held: Held, kind: str) -> Path:
        return self._folder / f"{held.id}.{kind}"

    def _read(self, path: Path) -> Held | None:
        try:
            return TypeAdapter(Held).validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError:
            fix = "Remove it: the answer is then held anew"
            raise ConfigError(path, "damaged", fix) from None


def _user() -> str:
    """Return this process's user as the system, not its environment, names it."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"user {os.getuid()}"
