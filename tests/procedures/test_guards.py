"""Guards of a pass: what a probe warns of, and what it calls collapsed."""

import math

import pytest
import torch
from torch import nn

from lightning_unlearn.exceptions import LightningUnlearnError, NoEffectWarning
from lightning_unlearn.procedures.guards import (
    ProbeThresholds,
    check_finite,
    judge_probe,
    nonfinite_parameters,
    warn_if_unchanged,
)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ({"accuracy": 0.98}, {"accuracy": 0.975}, "fine"),
        ({"accuracy": 0.98}, {"accuracy": 0.96}, "warn"),
        ({"accuracy": 0.98}, {"accuracy": 0.94}, "warn"),
        ({"accuracy": 0.98}, {"accuracy": 0.93}, "collapsed"),
        ({"accuracy": 0.5}, {"accuracy": 0.9}, "fine"),
        # Accuracy decides where there is one: a loss may grow because confidence fell.
        ({"accuracy": 0.98, "loss": 0.01}, {"accuracy": 0.98, "loss": 3.0}, "fine"),
        ({"loss": 0.1}, {"loss": 0.3}, "fine"),
        ({"loss": 0.1}, {"loss": 0.4}, "warn"),
        ({"loss": 0.1}, {"loss": 1.2}, "collapsed"),
        ({"loss": 100.0}, {"loss": 110.0}, "fine"),
        ({"loss": 100.0}, {"loss": 250.0}, "collapsed"),
        ({"loss": 0.1}, {"loss": math.nan}, "collapsed"),
        ({"accuracy": 0.9, "loss": 0.1}, {"accuracy": 0.9, "loss": math.inf}, "collapsed"),
        ({}, {}, "fine"),
        ({"accuracy": 0.9}, {"loss": 0.1}, "fine"),
    ],
)
def test_judge_probe(before, after, verdict):
    assert judge_probe(before, after) == verdict


def test_thresholds_are_the_users():
    assert judge_probe({"accuracy": 0.9}, {"accuracy": 0.8}, ProbeThresholds(rollback_accuracy=0.2)) == "warn"


def test_finite():
    check_finite({"a": torch.ones(2)}, "Method")
    with pytest.raises(LightningUnlearnError, match=r"Method to be finite.* b"):
        check_finite({"a": torch.ones(2), "b": torch.tensor([1.0, math.inf])}, "Method")
    layer = nn.Linear(2, 2)
    assert nonfinite_parameters(layer) == []
    with torch.no_grad():
        layer.bias[0] = math.nan
    assert nonfinite_parameters(layer) == ["bias"]


def test_unchanged():
    assert not warn_if_unchanged("a", "b", "Method")
    with pytest.warns(NoEffectWarning, match="Method changed no weight"):
        assert warn_if_unchanged("a", "a", "Method")
