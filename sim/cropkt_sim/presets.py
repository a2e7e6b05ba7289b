"""Study settings for the three kinds of data and the named presets."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from cropkt.config import (
    EVALUATED,
    PUBLISHED,
    ExpertShape,
    RouterConfig,
    StudyConfig,
    TrainingConfig,
    with_shape,
)

Data = Literal["synthetic", "clinical", "features"]
Preset = Literal["default", "demo", "published"]

# Small features need small experts: the published widths are for 1536 features a patch.
SMALL = StudyConfig(
    shape=ExpertShape(embed=64, attention=32),
    training=TrainingConfig(epochs=10, minimum_updates=200, learning_rate=1e-3, weight_decay=1e-2),
    router=RouterConfig(epochs=5, learning_rate=1e-3, weight_decay=1e-2),
)
# A whole federation in three minutes on two cores: without the arms that train much.
DEMO = replace(
    SMALL,
    arms=tuple(a for a in EVALUATED if a not in ("finetune", "merge", "roupkt", "permuted")),
    folds=3,
    shape=ExpertShape(embed=32, attention=16),
    router=replace(SMALL.router, epochs=3),
)


def study_for(*, data: Data, preset: Preset, dim: int) -> StudyConfig:
    """Return the settings of a preset, for features of width `dim`."""
    if preset == "published":
        study = PUBLISHED
    elif preset == "demo":
        study = DEMO
    elif data == "features":
        study = replace(
            SMALL,
            shape=ExpertShape() if dim > 1000 else ExpertShape(embed=128, attention=64),
            training=replace(SMALL.training, standardise="none" if dim > 1000 else "site"),
        )
    else:
        study = SMALL
    return with_shape(study, dim=dim)
