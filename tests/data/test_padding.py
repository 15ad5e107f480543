"""Samples that a distributed sampler repeats count once, in a plain loop and in a Trainer's own loaders."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from sklearn.metrics import recall_score
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_unlearn.data.padding import own_samples
from lightning_unlearn.metrics import UnlearningMetrics


def drawn(loader):
    return [(batch, own_samples(loader, number, len(batch))) for number, batch in enumerate(loader)]


@given(st.integers(1, 23), st.integers(1, 6), st.integers(1, 5), st.booleans())
def test_over_all_processes_every_sample_counts_once(length, world, batch_size, shuffle):
    seen, repeated = [], 0
    for rank in range(world):
        sampler = DistributedSampler(range(length), world, rank, shuffle=shuffle, seed=length)
        for batch, own in drawn(DataLoader(range(length), batch_size, sampler=sampler)):
            seen += batch[own].tolist()
            repeated += int((~own).sum())
    assert sorted(seen) == list(range(length))
    assert repeated == -length % world


@pytest.mark.parametrize("cls", [DistributedSampler, UnrepeatedDistributedSampler])
def test_samplers_that_repeat_nothing_are_left_whole(cls):
    for rank in (0, 1):
        keywords = {"drop_last": True} if cls is DistributedSampler else {}
        sampler = cls(range(7), 2, rank, shuffle=False, **keywords)
        assert all(own.all() for _, own in drawn(DataLoader(range(7), 3, sampler=sampler)))
    assert all(own.all() for _, own in drawn(DataLoader(range(7), 3, shuffle=True)))


def test_refuses_batches_whose_place_is_not_known():
    sampler = DistributedSampler(range(5), 2, 0)
    with pytest.raises(ValueError, match="batch size"):
        own_samples(DataLoader(range(5), batch_size=None, sampler=sampler), 0, 1)
    with pytest.raises(ValueError, match="a batch sampler"):
        own_samples(DataLoader(range(5), batch_sampler=BatchSampler(sampler, 2, False)), 0, 2)
    loader = DataLoader(range(5), batch_size=2, sampler=sampler)
    with pytest.raises(ValueError, match="within the 3 samples"):
        own_samples(loader, 2, 2)
    with pytest.raises(ValueError, match="batch_idx"):
        own_samples(loader, -1, 2)


INPUTS = torch.arange(7)
LABELS = torch.tensor([0, 1, 0, 1, 1, 1, 1])
ANSWERS = torch.tensor([0, 2, 1, 0, 1, 2, 0])
"""Two processes evaluate the first sample twice, or the last one in reversed order; class 2 has no sample."""

# torchmetrics takes a class that was only predicted for one with a recall of 0; scikit-learn does where it is named.
BASES = {"micro": None, "macro": MulticlassAccuracy(num_classes=3, average="macro")}


class Backwards(Sampler):
    """A sampler of the user's own, which the Trainer wraps."""

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return iter(range(self.length - 1, -1, -1))

    def __len__(self):
        return self.length


class Evaluated(LightningModule):
    """Answers by a table, and keeps the metric with and without repeated samples."""

    def __init__(self, base):
        super().__init__()
        self.plain, self.metric = (UnlearningMetrics(base, num_classes=3, name="score") for _ in range(2))
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def test_step(self, batch, batch_idx):
        x, y = batch
        own = own_samples(self.trainer.test_dataloaders, batch_idx, len(y))
        self.plain.update(ANSWERS[x], y, split="test")
        self.metric.update(ANSWERS[x][own], y[own], split="test")


def scores_of_two(kind, batch_size, backwards):
    """Run inside the pool: a Trainer's own evaluation in two processes."""
    module = Evaluated(BASES[kind])
    sampler = Backwards(len(INPUTS)) if backwards else None
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.test(module, DataLoader(TensorDataset(INPUTS, LABELS), batch_size, sampler=sampler), verbose=False)
    values = [metric.compute()["test_score"].item() for metric in (module.metric, module.plain)]
    return *values, type(trainer.test_dataloaders.sampler).__name__


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "batch_size", "backwards"), [("micro", 3, False), ("macro", 1, False), ("macro", 3, True)]
)
def test_a_trainer_in_two_processes_gives_the_value_of_one(gloo_pool, kind, batch_size, backwards):
    expected = recall_score(LABELS, ANSWERS, labels=[0, 1, 2], average=kind, zero_division=0)
    for value, plain, sampler in gloo_pool.run(scores_of_two, kind, batch_size, backwards):
        assert value == pytest.approx(expected)
        assert plain != pytest.approx(expected), "a sample counts twice, which this is about"
        assert "Distributed" in sampler, "the Trainer's own sampler"
