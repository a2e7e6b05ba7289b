"""Fuzzing that looks where new lines are reached: `make fuzz` runs it with atheris on Linux.

The first byte of an input chooses the parser. Anything but a parser's own refusal ends it, and
libFuzzer writes the input down; so does more memory than an input may take.
"""

from __future__ import annotations

import random
import runpy
import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.stderr.write("atheris is not made for this machine: hypothesis was all\n")
    sys.exit(0)

HERE = Path(__file__).parent
BOUNDS = ["-max_len=8192", "-rss_limit_mb=2048", "-malloc_limit_mb=64", "-timeout=0"]

with atheris.instrument_imports(include=["cropkt", "cropkt_client", "cropkt_server"]):
    parsers = runpy.run_path(str(HERE / "parsers.py"))["parsers"]
Draw = runpy.run_path(str(HERE / "conftest.py"))["Draw"]


def main() -> None:
    """Fuzz all parsers, beginning from valid input of each."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        readers = [parser for _, parser in sorted(parsers(Path(folder)).items())]
        for number, parser in enumerate(readers):
            for seed in range(20):
                valid = parser.valid(Draw(random.Random(seed)))
                (corpus / f"{number}-{seed}").write_bytes(bytes([number]) + valid)

        def read(data: bytes) -> None:
            if data:
                readers[data[0] % len(readers)](data[1:])

        atheris.Setup([*sys.argv, *BOUNDS, str(corpus)], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
