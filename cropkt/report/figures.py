"""The two figures of a study: who helps whom, and what routing gains."""

from cropkt.report.gain_plot import draw_gain
from cropkt.report.heat_map import draw_transfer

__all__ = ["draw_gain", "draw_transfer"]
