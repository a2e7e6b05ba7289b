"""What an enrolled site sends to be told how it stands, signed with its own key.

It tells nothing that the coordinator does not know, and asks for nothing to be done: heard again
by somebody who listened in, it does no harm.
"""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Annotated

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ConfigDict, Field, StringConstraints
from pydantic.dataclasses import dataclass

from cropkt.messages import SiteName

DOMAIN = b"cropkt-knock-v1\0"  # what is signed for another purpose is no knock
VALID = 300.0  # seconds before and after the time in it


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class Knock:
    """Who asks, for which study, and when."""

    study: SiteName
    site: SiteName
    node_key: Annotated[str, StringConstraints(max_length=2_000)]  # OpenSSH
    at: Annotated[float, Field(ge=0, le=1e11)]  # unix seconds, of the coordinator's clock
    signature: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{128})?$")] = ""  # Ed25519

    def signed(self, key: Ed25519PrivateKey) -> Knock:
        """Return the knock with a signature."""
        return replace(self, signature=key.sign(self._content()).hex())

    def signed_by(self, key: str) -> bool:
        """Return whether the signature is of a key (base64 of the raw Ed25519 public key)."""
        try:
            public = Ed25519PublicKey.from_public_bytes(base64.b64decode(key))
            public.verify(bytes.fromhex(self.signature), self._content())
        except (InvalidSignature, ValueError):
            return False
        return True

    def _content(self) -> bytes:
        said = [self.study, self.site, self.node_key, self.at]
        return DOMAIN + json.dumps(said, separators=(",", ":")).encode()
