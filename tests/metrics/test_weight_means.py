"""Means over models: by layer, relative, with buffers, and what must be refused."""

import copy

import matplotlib as mpl
import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from lightning_unlearn.functional.unlearning_error import unlearning_error
from lightning_unlearn.functional.weight_distance import verification_error
from lightning_unlearn.metrics import UnlearningError, VerificationError
from tests.helpers.models import AwkwardNet

RUN = {"lr": 0.1, "steps": 5, "singular_value": 2.0}


def models(count=3):
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        found.append(AwkwardNet())
        found[-1].norm.running_mean += seed
    return found


def filled(metric, pairs, **run):
    for pair in pairs:
        metric.update(*pair, **run)
    return metric


def test_layers_are_means_of_each_layer_in_the_order_asked_for():
    a, b, start = models()
    layers = ["head.bias", "scale", "inp.weight"]
    pairs = [(a, b), (b, start)]
    found = filled(VerificationError(layers=layers), pairs).compute()
    singles = [verification_error(*pair, per_layer=True) for pair in pairs]
    assert list(found) == layers
    for name in layers:
        assert found[name] == (singles[0][name] + singles[1][name]) / 2
        assert found[name].shape == ()
    runs = filled(UnlearningError(layers=layers), pairs, **RUN).compute()
    singles = [unlearning_error(*pair, per_layer=True, **RUN) for pair in pairs]
    assert runs == {name: (singles[0][name] + singles[1][name]) / 2 for name in layers}


def test_all_layers_together_give_the_whole():
    a, b, start = models()
    names = [name for name, _ in a.named_parameters()]
    for whole, parts, run in (
        (VerificationError(relative_to=start), VerificationError(relative_to=start, layers=names), {}),
        (UnlearningError(relative=True), UnlearningError(relative=True, layers=names), RUN),
    ):
        value = filled(whole, [(a, b)], **run).compute()
        layers = filled(parts, [(a, b)], **run).compute()
        torch.testing.assert_close(torch.stack(list(layers.values())).square().sum().sqrt(), value)


def test_the_policy_of_buffers_is_the_functions():
    a, b, start = models()
    layers = ["norm.running_mean"]
    for policy in ("ignore", "include"):
        metric = filled(VerificationError(relative_to=start, buffers=policy), [(a, b)])
        assert metric.compute() == verification_error(a, b, relative_to=start, buffers=policy)
        metric = filled(UnlearningError(buffers=policy), [(a, b)], **RUN)
        assert metric.compute() == unlearning_error(a, b, buffers=policy, **RUN)
    found = filled(VerificationError(buffers="include", layers=layers), [(a, b)]).compute()
    assert found["norm.running_mean"].item() == pytest.approx(8**0.5)
    with pytest.raises(ValueError, match=r"`layers`.*running_mean"):
        VerificationError(layers=layers).update(a, b)


def test_a_metric_stays_a_module_without_the_models_it_was_given():
    start = nn.Linear(2, 2)
    metric = VerificationError(relative_to=start, buffers="include")
    assert not list(metric.parameters())
    assert not list(metric.buffers())
    assert not list(metric.children())


@pytest.mark.parametrize("layers", [[], ["w", "w"], "weight"])
def test_refuses_layers_that_are_no_names(layers):
    for metric in (VerificationError, UnlearningError):
        with pytest.raises(ValueError, match="`layers`"):
            metric(layers=layers)


def test_refuses_an_unknown_layer_and_then_counts_nothing():
    a, b, _ = models()
    metric = UnlearningError(layers=["scale", "neck.weight"])
    with pytest.raises(ValueError, match=r"\['neck.weight'\]"):
        metric.update(a, b, **RUN)
    assert metric.pairs == 0
    with pytest.raises(ValueError, match="`buffers`"):
        UnlearningError(buffers="all")


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_before_the_first_update_there_is_no_number():
    assert VerificationError().compute().isnan()
    assert all(value.isnan() for value in UnlearningError(layers=["a", "b"]).compute().values())


def test_several_values_are_plotted_as_a_series():
    mpl.use("agg")
    a, b, start = models()
    metric = VerificationError(layers=["scale", "head.bias"])
    values = [metric(*pair) for pair in ((a, b), (a, start), (b, start))]
    _, axes = metric.plot(values)
    assert [len(line.get_ydata()) for line in axes.lines] == [3, 3]
    mpl.pyplot.close("all")


def test_metrics_of_one_collection_share_nothing():
    a, b, _ = models()
    whole, layers = VerificationError(), VerificationError(layers=["scale"])
    collection = MetricCollection({"whole": whole, "layers": layers})
    for _ in range(2):
        collection.update(a, copy.deepcopy(b))
    found = collection.compute()
    assert found["whole"] == verification_error(a, b)
    assert found["scale"] == (a.scale - b.scale).abs().double()
