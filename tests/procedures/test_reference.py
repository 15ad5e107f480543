"""Losses before a pass: whether held-out data say where a model may be pushed to, and what counts as damage."""

import math

import pytest
import torch
from lightning import LightningModule
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.modules.probe import ProbeData
from lightning_unlearn.procedures.reference import HeldOutReference, held_out_reference, whole_classes
from lightning_unlearn.utilities.batch_adapter import BatchAdapter

ADAPTER = BatchAdapter()


class Regressor(LightningModule):
    """Predicts zero; its loss is the mean square of the targets, whose sizes a test chooses."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x * self.weight

    def training_step(self, batch, batch_idx):
        return functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def losses(*values, batch_size=5):
    """A loader whose samples have these losses under a `Regressor`."""
    y = torch.tensor(values, dtype=torch.float32).sqrt().unsqueeze(1)
    return DataLoader(TensorDataset(torch.ones_like(y), y), batch_size)


def classes(*labels, batch_size=3):
    return DataLoader(TensorDataset(torch.zeros(len(labels), 1), torch.tensor(labels)), batch_size)


def before(forget, held_out, retain):
    return held_out_reference(Regressor(), ProbeData(forget), ProbeData(held_out), ProbeData(retain), ADAPTER)


def test_losses_are_means_over_the_samples():
    found = before(losses(1, 2, 3, 4, 5, 6), losses(8.0, 9.0), losses(0.5, 0.25, 0.0))
    assert (found.forget, found.held_out, found.retain) == pytest.approx((3.5, 8.5, 0.25))
    assert found.is_target


def test_groups_are_means_of_so_many_and_the_rest_is_left_out():
    found = ProbeData(losses(*range(11), batch_size=7)).group_losses(Regressor(), 4)
    assert found == pytest.approx([1.5, 5.5])


def test_loaders_that_give_whole_batches_are_taken_as_they_are():
    batches = [(torch.ones(2, 1), torch.full((2, 1), value)) for value in (1.0, 2.0, 3.0)]
    assert ProbeData(DataLoader(batches, batch_size=None)).group_losses(Regressor(), 4) == pytest.approx([1, 4, 9])


def test_two_looks_see_the_same_samples_however_they_are_augmented():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return torch.ones(1), torch.randn(1)

    data = ProbeData(DataLoader(Noisy(), 4))
    assert data.mean_loss(Regressor()) == data.mean_loss(Regressor())


HELD_OUT = [1 + 0.01 * i for i in range(120)]


@pytest.mark.parametrize(
    ("forget", "above"),
    [
        ([9.0 + i for i in range(8)], True),  # every group of theirs above every group of the others
        ([9.0], True),  # a single sample, above each of many
        ([1.6] * 8, False),  # in the middle
        ([1.0] * 7 + [20.0], False),  # one outlier lifts the mean, not the ranks
        ([0.5] * 8, False),
    ],
)
def test_what_lies_above_held_out_data_is_told_from_an_outlier(forget, above):
    found = before(losses(*forget), losses(*HELD_OUT), losses(0.1, 0.2))
    assert found.above is above
    assert found.is_target is not above


def test_a_module_without_a_loss_has_no_reference():
    class Manual(Regressor):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    data = ProbeData(losses(1.0))
    assert held_out_reference(Manual(), data, data, data, ADAPTER) is None


def test_whole_classes():
    assert whole_classes(ADAPTER, classes(3, 3, 5), classes(0, 1, 2, 4))
    assert not whole_classes(ADAPTER, classes(3, 3, 5), classes(0, 1, 2, 4, 5))
    assert not whole_classes(ADAPTER, losses(1.0), losses(2.0))  # numbers are no classes
    boxes = DataLoader([{"image": torch.zeros(2), "mask": torch.zeros(2)}] * 2, 2)
    assert not whole_classes(ADAPTER, boxes, boxes)  # an adapter that cannot read them does not know
    pixels = DataLoader(TensorDataset(torch.zeros(2, 1, 4), torch.zeros(2, 4, dtype=torch.long)), 2)
    assert not whole_classes(ADAPTER, pixels, pixels)


def test_one_sample_of_many_classes_is_no_whole_class():
    one, rest = DataLoader([(0, 7)]), DataLoader([(0, place % 1000) for place in range(5000)], 100)
    missed = [place for place in range(1000) if whole_classes(BatchAdapter(), DataLoader([(0, place)]), rest)]
    assert missed == []
    assert whole_classes(BatchAdapter(), one, DataLoader([(0, 8)] * 50, 10))


def test_whole_classes_are_no_target_even_where_their_loss_is_low():
    class Classifier(Regressor):
        def training_step(self, batch, batch_idx):
            return self.weight.square().sum() + float(batch[1].float().mean())

    data = [ProbeData(classes(*labels)) for labels in ((1, 1), (2, 3, 1), (2, 3))]
    found = held_out_reference(Classifier(), *data, ADAPTER)
    assert found.whole_classes
    assert not found.is_target


@pytest.mark.parametrize(
    ("retain", "held_out", "damaged"),
    [
        (0.1, 0.5, None),
        (0.3, 0.75, None),  # both at their limits: half-way from 0.1 to 0.5, half above 0.5
        (0.31, 0.5, "keep"),
        (0.1, 0.76, "held-out"),
        (math.nan, 0.5, "keep"),
        (0.1, math.inf, "held-out"),
    ],
)
def test_damage(retain, held_out, damaged):
    found = HeldOutReference(forget=0.0, held_out=0.5, retain=0.1).damage(retain, held_out)
    assert found is None if damaged is None else damaged in found


def test_damage_where_losses_are_alike_or_negative():
    alike = HeldOutReference(forget=0.0, held_out=1.0, retain=1.0)
    assert (alike.damage(1.5, 1.5), alike.damage(1.51, 1.0)) == (None, alike.damage(1.51, 1.0))
    assert alike.damage(1.51, 1.0) is not None
    negative = HeldOutReference(forget=-3.0, held_out=-2.0, retain=-4.0)
    assert negative.damage(-2.0, -1.0) is None
    assert negative.damage(-1.9, -2.0) is not None
    assert negative.damage(-4.0, -0.9) is not None
    around_zero = HeldOutReference(forget=-1.0, held_out=0.01, retain=-1.0)
    assert around_zero.damage(-1.0, 0.5) is None
    assert around_zero.damage(-1.0, 0.53) is not None


def test_held_out_data_have_the_classes_that_go_so_they_may_get_worse():
    classes_go = HeldOutReference(forget=0.0, held_out=0.5, retain=0.1, whole_classes=True)
    assert classes_go.damage(0.1, 9.0) is None
    assert classes_go.damage(0.4, 0.5) is not None
