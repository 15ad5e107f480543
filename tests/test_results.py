"""Results as plain data."""

import dataclasses
import enum
import json
import math
from pathlib import Path

import pytest
import torch

from lightning_unlearn.results import EvaluationResult, MetricValue, StageResult, to_dict


class Colour(enum.IntEnum):
    RED = 3


def evaluation(**changes):
    row = MetricValue(
        "forget_accuracy", "Accuracy", "unlearned", "forget", 0.1, 0.0, 0.1, "retrained", 0.05, "0.1 above."
    )
    other = dataclasses.replace(row, model="original", value=math.nan)
    result = EvaluationResult((row, other), ("original", "unlearned"), {"forget": 20}, True, "forgotten", "Forgotten.")
    return dataclasses.replace(result, **changes)


def test_everything_becomes_plain_json():
    stage = StageResult("amnesiac", 0.5, 20, {"accuracy": 0.99}, {"accuracy": math.inf}, 0.1)
    value = to_dict({"stage": stage, "set": {1}, "path": Path("a/b"), "enum": Colour.RED, "none": None, "yes": True})
    assert json.loads(json.dumps(value, allow_nan=False)) == {
        "stage": {
            "name": "amnesiac",
            "seconds": 0.5,
            "steps": 20,
            "probe_before": {"accuracy": 0.99},
            "probe_after": {"accuracy": "inf"},
            "relative_change": 0.1,
        },
        "set": [1],
        "path": "a/b",
        "enum": 3,
        "none": None,
        "yes": True,
    }


def test_what_is_no_plain_data_is_refused():
    with pytest.raises(TypeError, match="Tensor"):
        to_dict({"a": torch.zeros(1)})


def test_rows_are_found_by_name_and_model():
    result = evaluation()
    assert result.value("forget_accuracy") == 0.1
    assert math.isnan(result.value("forget_accuracy", "original"))
    assert set(result.row("forget_accuracy")) == {"original", "unlearned"}
    assert result.metrics() == {"forget_accuracy": "Accuracy"}
    with pytest.raises(KeyError, match="forget_accuracy, but got 'mia'"):
        result.value("mia")
    assert result.to_dict()["rows"][1]["value"] == "nan"


def test_results_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        evaluation().outcome = "forgotten"
