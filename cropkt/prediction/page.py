"""One HTML page for one patient, which needs no other file and no network."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from cropkt.prediction.answer import FEWEST, Answer, Probability
from cropkt.prediction.kept import About
from cropkt.prediction.pictures import SHOWN, survival_curve
from cropkt.prediction.tables import INTERVALS, NOT_IN_INTERVALS, NOTICE, Predicted
from cropkt.report import canvas
from cropkt.report.blocks import Picture
from cropkt.report.names import named_in_full
from cropkt.report.page import inline, template

_WHO = {
    "released": "the model that this site's guard decided on",
    "local": "this site's own expert alone",
    "router": "the study's router over all experts",
}
_CANDIDATES = {
    "equal": "equal vote of itself and the others",
    "vote": "vote of the others",
    "stack": "experts stacked by this site's outcomes",
    "measured": "vote weighted by measured transfer",
}
_FREE = {
    "OS": "alive",
    "DSS": "not dead of the disease",
    "PFI": "without progression",
    "DFI": "free of disease",
}


def page(
    about: About, one: Predicted, *, maps: Sequence[tuple[str, bytes]], notes: Sequence[str]
) -> bytes:
    """Return the page of one patient.

    Args:
        about: the model.
        one: the patient with the answer.
        maps: name of a slide and its heat map as PNG.
        notes: what else a reader has to know.
    """
    answer = one.answer
    curve = Picture("survival", "Predicted survival by year, with its interval")
    text = template(__package__, "patient.html.j2").render(
        notice=NOTICE,
        patient=one.patient,
        facts=_facts(about, one),
        answer=answer,
        group_said=_group(about, answer),
        free=_FREE[about.study.endpoint],
        times=[_time(at) for at in answer.probabilities()],
        curve=inline(canvas.svg(survival_curve(answer)), curve) if answer.horizon else "",
        interval=f"{INTERVALS[answer.model].capitalize()}. {NOT_IN_INTERVALS}",
        voices=[
            {
                "name": named_in_full(voice.cancer),
                "own": voice.own,
                "weight": f"{100 * voice.weight:.0f} %",
                "bar": round(100 * min(voice.weight / answer.voices[0].weight, 1.0)),
                "risk": f"{voice.risk:+.1f}".replace("-", "−"),
            }
            for voice in answer.voices
        ],
        spoke=_spoke(about, answer),
        maps=[(name, base64.b64encode(png).decode()) for name, png in maps],
        shown=SHOWN,
        agreement=_agreement(answer),
        notes=[*notes, *_limits(about, answer)],
    )
    return text.encode()


def _facts(about: About, one: Predicted) -> str:
    slides = len(one.slides)
    patches = sum(slide.patches for slide in one.slides)
    return " · ".join(
        [
            named_in_full(about.cancer),
            f"{slides} {'slide' if slides == 1 else 'slides'}, {patches} patches",
            f"endpoint {about.study.endpoint}",
            f"model of {about.site}, {about.created}",
            f"cropkt {about.cropkt}",
        ]
    )


def _group(about: About, answer: Answer) -> str:
    side = "higher" if answer.high else "lower"
    against = f"{about.patients} training patients of this site"
    text = (
        f"Ranked above {answer.percentile:.0f} % of the {against} "
        f"({about.events} events); the {side} half is the {answer.group}-risk group."
    )
    if answer.fold is None:
        text += (
            f" {answer.same_side} of {answer.versions} models that leave a fold of them out "
            "agree on the group."
        )
    return text


def _time(at: Probability) -> dict[str, str]:
    years = f"{at.years} {'year' if at.years == 1 else 'years'}"
    if at.value is None:
        return {"years": years, "value": "n/e", "interval": "nobody was followed so long"}
    known = at.low is not None and at.high is not None
    interval = f"{100 * (at.low or 0):.0f} to {100 * (at.high or 0):.0f} %" if known else ""
    thin = f" · only {at.followed} followed so long" if at.thin else ""
    return {"years": years, "value": f"{100 * at.value:.0f} %", "interval": f"{interval}{thin}"}


def _spoke(about: About, answer: Answer) -> str:
    whose = _WHO[answer.model]
    if answer.model == "released":
        own = answer.voices[0].own and len(answer.voices) == 1
        if own:
            return f"This is {whose}: it stays with the own expert."
        return (
            f"This is {whose}: {100 * about.share:.0f} % of the way from the own expert to the "
            f"{_CANDIDATES[about.candidate]}. The weights are the same for every patient."
        )
    if answer.model == "router":
        return f"This is {whose}: it chose {len(answer.voices)} experts for this patient."
    return f"This is {whose}."


def _agreement(answer: Answer) -> str:
    if answer.agreement is None:
        return ""
    figure = f"{answer.agreement:+.2f}".replace("-", "−")
    return (
        f"Agreement on where to look: {figure} (mean rank correlation of attention over all pairs "
        f"of the {len(answer.voices)} experts; 1 the same patches, 0 unrelated, −1 opposite)."
    )


def _limits(about: About, answer: Answer) -> list[str]:
    found = []
    if (score := about.out_of_fold.get(answer.model)) is not None:
        ends = ""
        if score.low is not None and score.high is not None:
            ends = f" (95 % interval {score.low:.2f} to {score.high:.2f})"
        found.append(
            f"On this site's training patients, each judged by models that did not see them, its "
            f"C-index was {score.c_index:.2f}{ends}. The model of all patients, which answers "
            "here, was not itself judged: no patient is left who could."
        )
    if any(at.thin and at.value is not None for at in answer.probabilities()):
        found.append(
            f"Fewer than {FEWEST} training patients were followed to some of the times above."
        )
    found.append(
        "Attention shows where the models look. It does not show why, and not what causes a risk."
    )
    return found
