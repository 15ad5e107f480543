"""ToW and the average gap as metrics: the functions of the accuracies, whatever the batches."""

import pytest
import torch
from sklearn.metrics import accuracy_score

from lightning_unlearn.functional.score_gaps import SplitScores, average_gap, tug_of_war
from lightning_unlearn.metrics import AverageGap, TugOfWar

METRICS = {TugOfWar: tug_of_war, AverageGap: average_gap}
SPLITS = ("forget", "retain", "test")


def answers(split):
    """Uneven sizes, two classes out of five missing from the forget set."""
    generator = torch.Generator().manual_seed(SPLITS.index(split))
    targets = torch.randint(3 if split == "forget" else 5, (17 + 10 * SPLITS.index(split),), generator=generator)
    left, right = (torch.randn(len(targets), 5, generator=generator) for _ in range(2))
    return left, right + 2 * torch.nn.functional.one_hot(targets, 5), targets


def fill(metric, split):
    batches = zip(*(part.split(8) for part in answers(split)), strict=True)
    for left, right, targets in batches:
        metric.update(left, right, targets, split=split)


@pytest.mark.parametrize("cls", METRICS)
def test_the_metric_is_the_function_of_the_accuracies(cls):
    metric = cls()
    sides = []
    for split in SPLITS:
        fill(metric, split)
        left, right, targets = answers(split)
        sides.append([accuracy_score(targets, side.argmax(1)) for side in (left, right)])
    unlearned, retrained = (SplitScores(*(pair[side] for pair in sides)) for side in (0, 1))
    assert metric.compute().dtype == torch.float64
    assert metric.compute().item() == pytest.approx(METRICS[cls](unlearned, retrained), rel=1e-14)


@pytest.mark.parametrize(("cls", "best"), [(TugOfWar, 1), (AverageGap, 0)])
def test_a_model_against_itself_is_at_the_best_value(cls, best):
    metric = cls()
    for split in SPLITS:
        left, _, targets = answers(split)
        metric.update(left, left.argmax(1), targets, split=split)
    assert metric.compute().item() == best


@pytest.mark.parametrize("cls", METRICS)
def test_there_is_no_number_before_all_three_splits_were_seen(cls):
    metric = cls()
    for split in ("forget", "test"):
        fill(metric, split)
        assert metric.compute().isnan()
    fill(metric, "retain")
    assert metric.compute().isfinite()


@pytest.mark.parametrize(
    ("sizes", "split", "match"),
    [
        ((3, 3, 3), "train", "'forget', 'retain', 'test'"),
        ((3, 2, 3), "test", "of the same samples"),
        ((3, 3, 1), "test", "of the same samples"),
    ],
)
def test_a_refused_update_leaves_nothing_behind(sizes, split, match):
    metric = TugOfWar()
    with pytest.raises(ValueError, match=match):
        metric.update(*(torch.zeros(size, dtype=torch.long) for size in sizes), split=split)
    assert metric.samples.sum() == metric.correct.sum() == 0


def test_soft_targets_are_refused():
    with pytest.raises(ValueError, match="targets"):
        TugOfWar().update(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), split="test")
