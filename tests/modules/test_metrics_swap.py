import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric, MetricCollection, SumMetric

from lightning_unlearn.modules.metrics_swap import MetricCopies


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = MeanMetric()
        self.inner = nn.Module()
        self.inner.group = MetricCollection({"sum": SumMetric(), "mean": MeanMetric()})
        self.many = nn.ModuleList([SumMetric(), SumMetric()])
        self.alias = self.mean

    def update(self, value):
        self.mean.update(value)
        self.inner.group.update(value)
        self.many[1].update(value)


def totals(module):
    return (
        float(module.mean.mean_value),
        float(module.inner.group["sum"].sum_value),
        float(module.many[1].sum_value),
    )


def originals(module):
    return [item for item in module.modules() if isinstance(item, (MeanMetric, SumMetric))]


def test_copies_count_apart_and_originals_come_back():
    module, copies = Nested(), MetricCopies()
    kept = originals(module)
    module.update(1.0)
    for _ in range(2):
        with copies.in_place(module):
            assert module.alias is module.mean
            module.update(10.0)
            inside = totals(module)
    assert inside == (20.0, 20.0, 20.0)  # the copies went on counting
    assert totals(module) == (1.0, 1.0, 1.0)
    assert originals(module) == kept


def test_reset_empties_the_copies_only():
    module, copies = Nested(), MetricCopies()
    module.update(1.0)
    with copies.in_place(module):
        module.update(10.0)
    copies.reset()
    with copies.in_place(module):
        assert totals(module) == (0.0, 0.0, 0.0)
    assert totals(module) == (1.0, 1.0, 1.0)


def test_copies_start_empty_and_leave_after_an_exception():
    module, copies = Nested(), MetricCopies()
    module.update(5.0)
    original = module.mean
    with copies.in_place(module):
        assert totals(module) == (0.0, 0.0, 0.0)
    with pytest.raises(ZeroDivisionError), copies.in_place(module):
        module.update(1 / 0)
    assert module.mean is original


def test_names_in_the_state_dict_stay():
    module = Nested()
    module.mean.persistent(True)
    names = list(module.state_dict())
    with MetricCopies().in_place(module):
        assert list(module.state_dict()) == names
    assert torch.equal(module.state_dict()[names[0]], torch.zeros(()))
