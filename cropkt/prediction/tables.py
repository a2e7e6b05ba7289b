"""Answers as tables, one row a patient, expert or year, and as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from cropkt.prediction.answer import Answer
from cropkt.prediction.kept import About, Which
from cropkt.prediction.slides import Slide
from cropkt.survival.accuracy import YEARS

NOTICE = "Research software, not a medical device."
INTERVALS: dict[Which, str] = {
    "released": "95 % interval over bootstrap samples of this site's training cohort (slope and "
    "baseline of the curve) and over the own expert's models that leave a fold out",
    "local": "from the lowest to the highest of the own expert's models: of all patients, and "
    "without each fold",
    "router": "from the lowest to the highest of the routers: of all patients, and without each "
    "fold",
}
NOT_IN_INTERVALS = (
    "It does not hold what the choice of experts, their own training, the extraction of the slide "
    "or a difference between this patient and the training cohort add."
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predicted:
    """One patient with the answer."""

    patient: str
    slides: tuple[Slide, ...]
    answer: Answer


def csv_files(about: About, several: Sequence[Predicted]) -> dict[str, bytes]:
    """Return the tables by name."""
    return {
        "predictions.csv": _csv(_patient_rows(about, several)),
        "experts.csv": _csv(_expert_rows(several)),
        "curves.csv": _csv(_curve_rows(several)),
    }


def json_file(about: About, several: Sequence[Predicted]) -> bytes:
    """Return everything but attention as JSON."""
    which = several[0].answer.model if several else "released"
    left_out = ("kind", "sources", "tensors", "weights", "study")
    told = {key: value for key, value in asdict(about).items() if key not in left_out}
    whole = {
        "kind": "cropkt-predictions-1",
        "notice": NOTICE,
        "model": {"which": which, "study": about.study.hash(), **told},
        "interval": f"{INTERVALS[which]}. {NOT_IN_INTERVALS}",
        "patients": [_record(one) for one in several],
    }
    return (json.dumps(whole, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _record(one: Predicted) -> dict[str, object]:
    answer = one.answer
    return {
        "patient": one.patient,
        "slides": [slide.name for slide in one.slides],
        "patches": sum(slide.patches for slide in one.slides),
        "in_training": answer.fold is not None,
        "risk": answer.risk,
        "percentile": answer.percentile,
        "group": answer.group,
        "same_side": answer.same_side,
        "versions": answer.versions,
        "survival": [asdict(probability) for probability in answer.probabilities()],
        "curve": [float(value) for value in answer.survival[: answer.horizon]],
        "experts": [
            {"expert": str(v.cancer), "own": v.own, "weight": v.weight, "risk": v.risk}
            for v in answer.voices
        ],
        "agreement": answer.agreement,
    }


def _patient_rows(about: About, several: Sequence[Predicted]) -> Iterable[list[str]]:
    parts = ("", "_low", "_high", "_followed")
    yield [
        *("patient", "cancer", "model", "slides", "patches", "in_training"),
        *("risk", "percentile", "group", "same_side", "versions"),
        *(f"survival_{year}y{part}" for year in YEARS for part in parts),
        *("experts", "agreement"),
    ]
    for one in several:
        answer = one.answer
        yield [
            *(one.patient, str(about.cancer), answer.model, str(len(one.slides))),
            str(sum(slide.patches for slide in one.slides)),
            "no" if answer.fold is None else "yes",
            *(_number(answer.risk), f"{answer.percentile:.1f}", answer.group),
            *(str(answer.same_side), str(answer.versions)),
            *(
                cell
                for at in answer.probabilities()
                for cell in (*map(_number, (at.value, at.low, at.high)), str(at.followed))
            ),
            *(str(len(answer.voices)), _number(answer.agreement)),
        ]


def _expert_rows(several: Sequence[Predicted]) -> Iterable[list[str]]:
    yield ["patient", "expert", "own", "weight", "risk"]
    for one in several:
        for voice in one.answer.voices:
            own = "yes" if voice.own else "no"
            numbers = map(_number, (voice.weight, voice.risk))
            yield [one.patient, str(voice.cancer), own, *numbers]


def _curve_rows(several: Sequence[Predicted]) -> Iterable[list[str]]:
    yield ["patient", "year", "survival", "low", "high", "followed"]
    for one in several:
        answer = one.answer
        for year in range(answer.horizon):
            ends = (answer.survival, answer.low, answer.high_end)
            numbers = [_number(float(row[year])) for row in ends]
            yield [one.patient, str(year + 1), *numbers, str(answer.followed[year])]


def _number(value: float | None) -> str:
    """Return a number with six digits after the point, nothing for none or nan."""
    return "" if value is None or value != value else f"{value:.6f}"


def _csv(rows: Iterable[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
