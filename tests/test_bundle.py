import hashlib
import importlib
import subprocess
import sys
from io import BytesIO
from zipfile import ZipFile

from flwr.common.config import get_fab_config, get_metadata_from_config

from cropkt.bundle import MANIFEST, VERSION, bundle, bundle_hash


def test_flower_reads_it() -> None:
    config = get_fab_config(bundle())
    assert get_metadata_from_config(config) == ("cropkt/cropkt", VERSION)
    for reference in config["tool"]["flwr"]["app"]["components"].values():
        module, _, name = reference.partition(":")
        assert hasattr(importlib.import_module(module), name)


def test_holds_a_manifest_and_no_code() -> None:
    with ZipFile(BytesIO(bundle())) as archive:
        assert archive.namelist() == ["pyproject.toml", ".info/CONTENT"]
        assert archive.read("pyproject.toml").decode() == MANIFEST


def test_is_the_same_in_every_process() -> None:
    assert bundle_hash() == hashlib.sha256(bundle()).hexdigest()
    code = "from cropkt.bundle import bundle_hash; import sys; sys.stdout.write(bundle_hash())"
    there = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert there.stdout == bundle_hash()
    # A change here makes every enrolled site refuse the coordinator: raise PROTOCOL with it.
    assert bundle_hash() == "a0875473be27d67ef4eafe4809769d8172db0897cee8a93496dbbb65dde8673f"
