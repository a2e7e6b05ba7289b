"""Run the installed commands once, as a user of the wheel would; prints what passed.

Not collected by pytest: `.ci/run` starts it with the Python of a clean environment that holds
nothing but the wheel and its dependencies.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

BIN = Path(sys.executable).parent
PACKAGES = ("cropkt", "cropkt_server", "cropkt_client", "cropkt_sim")
TARGETS = {"UVM", "SKCM", "UCS"}


class SmokeFailure(Exception):
    """The installed package does not do what its README says."""


def run(command: str, *args: str, seconds: int) -> str:
    """Return the standard output of an installed command that must exit with 0."""
    done = subprocess.run(
        [BIN / command, *args],
        capture_output=True,
        text=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        raise SmokeFailure(
            f"{command} {' '.join(args)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def packages_come_from_the_wheel() -> None:
    """All four packages, with their py.typed, lie in this environment and not in a checkout."""
    for name in PACKAGES:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise SmokeFailure(f"{name}: not installed")
        home = Path(spec.origin).parent
        if not home.is_relative_to(sys.prefix):
            raise SmokeFailure(f"{name}: imported from {home}, outside {sys.prefix}")
        if not (home / "py.typed").is_file():
            raise SmokeFailure(f"{name}: py.typed is missing")


def commands_answer_help() -> None:
    """Each command prints its help."""
    for command in ("cropkt-server", "cropkt-client", "cropkt-sim"):
        if "Usage" not in run(command, "--help", seconds=60):
            raise SmokeFailure(f"{command} --help: no usage line")


def synthetic_study_runs() -> None:
    """A small synthetic study ends with a result for every cancer asked for."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        cancers = ",".join(sorted(TARGETS))
        args = ("--data", "synthetic", "--cancers", cancers, "--preset", "demo", "--out", str(out))
        run("cropkt-sim", "run", *args, seconds=900)
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    if set(results["targets"]) != TARGETS:
        raise SmokeFailure(f"results.json: targets {sorted(results['targets'])}, not {cancers}")
    if results.get("failed"):
        raise SmokeFailure(f"results.json: failed rows {results['failed']}")


def main() -> int:
    """Run every check, print one line each, and return 1 if any failed."""
    checks: list[Callable[[], None]] = [
        packages_come_from_the_wheel,
        commands_answer_help,
        synthetic_study_runs,
    ]
    failed = 0
    for check in checks:
        try:
            check()
        except (SmokeFailure, OSError, subprocess.TimeoutExpired, ValueError, KeyError) as error:
            failed += 1
            print(f"FAILED {check.__name__}: {error!s}")
        else:
            print(f"passed {check.__name__}")
    print(f"{len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
