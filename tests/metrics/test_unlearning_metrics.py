"""Routing by split, the base metric, and what is refused."""

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, recall_score
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_unlearn.metrics import UnlearningMetrics

PREDS, TARGET = torch.tensor([0, 1, 2, 2, 1]), torch.tensor([0, 2, 2, 0, 1])


def test_accuracy_is_the_share_of_right_answers_per_split():
    metric = UnlearningMetrics(num_classes=3)
    metric.update(PREDS, TARGET, split="forget")
    metric.update(PREDS[:2], TARGET[:2], split="retain")
    metric.update(PREDS[2:], TARGET[2:], split="retain")
    metric.update(TARGET, TARGET, split="test")
    value = metric.compute()
    assert list(value) == ["forget_accuracy", "retain_accuracy", "test_accuracy"]
    expected = accuracy_score(TARGET, PREDS)
    assert value["forget_accuracy"].item() == value["retain_accuracy"].item() == pytest.approx(expected)
    assert value["test_accuracy"].item() == 1


def test_only_splits_that_were_seen_are_in_the_result():
    metric = UnlearningMetrics(num_classes=3)
    metric.update(PREDS, TARGET, split="test")
    assert list(metric.compute()) == ["test_accuracy"]
    metric.reset()
    metric.update(PREDS, TARGET, split="forget")
    assert list(metric.compute()) == ["forget_accuracy"]


def test_before_the_first_update_there_is_a_warning_and_no_number():
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert UnlearningMetrics(num_classes=3).compute() == {}


def test_dataloader_index_follows_the_declared_order():
    metric = UnlearningMetrics(num_classes=3, splits=("test", "forget"))
    metric.update(TARGET, TARGET, dataloader_idx=0)
    metric.update(PREDS, TARGET, dataloader_idx=1)
    assert {key: value.item() for key, value in metric.compute().items()} == {
        "test_accuracy": 1.0,
        "forget_accuracy": pytest.approx(0.6),
    }


def test_any_metric_is_a_base_and_is_left_alone():
    base = MulticlassF1Score(num_classes=3, average="macro")
    base.update(PREDS, TARGET)
    metric = UnlearningMetrics(base)
    metric.update(TARGET, TARGET, split="retain")
    metric.update(PREDS, TARGET, split="forget")
    value = metric.compute()
    assert value["retain_multiclass_f1_score"].item() == 1
    assert value["forget_multiclass_f1_score"].item() == pytest.approx(f1_score(TARGET, PREDS, average="macro"))
    assert base.update_count == 1


def test_direction_is_the_base_metrics():
    assert UnlearningMetrics(num_classes=3).higher_is_better is True
    assert UnlearningMetrics(MeanSquaredError()).higher_is_better is False
    assert UnlearningMetrics.target == "retrained"


def test_multilabel_binary_and_own_name():
    multilabel = UnlearningMetrics(task="multilabel", num_labels=2, name="hits")
    multilabel.update(torch.tensor([[1, 0], [1, 1]]), torch.tensor([[1, 1], [1, 1]]), split="forget")
    assert multilabel.compute()["forget_hits"].item() == 0.75
    binary = UnlearningMetrics(task="binary")
    binary.update(torch.tensor([0.9, 0.2]), torch.tensor([1, 1]), split="test")
    assert binary.compute()["test_accuracy"].item() == 0.5


def test_forward_returns_the_batch_and_keeps_the_total():
    metric = UnlearningMetrics(num_classes=3)
    assert metric(PREDS[:1], TARGET[:1], split="forget")["forget_accuracy"].item() == 1
    assert metric(PREDS[1:2], TARGET[1:2], split="forget")["forget_accuracy"].item() == 0
    assert metric.compute()["forget_accuracy"].item() == 0.5
    assert metric.update_count == 2


def test_works_in_a_collection_and_merges_splits_seen_by_one_side_only():
    collection = MetricCollection([UnlearningMetrics(num_classes=3)])
    collection.update(PREDS, TARGET, split="forget")
    assert collection.compute()["forget_accuracy"].item() == pytest.approx(0.6)
    left, right = UnlearningMetrics(num_classes=3), UnlearningMetrics(num_classes=3)
    left.update(PREDS, TARGET, split="forget")
    right.update(TARGET, TARGET, split="forget")
    right.update(PREDS, TARGET, split="test")
    left.merge_state(right)
    assert left.compute()["forget_accuracy"].item() == pytest.approx(0.8)
    assert left.compute()["test_accuracy"].item() == pytest.approx(0.6)
    left.update(TARGET, TARGET, split="test")
    assert right.compute()["test_accuracy"].item() == pytest.approx(0.6)
    with pytest.raises(ValueError, match="incoming_state"):
        left.merge_state(UnlearningMetrics(num_classes=3, splits=("test",)))


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({}, "exactly one"),
        ({"split": "test", "dataloader_idx": 2}, "exactly one"),
        ({"split": "train"}, "'forget', 'retain', 'test'"),
        ({"dataloader_idx": 3}, "dataloader_idx"),
        ({"dataloader_idx": -1}, "dataloader_idx"),
    ],
)
def test_refuses_updates_without_a_clear_split(keywords, match):
    metric = UnlearningMetrics(num_classes=3)
    with pytest.raises(ValueError, match=match):
        metric.update(PREDS, TARGET, **keywords)
    with pytest.raises(ValueError, match=match):
        metric(PREDS, TARGET, **keywords)
    assert metric.updates.sum() == 0


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({}, "num_classes"),
        ({"task": "multilabel"}, "num_labels"),
        ({"task": "ranking"}, "task"),
        ({"num_classes": 3, "splits": ("forget", "forget")}, "splits"),
        ({"num_classes": 3, "splits": ("train",)}, "splits"),
        ({"num_classes": 3, "splits": ()}, "splits"),
    ],
)
def test_refuses_unclear_construction(keywords, match):
    with pytest.raises(ValueError, match=match):
        UnlearningMetrics(**keywords)


def test_micro_accuracy_is_not_the_mean_over_classes():
    preds, target = torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1])
    metric, macro = UnlearningMetrics(num_classes=2), MulticlassAccuracy(num_classes=2, average="macro")
    metric.update(preds, target, split="test")
    assert metric.compute()["test_accuracy"].item() == 0.75
    assert macro(preds, target).item() == 0.5


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_missing_classes_and_a_small_last_batch_are_those_of_the_whole(average):
    """Class 3 is in no target, class 0 only in the first batch; the last batch has one sample."""
    preds, targets = torch.randint(5, (21,)), torch.cat([torch.zeros(4).long(), torch.randint(1, 3, (17,))])
    metric = UnlearningMetrics(MulticlassAccuracy(num_classes=5, average=average), name="score")
    for batch in torch.arange(21).split(4):
        metric.update(preds[batch], targets[batch], split="forget")
    known = sorted({*preds.tolist(), *targets.tolist()})
    expected = recall_score(targets, preds, labels=known, average=average, zero_division=0)
    assert metric.compute()["forget_score"].item() == pytest.approx(expected)


def test_an_empty_batch_is_no_update():
    metric = UnlearningMetrics(num_classes=3)
    metric.update(PREDS[:0], TARGET[:0], split="retain")
    assert metric(PREDS[:0], TARGET[:0], split="test") == {}
    metric.update(PREDS, TARGET, split="forget")
    assert list(metric.compute()) == ["forget_accuracy"]
    with pytest.raises(ValueError, match="exactly one"):
        metric.update(PREDS[:0], TARGET[:0])
