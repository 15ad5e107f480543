"""The study of tuned settings against defaults at its smallest."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "examples" / "reproduce"))  # where the script finds its parts

import tuning_study
import tuning_study_tables as tables

pytestmark = pytest.mark.filterwarnings(
    "ignore:You passed in a `val_dataloader`", "ignore:.*changed no weight", "ignore:.*probe.*:UserWarning"
)


def test_tuned_settings_are_measured_on_test_data(tmp_path):
    output = tmp_path / "study"
    count = tuning_study.study("smoke", tmp_path, output, tmp_path / "work", workers=1)
    document = json.loads((tmp_path / "study.json").read_text())
    assert count == len(document["jobs"]) == 12
    for key, job in document["jobs"].items():
        if key.endswith("method="):
            assert [row["what"] for row in job["rows"]] == ["original", "retrained"]
            continue
        default, tuned = job["rows"]
        assert (default["what"], default["trial"], tuned["what"]) == ("default", 0, "tuned")
        assert (
            tuned["tuning_value"] <= default["tuning_value"]
        )  # on what it was chosen by; on test data anything may be
        for row in job["rows"]:
            assert row["value"] == pytest.approx(0.5 * row["goal_error"] + 0.5 * row["test_error"], abs=1e-4)
    page = (tmp_path / "study.md").read_text()
    assert "| L1Sparse |" in page
    assert "(study-digits-privacy.png)" in page
    assert tuning_study.study("smoke", tmp_path, output, tmp_path / "work", workers=1) == 0


def test_what_an_interval_says():
    assert [tables.verdict(*ends) for ends in ((-2, -1), (-1, 1), (1, 2), (0, 0))] == [
        "better", "undecided", "worse", "undecided",
    ]  # fmt: skip
