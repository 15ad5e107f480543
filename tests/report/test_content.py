"""Cells and how they are shown."""

import math
import statistics

import pytest

from lightning_unlearn.report import Cell, Column
from lightning_unlearn.report.content import format_cell


def test_cells_hold_mean_and_unbiased_spread():
    values = [0.1, 0.4, 0.7, 0.75]
    cell = Cell.of(values)
    assert cell == Cell(statistics.mean(values), statistics.stdev(values), 4)
    assert Cell.of([2.0]) == Cell(2.0, None, 1)
    with pytest.raises(ValueError, match="at least one"):
        Cell.of([])


@pytest.mark.parametrize(
    ("cell", "column", "text"),
    [
        (Cell(0.123, 0.045, 3), Column("a", factor=100, decimals=1), "12.3 ± 4.5"),
        (Cell(0.123), Column("a", decimals=2), "0.12"),
        (Cell(-0.001), Column("a", decimals=1), "0.0"),
        (Cell(-1.26), Column("a", decimals=1), "-1.3"),
        (Cell.of([1.0, math.inf]), Column("a"), "not finite"),
        ("words", Column("a", text=True), "words"),
        (None, Column("a"), "\N{EN DASH}"),
    ],
)
def test_shown(cell, column, text):
    assert format_cell(cell, column) == text
