"""The sanity table of the metrics: its rule on numbers made by hand, its page, and a small run on digits."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_unlearn import metrics

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rule():
    spec = importlib.util.spec_from_file_location("sanity_rule", ROOT / "examples" / "sanity_rule.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


UNIT = [1.0, -1.0, 1.0, -1.0]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("original", "second", "finding"),
    [
        (3.0, 1.0, "separable"),
        (2.99, 1.0, "unclear"),
        (2.01, 1.0, "unclear"),
        (2.0, 1.0, "not separable"),
        (0.0, 0.0, "not separable"),
        (3.0, 2.0, "separable"),
        (3.0, 2.01, "unstable"),
        (0.0, 2.01, "unstable"),
    ],
)
def test_the_rule_on_both_sides_of_its_thresholds(rule, original, second, finding, sign):
    verdict = rule.judge([sign * original] * 4, [-sign * second] * 4, UNIT)
    assert (verdict.spread, verdict.separation, verdict.closeness) == (1.0, original, second)
    assert verdict.finding == finding


def test_the_rule_knows_no_unit_and_does_not_let_signs_cancel(rule):
    small, large = (rule.judge([4e-6, -4e-6], [1e-6], [1e-6]), rule.judge([4e6, -4e6], [1e6], [1e6]))
    assert small.separation == pytest.approx(4.0) == large.separation
    assert small.finding == large.finding == "separable"


def test_retrained_models_that_agree_to_the_last_digit_give_no_infinite_number(rule):
    verdict = rule.judge([1.0], [0.0], [0.0])
    assert (verdict.separation, verdict.closeness, verdict.finding) == (rule.CAP, 0.0, "separable")
    assert rule.judge([0.0], [0.0], [0.0]).finding == "not separable"
    assert rule.judge([1.0], [1e-9], [0.0]).finding == "unstable"


@pytest.mark.parametrize("empty", range(3))
def test_the_rule_wants_deviations_of_every_kind(rule, empty):
    given = [[1.0], [1.0], [1.0]]
    given[empty] = []
    with pytest.raises(ValueError, match="at least one deviation"):
        rule.judge(*given)


def test_the_page_has_one_row_for_every_metric():
    by_hand = (ROOT / "docs" / "metrics.md").read_text().split("<!--")[0]
    rows = re.findall(r"^\| `(\w+)` \|", by_hand, flags=re.MULTILINE)
    assert sorted(rows) == sorted(metrics.__all__), "give it a row in docs/metrics.md"


@pytest.mark.slow
def test_a_quick_run_judges_every_metric_and_keeps_its_models(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("By hand.\n\n<!-- Below this line: written by examples/metric_sanity.py -->\nOld.\n")
    command = [sys.executable, str(ROOT / "examples" / "metric_sanity.py"), "--quick", "--page", str(page)]
    for _ in range(2):  # the second run finds every model, and writes the same
        run = [*command, "--output", str(tmp_path / "out.json"), "--runs", str(tmp_path / "runs")]
        done = subprocess.run(run, capture_output=True, text=True, check=False)  # noqa: S603
        assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["metric"] for row in rows} == set(metrics.__all__)
    assert {(row["dataset"], row["scenario"]) for row in rows} == {
        ("digits", name) for name in ("mislabelled", "class", "random")
    }
    assert len(rows) == 3 * len(metrics.__all__)
    judged = {(row["metric"], row["scenario"]): row for row in rows if "finding" in row}
    assert {row["metric"] for row in rows} - {name for name, _ in judged} == {"UnlearningError"}
    for row in judged.values():
        assert row["sane"] == (row["finding"] == row["expected"])
        assert set(row["deviations"]) == {"original", "second", "third", "FineTune", "NegGradPlus", "ScrubR"}
    # A class that was left out is never answered, one that was not is: nothing is as plain as this.
    plain = judged["UnlearningMetrics", "class"]
    assert plain["finding"] == "separable"
    assert plain["reference"] < 0.01
    assert min(plain["deviations"]["original"]) > 0.5
    text = page.read_text()
    assert text.startswith("By hand.")
    assert "Old." not in text
    assert all(f"`{name}`" in text for name in metrics.__all__)
