"""Whose signature this site believes, and which experts it no longer uses. Loads no torch.

A site's key is pinned in `<state>/signers.json` with the first expert that is seen of it; another
key under the same name is refused from then on. `signers` in `site.yaml` says instead whose keys
count, by fingerprints that were compared by telephone: then no others do. The coordinator's key,
which signs averages alone, comes from the enrolment.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from cropkt.config import SiteName
from cropkt.errors import ConfigError, RevokedExpertError, UnknownSignerError
from cropkt.experts.card import Card, PublicKey, Sha256, fingerprint, name_of
from cropkt.files import write_private
from cropkt_client.enrol import Enrolment, Keys
from cropkt_client.settings import SiteConfig

COORDINATOR: Literal["(coordinator)"] = "(coordinator)"  # among the signers; no site's name
_Kept = TypeVar("_Kept")

log = logging.getLogger("cropkt.client")


@dataclass(frozen=True, slots=True)
class Trust:
    """Whom one site trusts.

    Args:
        config: its `site.yaml`.
        state: its state folder.
    """

    config: SiteConfig
    state: Path

    def check(self, card: Card) -> None:
        """Check that an expert's signer is whom this site knows by the name on its card.

        Raises:
            UnknownSignerError: it is another, or one that does not count here.
            ConfigError: what this site remembers is damaged.
        """
        name = COORDINATOR if card.site is None else card.site
        if card.site is None and len(card.parents) < 2:
            raise UnknownSignerError(name_of(card), "only a site signs what is no average")
        expected = self._fingerprint(name)
        if expected is None and self.config.signers is not None and card.site is not None:
            problem = f"signers in site.yaml does not name {name}"
            fix = f"Compare its fingerprint by telephone, and add {name}"
            raise UnknownSignerError(name_of(card), problem, fix)
        offered = fingerprint(card.signer)
        if expected is not None and offered != expected:
            problem = f"it is signed by {offered}, and {name} is known here by {expected}"
            fix = "Telephone: if the new one is right, write it under signers in site.yaml"
            raise UnknownSignerError(name_of(card), problem, fix)

    def pin(self, card: Card) -> None:
        """Let the key of an expert, all of which was found right, count from now on.

        Raises:
            ConfigError: what this site remembers is damaged.
        """
        name = COORDINATOR if card.site is None else card.site
        if self._fingerprint(name) is None:
            _keep(self.state / "signers.json", {**_pinned(self.state), name: card.signer})
            text = "the key %s of %s counts from now on: compare it by telephone"
            log.info(text, fingerprint(card.signer), name)

    def refuse_revoked(self, name: str, *hashes: str) -> None:
        """Check that none of an expert's hash and its parents' was revoked.

        Raises:
            RevokedExpertError: one was.
            ConfigError: `revoked.json` is damaged.
        """
        if revoked(self.state).intersection(hashes):
            raise RevokedExpertError(name, "the coordinator revoked it, or what it was made from")

    def known(self) -> dict[str, str]:
        """Return the fingerprints that count here, by name of site; this site's first."""
        mine = {self.config.site: self._fingerprint(self.config.site) or ""}
        names = set(_pinned(self.state)) | {COORDINATOR}
        if self.config.signers is not None:
            names = {COORDINATOR, *self.config.signers}
        others = {name: self._fingerprint(name) for name in sorted(names - set(mine))}
        return {**mine, **{name: known for name, known in others.items() if known}}

    def _fingerprint(self, name: str) -> str | None:
        """Return the fingerprint by which this site knows a signer; None if it does not yet."""
        if name == self.config.site:
            return fingerprint(Keys.of(self.state).public()["signing_key"])
        if name == COORDINATOR and (self.state / "enrolment.json").exists():
            return fingerprint(Enrolment.load(self.state).coordinator_key)
        if name != COORDINATOR and self.config.signers is not None:
            return self.config.signers.get(name)
        key = _pinned(self.state).get(name)
        return None if key is None else fingerprint(key)


def revoked(state: Path) -> frozenset[str]:
    """Return the hashes of the experts that the coordinator revoked.

    Raises:
        ConfigError: the file is damaged.
    """
    return frozenset(_read(state / "revoked.json", tuple[Sha256, ...], ()))


def note_revoked(state: Path, hashes: Iterable[str]) -> None:
    """Remember what was revoked; nothing is ever taken from that list."""
    before = revoked(state)
    if new := set(hashes) - before:
        _keep(state / "revoked.json", sorted(before | new))
        log.warning("the coordinator revoked %d experts: they are not used any more", len(new))


def _pinned(state: Path) -> dict[str, str]:
    return _read(state / "signers.json", dict[SiteName | Literal["(coordinator)"], PublicKey], {})


def _read(path: Path, kind: type[_Kept], nothing: _Kept) -> _Kept:
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except FileNotFoundError:
        return nothing
    except ValidationError:
        raise ConfigError(path, "damaged", "Restore it from a backup") from None


def _keep(path: Path, value: object) -> None:
    text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    write_private(path, text.encode())
