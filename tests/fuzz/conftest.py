"""Draws what the other side might send, and watches what happens while it is read."""

from __future__ import annotations

import json
import os
import random
import re
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from pydantic import StringConstraints
from pydantic.fields import FieldInfo

from cropkt.messages import Message, Weights

TEXTS = ["a", "1.2", "0a" * 32, "0a" * 64, "0a1b2c3d", "A" * 43 + "=", ""]
HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 3.0, "3", 1 << 64, 10**4000, 0.5, 1e308, float("nan")),
    *(float("inf"), -0.0, "", "a", "é", "\x00", "\ud800", "../../x", "a" * 4000, "UVM", "{}"),
    *([], {}, [[]], [{}], {"": 0}, [0] * 4000, ["task", "a"], {"__class__": "os.system"}),
]
LEAST = 2_000_000  # bytes that reading anything may take
TIMES = 1_000  # more for a byte read: pydantic lists the error in each of many items
MOST = 32_000_000  # whatever is read


class Draw:
    """Draws valid values and spoils them; the same for the same generator."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def message(self, kind: type[Message]) -> dict[str, Any]:
        """Return a valid message of a class as the tree of its text."""
        hints = get_type_hints(kind, include_extras=True)
        arrays = {
            item.name
            for item in fields(kind)
            if Weights in (hints[item.name], *_any(hints[item.name]))
        }
        needed = [name for name in arrays if hints[name] == Weights or self.rng.random() < 0.5]
        values = {name: value for name, value in self.value(kind).items() if name not in needed}
        shapes = {name: [2, 3] for name in needed}
        return {"message": kind.__name__, "values": values, "shapes": shapes}

    def value(self, hint: Any) -> Any:
        """Return a JSON value that a field of this type may hold."""
        origin, inner, rng = get_origin(hint), get_args(hint), self.rng
        if origin is Annotated:
            return self._bounded(inner[0], inner[1:])
        if origin is Literal:
            return rng.choice(inner)
        if origin is tuple:
            return [self.value(inner[0]) for _ in range(rng.randrange(3))]
        if origin is dict:
            return {self.value(inner[0]): self.value(inner[1]) for _ in range(rng.randrange(3))}
        if inner:  # a union
            return self.value(rng.choice([one for one in inner if one != Weights]))
        if is_dataclass(hint):
            hints = get_type_hints(hint, include_extras=True)
            own = [item.name for item in fields(hint) if hints[item.name] != Weights]
            return {name: self.value(hints[name]) for name in own}
        if hint is type(None):
            return None
        if isinstance(hint, type) and issubclass(hint, Enum):
            return rng.choice(list(hint)).value
        return {bool: rng.random() < 0.5, int: rng.randrange(3), float: rng.random()}[hint]

    def _bounded(self, hint: Any, notes: tuple[Any, ...]) -> Any:
        """Return a value within the bounds that pydantic is told of."""
        if hint is str:
            patterns = [n.pattern for n in notes if isinstance(n, StringConstraints) and n.pattern]
            return self.rng.choice(
                [t for t in TEXTS if all(re.search(str(p), t) for p in patterns)]
            )
        bounds = {
            name: getattr(one, name)
            for note in notes
            for one in (note.metadata if isinstance(note, FieldInfo) else ())
            for name in ("ge", "gt", "le", "lt")
            if hasattr(one, name)
        }
        if hint not in (int, float) or not bounds:
            return self.value(hint)
        low = bounds.get("ge", bounds.get("gt", 0))
        high = bounds.get("le", bounds.get("lt", low + 100))
        if hint is float:
            return low + (high - low) * self.rng.uniform(0.01, 0.99)
        first = low + ("gt" in bounds)
        return self.rng.randint(first, min(high - ("lt" in bounds), first + 3))

    def spoilt_tree(self, tree: Any) -> str:
        """Return a JSON tree as text, with up to three places of it changed."""
        tree = json.loads(json.dumps(tree))
        for _ in range(self.rng.randrange(1, 4)):
            self._spoil(tree)
        text = json.dumps(tree)
        if self.rng.random() < 0.1:  # a key twice
            text = re.sub(r'("[a-z]+": )', r"\1null, \1", text, count=1)
        if self.rng.random() < 0.1:
            deep = self.rng.choice([10, 1_000, 30_000])
            text = text.replace("null", "[" * deep + "]" * deep, 1)
        return text

    def _spoil(self, tree: Any) -> None:
        node = tree
        while isinstance(node, dict | list) and node:
            key = self.rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if isinstance(node[key], dict | list) and node[key] and self.rng.random() < 0.8:
                node = node[key]
                continue
            change = self.rng.randrange(4)
            if change == 0:
                del node[key]
            elif change == 1 and isinstance(node, dict):
                node[self.rng.choice(TEXTS)] = deepcopy(self.rng.choice(HOSTILE))
            else:
                node[key] = deepcopy(self.rng.choice(HOSTILE))
            return

    def spoilt_bytes(self, content: bytes) -> bytes:
        """Return bytes, up to four times cut, doubled, overwritten or with other bits."""
        spoilt, rng = bytearray(content), self.rng
        for _ in range(rng.randrange(1, 5)):
            at, size = rng.randrange(len(spoilt) + 1), rng.choice([1, 1, 4, 40])
            how = rng.randrange(5)
            if how == 0:
                del spoilt[at : at + rng.choice([1, 8, 10_000])]
            elif how == 1:
                spoilt[at:at] = spoilt[at : at + 100 * size]
            elif how == 2:
                spoilt[at : at + size] = rng.randbytes(size)
            elif how == 3:
                spoilt[at : at + size] = bytes([rng.choice([0, 0x7F, 0xFF])]) * size
            elif at < len(spoilt):
                spoilt[at] ^= 1 << rng.randrange(8)
        return bytes(spoilt)


def _any(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is not Annotated else ()


class Watch:
    """Notes what this process does, while armed, that reading bytes must not do.

    Args:
        folder: the parsers' own, the only place where files may come and go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.armed = folder.resolve(), False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)  # stays for the life of the process

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event == "open" and isinstance(args[0], _PATH):
            writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and not self._own(args[0]):
                self.seen.append(f"{event} {args[0]!r}")
        elif event in _FILES:
            if not all(self._own(one) for one in args if isinstance(one, _PATH)):
                self.seen.append(f"{event} {args}")
        elif event in _NEVER:
            self.seen.append(f"{event} {args}")

    def _own(self, path: str | bytes | os.PathLike[str]) -> bool:
        return Path(os.fsdecode(path)).resolve().is_relative_to(self.folder)

    @contextmanager
    def over(self, size: int) -> Iterator[None]:
        """Let a block read `size` bytes and do nothing else."""
        self.seen.clear()
        tracemalloc.start()
        self.armed = True
        try:
            yield
        finally:
            self.armed = False
            taken = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert not self.seen, self.seen
        assert taken < min(LEAST + TIMES * size, MOST), f"{taken} bytes for {size}"


_PATH = (str, bytes, os.PathLike)
_FILES = {
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.utime", "sqlite3.connect"),
}
_NEVER = {
    *("exec", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn"),
    *("subprocess.Popen", "socket.connect", "socket.bind", "socket.getaddrinfo"),
    *("pickle.find_class", "shutil.rmtree", "os.kill", "ctypes.dlopen"),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parsers' own folder."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="session")
def watch(folder: Path) -> Watch:
    return Watch(folder)


@pytest.fixture(scope="session")
def draw() -> Callable[[int], Draw]:
    return lambda seed: Draw(random.Random(seed))
