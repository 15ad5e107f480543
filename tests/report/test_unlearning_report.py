"""The report as JSON, as one HTML page, and in a terminal."""

import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from lightning_unlearn.__about__ import __version__
from lightning_unlearn.report import Cell, Column, Row, Section, Table, UnlearningReport
from tests.report.evaluations import seeds


def report(**changes):
    arguments = {
        "title": "Forgetting <one> contributor",
        "arms": seeds(),
        "asked": "Contributor [bold]A[/bold] & 20 images.",
        "done": "Steps were subtracted.",
        "metadata": {"seeds": "3"},
    }
    return UnlearningReport.from_results(**{**arguments, **changes})


class Outline(HTMLParser):
    """Collects tags, attributes that load something, and text; complains about tags that do not close."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.loads, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [
            value for key, value in attrs if key in ("src", "href", "xlink:href", "action") and value[:1] != "#"
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())


def test_page_is_whole_escaped_and_loads_nothing(tmp_path):
    path = report().to_html(tmp_path / "deep" / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Outline(text)
    assert page.loads == []
    assert not {"script", "iframe", "link", "object"} & set(page.tags)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "Forgetting <one> contributor" in page.words
    assert "Contributor [bold]A[/bold] & 20 images." in page.words
    assert "10 ± 10" in page.words
    for heading in ("What was asked", "What was done", "What the numbers say", "What the numbers do not say"):
        assert heading in page.words
    assert page.tags.count("svg") == 2
    assert "prefers-color-scheme: dark" in text


def test_json_holds_every_number_and_no_picture(tmp_path):
    path = report().to_json(tmp_path / "report.json", data={"results": seeds()})
    content = json.loads(path.read_text(encoding="utf-8"))
    table = content["sections"][2]["tables"][0]
    row = next(item for item in table["rows"] if item["label"] == "amnesiac")
    assert row["cells"]["forget_accuracy"]["mean"] == pytest.approx(0.1)
    assert row["cells"]["forget_accuracy"]["count"] == 3
    assert content["metadata"] == {"seeds": "3", "lightning-unlearn": __version__}
    assert content["data"]["results"]["amnesiac"][0]["outcome"] == "partly_forgotten"
    assert all("svg" not in figure for section in content["sections"] for figure in section["figures"])
    assert "target 0" in content["sections"][2]["figures"][0]["description"]


def test_json_of_what_is_not_finite_is_still_json(tmp_path):
    table = Table("T", (Column("a"),), (Row("r", {"a": Cell.of([math.nan])}),))
    path = UnlearningReport("T", sections=(Section("S", tables=(table,)),)).to_json(tmp_path / "r.json")
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert content["sections"][0]["tables"][0]["rows"][0]["cells"]["a"]["mean"] == "nan"


@pytest.mark.parametrize("width", [60, 80, 200])
def test_terminal_shows_every_number_at_any_width(width):
    stream = io.StringIO()
    report().print(Console(file=stream, width=width, color_system=None))
    text = stream.getvalue()
    assert "[bold]A[/bold]" in text
    assert "…" not in text, "a cell was cut"
    assert max(map(len, text.splitlines())) <= width
    numbers = ["10 ± 10", "81 ± 1", "97.0 ± 0.0", "0.10 ± 0.00", "60 ± 0", "0.50 ± 0.00", "2.00 ± 1.00"]
    for number in numbers:
        assert number in text
    assert text.count("(continued)") == 0 or width < 200


def test_summary_is_the_verdict_unless_given():
    assert report().summary.startswith("amnesiac: forgotten (2 of 3)")
    assert report(summary="Short.").summary == "Short."


def test_prints_to_standard_output_by_default(capsys):
    UnlearningReport("A title").print()
    assert capsys.readouterr().out.strip() == "A title"
