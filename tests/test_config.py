from __future__ import annotations

import json
import pickle
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

import pytest

from cropkt.config import PUBLISHED, StudyConfig, parse_study, with_shape
from cropkt.errors import ConfigError
from cropkt.experts.training import cross_fitted

OTHER: dict[str, Any] = {
    "purpose": "audit",
    "endpoint": "OS",
    "split": "hospital",
    "encoder": "UNI2-h",
    "initial_hazard": None,
    "source": "fold_0",
    "drop_last": True,
    "loss": "clamped",
    "standardise": "site",
    "keep_own": False,
    "renormalise": False,
    "balance": "patient",
    "self_features": "in_sample",
    "prior": "none",
    "warm_start": False,
    "dropout": 0.5,
    "alpha": 0.25,
    "learning_rate": 1e-3,
    "arms": ("local",),
    "shots": (20,),
}


def changed(config: Any) -> list[tuple[str, Any]]:
    """Return the config with each value changed in turn, nested ones too."""
    result: list[tuple[str, Any]] = []
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            result += [
                (f"{item.name}.{name}", replace(config, **{item.name: inner}))
                for name, inner in changed(value)
            ]
        else:
            other = OTHER[item.name] if item.name in OTHER else value + 1
            result.append((item.name, replace(config, **{item.name: other})))
    return result


def test_the_hash_changes_with_every_value() -> None:
    base = StudyConfig()
    variants = changed(base)
    hashes = {variant.hash() for _, variant in variants} | {base.hash()}
    assert len(hashes) == 1 + len(variants)
    assert StudyConfig().hash() == base.hash()
    assert len(base.hash()) == 16


def test_a_study_survives_json() -> None:
    for study in (StudyConfig(), PUBLISHED):
        again = parse_study(json.loads(json.dumps(asdict(study))), "study.yaml")
        assert again == study
        assert again.hash() == study.hash()
    assert parse_study({}, "study.yaml") == StudyConfig()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"sead": 1}, "sead"),
        ({"folds": 1}, "folds"),
        ({"folds": "many"}, "folds"),
        ({"seed": 2**31}, "seed"),
        ({"endpoint": "death"}, "endpoint"),
        ({"initial_hazard": 1.0}, "initial_hazard"),
        ({"training": {"epochs": 0}}, "training.epochs"),
        ({"training": {"learning_rate": float("inf")}}, "training.learning_rate"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate"),
        ({"training": {"weight_decay": float("inf")}}, "training.weight_decay"),
        ({"router": {"z_weight": float("inf")}}, "router.z_weight"),
        ({"router": {"prior_strength": float("nan")}}, "router.prior_strength"),
        ({"router": {"topk": 3}}, "router.topk"),
        ({"shape": {"dim": 0}}, "shape.dim"),
        ({"shape": 4}, "shape"),
        (["folds"], "the file"),
    ],
)
def test_a_wrong_value_is_named_with_its_file(values, key) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_study(values, "here/study.yaml")
    assert str(caught.value).startswith(f"here/study.yaml: {key}: ")
    assert str(caught.value).endswith(f"Correct {key}.")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_published_is_what_the_paper_describes() -> None:
    """Every value of arXiv 2508.13482 that docs/science.md lists."""
    study = PUBLISHED
    assert (study.endpoint, study.folds, study.split) == ("DSS", 5, "stratified")
    assert (study.initial_hazard, study.source) == (None, "fold_0")
    shape = study.shape
    assert (shape.dim, shape.embed, shape.attention, shape.bins) == (1536, 512, 384, 32)
    for optimiser in (study.training, study.router):
        assert (optimiser.learning_rate, optimiser.weight_decay) == (1e-4, 1e-5)
        assert (optimiser.epochs, optimiser.warmup_epochs, optimiser.batch) == (20, 1, 16)
        assert optimiser.drop_last
        assert optimiser.minimum_updates == 0
    training = study.training
    assert (training.dropout, training.alpha, training.loss) == (0.25, 0.5, "clamped")
    assert training.standardise == "none"
    router = study.router
    assert (router.top_k, router.renormalise) == (5, False)
    assert (router.balance, router.balance_weight, router.z_weight) == ("patient", 0.01, 0.01)
    assert (router.self_features, router.prior, router.warm_start) == ("in_sample", "none", False)
    assert study.max_sources == 25


def test_other_widths() -> None:
    study = with_shape(PUBLISHED, dim=8, bins=4)
    assert (study.shape.dim, study.shape.embed, study.shape.bins) == (8, 512, 4)
    assert replace(study, shape=PUBLISHED.shape) == PUBLISHED


def test_widths_whose_models_no_message_could_carry_are_refused() -> None:
    large = {"shape": {"dim": 16_384, "embed": 4_096, "attention": 4_096}, "folds": 10}
    with pytest.raises(ConfigError, match=r"56 models of \d+ weights are more than 536870912"):
        parse_study(large, "study.yaml")
    assert StudyConfig(folds=10).models == len(cross_fitted(10)) == 56
