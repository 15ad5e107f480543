"""How sure each number of an evaluation is: its interval over samples, and the noise between trainings."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_unlearn.report.content import Cell, Column, Row, Table, format_cell
from lightning_unlearn.results import EvaluationResult, MetricValue

__all__ = ["certainty_tables"]

_COLUMNS = (
    Column("value", "measured", help="Of the unlearned model."),
    Column("interval", "95 % interval", help="Over the samples of this evaluation; not over trainings."),
    Column("reference", "right", help="The retrained model's value, or what stands for it."),
    Column("floor", "between trainings", help="Mean and standard deviation over retrained models."),
    Column("verdict", "in words", text=True),
)


def certainty_tables(title: str, result: EvaluationResult, shown: Mapping[str, Column]) -> list[Table]:
    """The rows of the unlearned model one by one, in words as well; no table where nothing says how sure they are.

    Args:
        title: Of the table.
        result: One evaluation.
        shown: Metric -> the column whose header, factor and decimals it is shown with; by default two decimals.

    Returns:
        One table or none.
    """
    rows = [row for row in result.rows if row.model == "unlearned"]
    if all(row.interval is None and row.noise_floor is None for row in rows):
        return []
    floors = any(row.noise_floor is not None for row in rows)
    columns = tuple(column for column in _COLUMNS if floors or column.name != "floor")
    note = "Intervals are over samples. " + (
        "Between trainings: over retrained models; what differs no more than that shows nothing."
        if floors
        else "How much trainings differ was not measured: it takes several retrained models."
    )
    lines = tuple(_line(row, shown.get(row.name, Column(row.name, row.label))) for row in rows)
    return [Table(title, columns, lines, note)]


def _line(row: MetricValue, column: Column) -> Row:
    # Each metric has its own unit and decimals, so that cells are words, shown as the metric's own column shows them.
    cells: dict[str, Cell | str] = {"value": format_cell(Cell.of([row.value]), column), "verdict": row.verdict}
    if row.interval is not None and all(map(math.isfinite, row.interval)):
        cells["interval"] = " to ".join(format_cell(Cell.of([end]), column) for end in row.interval)
    if row.reference is not None:
        cells["reference"] = format_cell(Cell.of([row.reference]), column)
    if row.noise_floor is not None:
        floor = row.noise_floor
        cells["floor"] = format_cell(Cell(floor.mean, floor.spread, floor.count), column)
    return Row(column.title, cells)
