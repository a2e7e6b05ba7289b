"""Small cohorts as real files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cropkt.cohort.features import write_slide_h5

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"

Writer = Callable[..., Path]


@pytest.fixture
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: it holds the real outcome tables")
    return SHARED


@pytest.fixture
def table(tmp_path: Path) -> Writer:
    """Write lines as a table and return its path."""

    def write(*lines: str, name: str = "outcomes.csv") -> Path:
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def slides(tmp_path: Path) -> Callable[..., Path]:
    """Write slides of the given numbers of patches as HDF5 and return their folder."""

    def write(*, dim: int = 4, dtype: str = "float16", **patches: int) -> Path:
        folder = tmp_path / "slides"
        folder.mkdir(exist_ok=True)
        for number, (name, count) in enumerate(patches.items()):
            features = np.random.default_rng(number).normal(size=(count, dim)).astype(dtype)
            write_slide_h5(folder / f"{name}.h5", features)
        return folder

    return write
