"""The child may die in any way: the parent says how, and calls the next one."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cropkt.errors import TrainingFailedError
from cropkt_client.worker import Worker, WorkerDiedError, WorkerRaisedError

HERE = Path(__file__).parent


def toy(order: str, *arguments: object) -> object:
    """Run in the child: do as told."""
    if order == "pid":
        return os.getpid()
    if order == "echo":
        return arguments
    if order == "environment":
        return {name: os.environ.get(name) for name in ("CROPKT_DEVICE", "CUDA_VISIBLE_DEVICES")}
    if order == "raise":
        raise KeyError(f"patient-{815:04d}")
    if order == "exit":
        os._exit(3)
    if order == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if order == "crash":
        import ctypes

        ctypes.string_at(0)
    if order == "hog":
        size = psutil.Process().memory_info().vms + (64 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        return len(bytearray(1 << 30))
    if order == "sleep":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        Path(str(arguments[0])).write_text(f"{os.getpid()} {child.pid}")
        child.wait()
    if order == "leave":  # a grandchild keeps the inherited pipes open
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
        os.kill(os.getpid(), signal.SIGKILL)
    return None


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *filter(None, [path])]))
    worker = Worker("test_worker:toy", {"CROPKT_DEVICE": "cpu"})
    yield worker
    worker.stop()


def _gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def _until(true: object, *, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_warm_child_answers_again_and_again(worker: Worker) -> None:
    first = worker.call("pid")
    assert first != os.getpid()
    assert worker.call("pid") == first == worker.pid
    big = os.urandom(5_000_000)
    assert worker.call("echo", big, {"a": (1, None)}) == (big, {"a": (1, None)})


def test_the_device_reaches_the_child_alone(worker: Worker) -> None:
    assert worker.call("environment") == {"CROPKT_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    assert "CROPKT_DEVICE" not in os.environ


def test_an_exception_leaves_its_text_in_the_child(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    pid = worker.call("pid")
    with caplog.at_level(logging.INFO), pytest.raises(WorkerRaisedError, match="KeyError") as got:
        worker.call("raise")
    worker.stop()  # all of its output has come over
    assert "patient-0815" not in str(got.value) + caplog.text
    assert "test_worker.py" in caplog.text  # but where it was raised is known
    assert _gone(pid)


@pytest.mark.parametrize(
    ("order", "cause"),
    [
        ("exit", "exit code 3"),
        ("kill", "killed (SIGKILL)"),
        ("crash", "crashed (SIGSEGV)"),
        ("leave", "killed (SIGKILL)"),
    ],
)
def test_a_death_is_an_error_with_its_cause(worker: Worker, order: str, cause: str) -> None:
    before = worker.call("pid")
    with pytest.raises(WorkerDiedError) as got:
        worker.call(order)
    assert cause in str(got.value)
    assert isinstance(got.value, TrainingFailedError)
    assert worker.call("pid") != before


def test_want_of_memory_is_an_error_and_the_next_call_works(worker: Worker) -> None:
    with pytest.raises(WorkerRaisedError, match="MemoryError"):
        worker.call("hog")
    assert worker.call("echo", 1) == (1,)


def test_a_crash_leaves_its_traceback_in_the_log(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(WorkerDiedError):
        worker.call("crash")
    assert "Fatal Python error: Segmentation fault" in caplog.text


def test_rest_gives_the_memory_back(worker: Worker) -> None:
    first = worker.call("pid")
    worker.rest()
    assert _gone(first)
    assert worker.pid is None
    assert worker.call("pid") != first


def test_stop_cuts_a_call_off(worker: Worker, tmp_path: Path) -> None:
    file = tmp_path / "pids"
    caught: list[BaseException] = []

    def call() -> None:
        try:
            worker.call("sleep", str(file))
        except WorkerDiedError as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    _until(lambda: file.exists() and file.read_text())
    worker.stop()
    thread.join(10)
    assert len(caught) == 1
    _until(lambda: all(_gone(int(pid)) for pid in file.read_text().split()))
    with pytest.raises(WorkerDiedError, match="stops"):
        worker.call("pid")


def test_nothing_outlives_a_killed_parent(worker: Worker, tmp_path: Path) -> None:
    file = tmp_path / "pids"
    parent = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sys; from cropkt_client.worker import Worker; "
            "Worker('test_worker:toy').call('sleep', sys.argv[1])",
            str(file),
        ]
    )
    _until(lambda: file.exists() and len(file.read_text().split()) == 2)
    parent.kill()
    parent.wait()
    _until(lambda: all(_gone(int(pid)) for pid in file.read_text().split()))
