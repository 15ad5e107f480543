"""Reports: read results, write JSON, one HTML page, and tables in the terminal. Nothing here trains or evaluates."""

from lightning_unlearn.report.content import Cell, Column, Figure, Row, Section, Table
from lightning_unlearn.report.decision_regions import (
    DecisionPlane,
    decision_plane,
    draw_decision_plane,
    plot_decision_regions,
)
from lightning_unlearn.report.figures import Panel, bar_figure, dot_figure
from lightning_unlearn.report.sections import results_section, say_and_do_not_say
from lightning_unlearn.report.unlearning_report import UnlearningReport

__all__ = [
    "Cell",
    "Column",
    "DecisionPlane",
    "Figure",
    "Panel",
    "Row",
    "Section",
    "Table",
    "UnlearningReport",
    "bar_figure",
    "decision_plane",
    "dot_figure",
    "draw_decision_plane",
    "plot_decision_regions",
    "results_section",
    "say_and_do_not_say",
]
