"""The table that says how sure each number is, on every page."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from lightning_unlearn.report import UnlearningReport
from lightning_unlearn.report.certainty import certainty_tables
from lightning_unlearn.report.sections import METRIC_COLUMNS
from lightning_unlearn.results import NoiseFloor
from tests.report.evaluations import evaluation, models


def sure(floor=None):
    values = {name: models(0.8, 0.25, 0.2) for name in ("forget_accuracy", "own_metric")}
    result = evaluation(values)
    rows = [
        dataclasses.replace(row, interval=(0.1, 0.4375), reference=0.2, noise_floor=floor)
        if row.name == "forget_accuracy"
        else row
        for row in result.rows
    ]
    return dataclasses.replace(result, rows=tuple(rows))


def test_each_metric_is_shown_as_in_its_own_column():
    (table,) = certainty_tables("How sure", sure(NoiseFloor(0.2, 0.03, 3)), METRIC_COLUMNS)
    assert [row.label for row in table.rows] == ["forget %", "A metric <of> a later release"]
    assert table.rows[0].cells == {
        "value": "25",
        "verdict": "words",
        "interval": "10 to 44",
        "reference": "20",
        "floor": "20 ± 3",
    }
    assert table.rows[1].cells == {"value": "0.25", "verdict": "words"}
    assert "differs no more than that" in table.note


def test_without_a_floor_it_says_that_none_was_measured():
    (table,) = certainty_tables("How sure", sure(), METRIC_COLUMNS)
    assert "floor" not in [column.name for column in table.columns]
    assert "not measured" in table.note
    assert certainty_tables("How sure", evaluation({"own_metric": models(1, 2, 3)}), METRIC_COLUMNS) == []


@pytest.mark.parametrize("width", [60, 120])
def test_pages_hold_intervals_and_floors(tmp_path, width):
    result = sure(NoiseFloor(0.2, 0.03, 3))
    report = UnlearningReport.from_results("T", {"amnesiac": [result, result]}, asked="A.", done="D.")
    html = report.to_html(tmp_path / "r.html").read_text(encoding="utf-8")
    stream = io.StringIO()
    report.print(Console(file=stream, width=width, color_system=None))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for page in (html, text):
        assert "What the numbers say" in page
        assert "How sure the numbers of amnesiac are (first seed)" in page
        assert "10 to 44" in page
        assert "20 ± 3" in page
    path = report.to_json(tmp_path / "r.json", data={"results": [result]})
    content = json.loads(path.read_text(encoding="utf-8"))
    row = content["data"]["results"][0]["rows"][1]
    assert row["interval"] == [0.1, 0.4375]
    assert row["noise_floor"] == {"mean": 0.2, "spread": 0.03, "count": 3}
