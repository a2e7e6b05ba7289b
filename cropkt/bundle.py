"""The Flower bundle of a study: a manifest that names installed modules, and no code.

Flower moves an app as a zip file and calls it by its SHA-256. Both sides make this one here, byte
for byte the same on every machine (nothing is compressed, so no zlib is involved), and a hospital
refuses any other: what it runs is what it installed.
"""

from __future__ import annotations

import hashlib
from functools import cache
from io import BytesIO
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from cropkt.messages import PROTOCOL

VERSION = f"{PROTOCOL}.0.0"  # one bundle a protocol: releases that speak the same fit together
MANIFEST = f"""\
[project]
name = "cropkt"
version = "{VERSION}"
description = "Names the apps that each side has installed"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "cropkt"

[tool.flwr.app.components]
serverapp = "cropkt_server.app:app"
clientapp = "cropkt_client.app:app"

[tool.flwr.app.config]
"""
_DATE = (2024, 10, 1, 0, 0, 0)  # what Flower stamps on every file


@cache
def bundle() -> bytes:
    """Return the bundle, in Flower's format: the manifest, and a list of the files."""
    manifest = MANIFEST.encode()
    digest = hashlib.sha256(manifest).hexdigest()
    content = f"pyproject.toml,{digest},{len(manifest) * 8}".encode()
    stream = BytesIO()
    with ZipFile(stream, "w", ZIP_STORED) as archive:
        for name, data in (("pyproject.toml", manifest), (".info/CONTENT", content)):
            info = ZipInfo(name, _DATE)
            info.create_system = 3  # Unix, wherever it is made
            archive.writestr(info, data)
    return stream.getvalue()


@cache
def bundle_hash() -> str:
    """Return the SHA-256 by which Flower and both sides know the bundle."""
    return hashlib.sha256(bundle()).hexdigest()
