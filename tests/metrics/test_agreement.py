"""Data that are bad on one process only: every process raises, and none waits for another.

A collective that a process does not come to would end as an error of its own, after a minute, and with another text.
"""

import warnings

import pytest
import torch
from torchmetrics import MeanSquaredError, MetricCollection

from lightning_unlearn import metrics as package
from lightning_unlearn.exceptions import LightningUnlearnError
from lightning_unlearn.metrics import KLOM, KLToReference, LossThresholdAttack, SupportVectorAttack, UnlearningMetrics
from tests.metrics.test_contract import CASES, labels, random, weights

NAN = torch.full((4, 3), torch.nan)
OTHER = {"b.weight": torch.zeros(2)}

# class -> (arguments, keywords) of an update that is refused
BAD = {
    "ActivationDistance": ((random(4, 3), random(4, 5)), {}),
    "AverageGap": ((random(4, 3), labels(3), labels(4)), {"split": "forget"}),
    "BiasRemovalError": ((random(4, 3), labels(3)), {}),
    "DecisionRegionChange": ((random(4, 3), random(5, 3)), {"near": True}),
    "EntropyAttack": ((NAN,), {"split": "retain"}),
    "ForgettingScore": ((random(3, 3), labels(4)), {"group": "unlearned", "model": 90}),
    "InterclassConfusion": ((random(4, 4), labels(4) + 7), {}),
    "JSToReference": ((random(4, 3), random(3, 3)), {}),
    "KLOM": ((random(3, 3), labels(3) + 5), {"group": "unlearned", "model": 90}),
    "KLToReference": ((random(4, 3), random(3, 3)), {}),
    "LogisticAttack": ((NAN[:, 0],), {"split": "forget"}),
    "LossThresholdAttack": ((NAN[:, 0],), {"split": "forget"}),
    "PrivacyRiskScore": ((NAN, labels(4)), {"group": "target"}),
    "SupportVectorAttack": ((NAN, labels(4)), {"split": "forget"}),
    "ThresholdAttack": ((NAN, labels(4)), {"split": "forget"}),
    "TugOfWar": ((random(4, 3), labels(3), labels(4)), {"split": "forget"}),
    "ULiRA": ((random(3, 3), labels(2)), {"group": "retrained", "model": 90}),
    "UnlearningError": ((OTHER, weights(0)), {"lr": 0.1, "steps": 2, "singular_value": 3.0}),
    "UnlearningMetrics": ((random(4, 3), labels(3)), {"split": "forget"}),
    "VerificationError": ((OTHER, weights(0)), {}),
    "ZeroRetrainForgetting": ((random(4, 3), random(4, 5)), {}),
}


def failing(cls, init, updates, bad, by_call):
    """Run inside the pool: what this process is told, and the value after a reset."""
    rank = torch.distributed.get_rank()
    metric, found = cls(**init), None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, (args, kwargs) in enumerate([updates[0], bad, *updates[1:]]):
            if number != 1 or rank == 1:
                value = metric(*args, **kwargs) if by_call else metric.update(*args, **kwargs)
    warned = [str(one.message) for one in caught if "refused an update" in str(one.message)]
    try:
        metric.compute()
    except Exception as error:
        found = error
    metric.reset()
    for args, kwargs in updates if rank else ():
        metric.update(*args, **kwargs)
    return type(found), str(found), warned, metric.compute(), by_call and type(value)


def test_every_metric_has_bad_data():
    assert set(BAD) == set(package.__all__)


@pytest.mark.parametrize("by_call", [False, True], ids=["update", "forward"])
@pytest.mark.parametrize("name", BAD)
def test_both_processes_raise_what_one_was_given(name, by_call, gloo_pool):
    case = CASES[name]
    with pytest.raises((ValueError, RuntimeError)) as alone:
        case.make().update(*BAD[name][0], **BAD[name][1])
    healthy, ill = gloo_pool.run(failing, case.cls, case.init, case.updates, BAD[name], by_call)
    assert ill[:2] == (alone.type, str(alone.value))
    assert issubclass(healthy[0], LightningUnlearnError)
    assert f"updates of {name}" in healthy[1]
    assert "refused on 'process 1'" in healthy[1]
    assert f"{alone.type.__name__}: {alone.value}" in healthy[1]
    assert (len(healthy[2]), len(ill[2])) == (0, 1)
    # Both go on: a reset forgets the refusal, and values are what they would have been.
    expected = case.filled().compute()
    for _, _, _, value, _ in (healthy, ill):
        torch.testing.assert_close(value, expected, equal_nan=True, rtol=1e-6, atol=1e-12)
    if by_call:  # whoever logs the value of a batch gets one of the same form
        assert healthy[4] == ill[4]


def refused_by_call(cls, init, bad):
    metric = cls(**init)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = metric(*bad[0], **bad[1])
    return value, metric._forward_cache


@pytest.mark.parametrize("name", BAD)
def test_a_refused_batch_has_no_value(name, gloo_pool):
    case = CASES[name]
    for value, cache in gloo_pool.run(refused_by_call, case.cls, case.init, BAD[name]):
        assert value == {} if isinstance(value, dict) else value.isnan()
        assert cache is value or torch.equal(cache.isnan(), value.isnan())


def alone_among_others(synchronised):
    metric = KLToReference(sync_on_compute=synchronised)
    try:
        metric.update(random(4, 3), random(3, 3))
    except ValueError:
        return "at once"
    return "later"


@pytest.mark.filterwarnings("ignore:.*refused an update")
def test_where_nobody_waits_it_is_raised_at_once(gloo_pool):
    assert gloo_pool.run(alone_among_others, False) == ["at once", "at once"]
    assert gloo_pool.run(alone_among_others, True) == ["later", "later"]


def different_shapes(metric, arguments):
    args, kwargs = arguments[torch.distributed.get_rank()]
    metric.update(*args, **kwargs)
    try:
        metric.compute()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("metric", "arguments"),
    [
        (
            SupportVectorAttack(feature="probabilities"),
            [((random(4, classes), labels(4) % 2), {"split": "forget"}) for classes in (2, 3)],
        ),
        (
            KLOM(),
            [((random(size, 3), labels(size)), {"group": "unlearned", "model": size}) for size in (4, 5)],
        ),
        (LossThresholdAttack(), [((torch.ones(3),), {"split": "forget"}), ((torch.ones(3),), {"split": "forget"})]),
    ],
    ids=["classes", "samples", "dtype"],
)
def test_states_that_do_not_fit_each_other_are_refused_by_both(gloo_pool, metric, arguments):
    if isinstance(metric, LossThresholdAttack):
        found = gloo_pool.run(other_dtype, metric, arguments)
    else:
        found = gloo_pool.run(different_shapes, metric, arguments)
    assert all("alike on every process" in message for message in found)


def other_dtype(metric, arguments):
    if torch.distributed.get_rank():
        metric.set_dtype(torch.float64)
    return different_shapes(metric, arguments)


def in_a_collection():
    """A collection whose first metric is refused on the second process."""
    collection = MetricCollection({"kl": KLToReference(), "test": UnlearningMetrics(MeanSquaredError())})
    rank = torch.distributed.get_rank()
    collection["test"].update(random(4), random(4), split="test")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collection["kl"].update(random(4, 3), random(4 - rank, 3))
    try:
        collection.compute()
    except Exception as error:
        return type(error).__name__
    return ""


def test_in_a_collection(gloo_pool):
    assert gloo_pool.run(in_a_collection) == ["LightningUnlearnError", "ValueError"]
