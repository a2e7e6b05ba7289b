"""How a hospital joins: keys made on site, an invite redeemed over pinned TLS, the result kept.

Keys are written before they are used, and are never overwritten: an enrolment that was cut off
is repeated with the same command.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cropkt.errors import ConfigError
from cropkt.files import replace_file, write_private
from cropkt.invite import Invite
from cropkt.knock import Knock
from cropkt_client.link import NEW_INVITE, Accepted, Coordinator, check_versions
from cropkt_client.settings import read_settings

_KEY_FIX = "Restore it from a backup, or enrol from an empty state folder with a new invite"


@dataclass(frozen=True, kw_only=True)
class Enrolment(Accepted):
    """What this site knows of the study it joined: `<state>/enrolment.json`."""

    host: str  # host:port

    @classmethod
    def load(cls, state: Path) -> Enrolment:
        """Return the enrolment kept in a state folder.

        Raises:
            ConfigError: there is none, or it is damaged.
        """
        path = state / "enrolment.json"
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except FileNotFoundError:
            fix = "Ask the coordinator for an invite, then: cropkt-client enrol INVITE"
            raise ConfigError(path, "this site is not enrolled", fix) from None
        except ValidationError:
            raise ConfigError(path, "damaged", NEW_INVITE) from None

    def save(self, state: Path) -> None:
        """Keep the enrolment."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"
        replace_file(state / "enrolment.json", text.encode())

    def knock(self, keys: Keys, *, at: float) -> Knock:
        """Return the question how this site stands, signed, at a time of the coordinator's clock.

        Args:
            keys: of this site.
            at: unix seconds.
        """
        node_key = keys.public()["node_key"]
        knock = Knock(study=self.study, site=self.site, node_key=node_key, at=at)
        return knock.signed(keys.signing)


def join(invite: Invite, config: Path) -> list[str]:
    """Redeem an invite and keep what it gave; return the lines to show.

    Everything may be repeated: keys that exist are used again, and the coordinator knows them.

    Raises:
        ConfigError: `config` is another site's, or its state belongs to another study.
        RefusedError: one side does not trust the other.
        UnavailableError: the coordinator cannot be reached; repeat the same command.
        VersionMismatchError: the two sides run versions that do not go together.
    """
    config = config.resolve()
    here = read_settings(config) if config.exists() else None
    state = config.parent / (here.state if here else "state")
    if here and here.site != invite.site:
        problem = f"its site is {here.site}, the invite is for {invite.site}"
        raise ConfigError(config, problem, "Use another --config, or ask for another invite")
    if (state / "enrolment.json").exists():
        before = Enrolment.load(state)
        if (before.study, before.site) != (invite.study, invite.site):
            problem = f"it belongs to {before.site} in {before.study}"
            raise ConfigError(state, problem, "Use another --config with its own state folder")
    keys = Keys.of(state)
    coordinator, ca = Coordinator.pinned(invite)
    check_versions(coordinator.hello())
    accepted = coordinator.enrol(invite, keys.public())
    enrolment = Enrolment(host=invite.host, **asdict(accepted))
    replace_file(state / "ca.pem", ca)
    enrolment.save(state)
    cancers = ", ".join(enrolment.cancers)
    lines = [f"enrolled {enrolment.site} in {enrolment.study} for {cancers}; keys in {state}/keys"]
    if here is None:
        replace_file(config, _template(enrolment).encode())
        named = " ".join(f"--cancer {cancer}" for cancer in enrolment.cancers)
        return [
            *lines,
            f"wrote {config}: fill in outcomes and slides, decide what may leave, then",
            f"cropkt-client --site {enrolment.site} {named} --config {config}",
        ]
    extra = sorted(set(here.cancers) - set(enrolment.cancers))
    if extra:
        lines.append(f"take {' '.join(extra)} out of {config}: the invite is not for that")
    return lines


def _template(enrolment: Enrolment) -> str:
    """Return a `site.yaml` with all that is known filled in."""
    cancers = ", ".join(enrolment.cancers)
    return f"""\
# This hospital in study {enrolment.study}. Relative paths are meant from the folder of this file.

# Its name in the roster, and the cancers it joined with. The invite decides both.
site: {json.dumps(enrolment.site)}
cancers: [{cancers}]

# FILL IN: the table of outcomes (CSV or TSV), one row a patient: times and events.
outcomes: outcomes.csv

# FILL IN one of the two: folders of slide feature files, searched through, ...
slides: [features]
# ... or one folder packed by cropkt.
# pack: packed

# FILL IN: the patch encoder, as agreed in the study, for example UNI2-h.
encoder: ""
# The magnification of its patches, where the files of the slides do not say it.
# magnification: 20

# A row or slide that is not usable: raise (stop, and name it) or skip (leave it out, and count it).
on_bad: raise

# A folder for the losses of training, to look at with TensorBoard; needs cropkt[tensorboard].
# tensorboard: curves

# Keys, models, answers and logs of this site. Keep it: it is this site's identity.
state: state

# The licence under which this site's experts may be used, for their cards.
licence: ""

# Whose experts this site uses, by fingerprints compared by telephone (see: cropkt-client signers).
# Left out, the first key seen of each site counts from then on.
# signers:
#   another-clinic: 0123 4567 89ab cdef 0123 4567 89ab cdef

# DECIDE: what may leave this hospital. Without this section nothing does. Every message that leaves
# is in the ledger first: cropkt-client ledger show.
release:
  # human: each answer waits until somebody here looks at it and approves it, with
  # cropkt-client release list, show, approve or refuse. auto: what the rules below allow leaves.
  approval: human

  # No model, score or count of fewer patients, or of fewer events (deaths, say), leaves.
  minimum_patients: 20
  minimum_events: 10

  # Counts leave as multiples of this.
  round_counts_to: 5

  # The questions that may be answered: what this site holds; its expert; how others' experts do
  # here; its router; its final scores. Not named: train.fedavg, its part of one model for all
  # cancers, several rounds of it, which some studies compare with.
  messages: [query.describe, train.expert, evaluate.transfer, train.router, evaluate.release]

  # Of which cancers, and for studies of which purpose.
  cancers: [{cancers}]
  purposes: [research]

  # DECIDE: whether an expert stays if membership is told too well from it: the upper end of the
  # 95 % interval of the attack's AUROC (.5: a coin toss), which is wide for a small cohort.
  # Without this, the figure is shown to who approves, and blocks nothing.
  # audit:
  #   max_auroc_upper: 0.75

  # Size of one answer.
  max_megabytes: 512

# DECIDE: whether what leaves is differentially private. With this section one expert, trained with
# noise, leaves and no score; all that ever leaves of one of the cancers tells of a patient at most
# epsilon. It is never given back; other numbers here later do not change what was spent, which is
# written down in cropkt-budget/ beside the table of outcomes: one budget for all studies of it.
# privacy:
#   epsilon: 8
#   delta: 1.0e-5  # below one over the number of patients
#   per_release: 2  # what one expert may spend
"""


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class Keys:
    """A site's two keys; the private halves never leave `<state>/keys`."""

    node: ec.EllipticCurvePrivateKey  # who this site is, to Flower
    signing: ed25519.Ed25519PrivateKey  # signs what this site releases

    @classmethod
    def of(cls, state: Path) -> Keys:
        """Return the keys in a state folder, made the first time.

        Raises:
            ConfigError: a key file holds no such key.
        """
        node = _key(node_key(state), lambda: ec.generate_private_key(ec.SECP384R1()))
        signing = _key(state / "keys" / "signing.key", ed25519.Ed25519PrivateKey.generate)
        try:
            return cls(node, signing)
        except ValidationError:
            raise ConfigError(state / "keys", "a key is of the wrong kind", _KEY_FIX) from None

    def public(self) -> dict[str, str]:
        """Return the public halves as the coordinator wants them."""
        node = self.node.public_key().public_bytes(ser.Encoding.OpenSSH, ser.PublicFormat.OpenSSH)
        signing = self.signing.public_key().public_bytes_raw()
        return {"node_key": node.decode(), "signing_key": base64.b64encode(signing).decode()}


def node_key(state: Path) -> Path:
    """Return where the key lies by which Flower knows this site."""
    return state / "keys" / "node.key"


def _key(path: Path, make: Callable[[], Any]) -> Any:
    """Return the OpenSSH private key in a file, making it if there is no such file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        content = make().private_bytes(
            ser.Encoding.PEM, ser.PrivateFormat.OpenSSH, ser.NoEncryption()
        )
        write_private(path, content)
    try:
        return ser.load_ssh_private_key(path.read_bytes(), password=None)
    except ValueError:
        raise ConfigError(path, "not an OpenSSH private key", _KEY_FIX) from None
