"""Every figure of a study by the name of its file."""

from collections.abc import Callable

from matplotlib.figure import Figure

from cropkt.report.few_shot_plot import draw_few_shot
from cropkt.report.forest import draw_arms, draw_gained
from cropkt.report.gain_plot import draw_gain
from cropkt.report.heat_map import draw_transfer
from cropkt.report.routing_plot import draw_routing
from cropkt.report.schema import Results
from cropkt.report.survival_plot import draw_survival

FIGURES: dict[str, Callable[[Results], Figure]] = {
    "gained": draw_gained,
    "arms": draw_arms,
    "gain": draw_gain,
    "transfer": draw_transfer,
    "routing": draw_routing,
    "few_shot": draw_few_shot,
    "survival": draw_survival,
}
"""Each draws results that lack its part as one sentence."""
