"""Training on drawn labels: against a plain loop, and what is drawn for whom."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.api import unlearn
from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.methods import CEFineTune, FineTune, ICEFineTune, LabelFlipping, PushingMethod
from lightning_unlearn.utilities.batch_adapter import BatchAdapter
from tests.methods.passes import (
    FORGET,
    Answering,
    Drawn,
    answers_without_statistics,
    assert_close,
    cross_entropy,
    plain,
    run,
)
from tests.modules.cases import CLASSES, FEATURES, dataset, same, weights


def twin(model, seen, drawn, retain_weight, forget_weight, lr):
    def loss(module, batch, step):
        kept = cross_entropy(module, batch["retain"])
        taught = functional.cross_entropy(answers_without_statistics(module, batch["forget"][0]), drawn[step])
        return retain_weight * kept + forget_weight * taught

    return plain(model, seen.batches, loss, lr)


@pytest.mark.parametrize(
    ("method", "retain_weight", "forget_weight"),
    [
        (LabelFlipping(max_steps=9), 0.95, 0.05),
        (LabelFlipping(max_steps=9, retain_weight=0.3, labels="any"), 0.3, 0.7),
        (CEFineTune(max_steps=9, alpha=0.2, lr_scale=0.1), 0.2, 1.0),
        (ICEFineTune(max_steps=9, alpha=0.2), 1.0, 0.2),
    ],
    ids=["flip", "weighted", "ce", "ice"],
)
def test_the_pass_is_a_plain_loop_over_its_batches_and_labels(method, retain_weight, forget_weight):
    model, drawn = Answering(), Drawn()
    module, seen = run(method, model, adapter=drawn)
    assert len(drawn.drawn) == len(seen.batches) == 9
    assert_close(module, twin(model, seen, drawn.drawn, retain_weight, forget_weight, model.hparams.lr / 10))
    assert isinstance(method, PushingMethod)
    assert method.stop == "held_out"


def test_at_equal_weights_all_forms_are_one():
    settings = {"max_steps": 6, "lr_scale": 0.25}
    even, _ = run(LabelFlipping(retain_weight=0.5, max_steps=6, lr_scale=0.5))
    exchanged, _ = run(ICEFineTune(alpha=1.0, **settings))
    assert same(weights(exchanged), weights(run(CEFineTune(alpha=1.0, **settings))[0]))
    assert same(weights(exchanged), weights(even))  # half the loss at twice the rate, all powers of two
    assert not same(
        weights(run(CEFineTune(alpha=0.3, **settings))[0]), weights(run(ICEFineTune(alpha=0.3, **settings))[0])
    )


def test_with_the_whole_weight_on_the_retain_part_it_is_fine_tuning():
    tuned, _ = run(FineTune(max_steps=6, lr_scale=0.1))
    assert same(weights(tuned), weights(run(LabelFlipping(max_steps=6, retain_weight=1.0))[0]))
    assert not same(weights(tuned), weights(run(LabelFlipping(max_steps=6))[0]))


@pytest.mark.parametrize("draw", ["batch", "sample"])
def test_wrong_is_never_true_and_any_may_be(draw):
    for labels in ("wrong", "any"):
        adapter = Drawn()
        run(LabelFlipping(max_steps=40, labels=labels, draw=draw), adapter=adapter)
        true, drawn = torch.cat(adapter.true), torch.cat(adapter.drawn)
        assert set(drawn.tolist()) == set(range(CLASSES))
        if labels == "wrong":
            assert bool((true != drawn).all())
        else:
            assert 0 < int((true == drawn).sum()) < len(true)


def labels_by_sample(method):
    """Position -> the labels it was trained on, in order."""
    found, x = {}, dataset().tensors[0]
    adapter = Drawn()
    _, seen = run(method, adapter=adapter)
    drawn = iter(torch.cat(adapter.drawn).tolist())
    for batch in seen.batches:
        for row in batch["forget"][0]:
            position = int((x == row).all(1).nonzero())
            found.setdefault(position, []).append(next(drawn))
    assert set(found) == set(FORGET)
    return found


def test_a_sample_keeps_its_label_only_where_asked_to():
    fixed = labels_by_sample(LabelFlipping(max_epochs=5, draw="sample"))
    assert all(len(labels) >= 5 and len(set(labels)) == 1 for labels in fixed.values())
    anew = labels_by_sample(LabelFlipping(max_epochs=5, draw="batch"))
    assert any(len(set(labels)) > 1 for labels in anew.values())
    again = labels_by_sample(LabelFlipping(max_epochs=2, draw="sample"))
    assert all(again[position][0] == labels[0] for position, labels in fixed.items())
    other = labels_by_sample(LabelFlipping(max_epochs=2, draw="sample", seed=1))
    assert any(other[position][0] != labels[0] for position, labels in fixed.items())


def test_counting_the_classes_leaves_no_trace():
    model = Answering(dropout=0.3)
    counted, _ = run(LabelFlipping(max_steps=5, forget_statistics="update"), model)
    told, _ = run(LabelFlipping(max_steps=5, forget_statistics="update", n_classes=CLASSES), model)
    assert same(weights(counted), weights(told))
    method = LabelFlipping(max_steps=2)
    run(method)
    assert method._counted is None  # the next model may have other classes


class Tagger(Answering):
    """Several yes/no labels a sample."""

    def training_step(self, batch, batch_idx):
        return functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])


def test_yes_and_no_are_exchanged():
    generator = torch.Generator().manual_seed(1)
    tags = torch.randint(0, 2, (40, CLASSES), generator=generator).float()
    data = TensorDataset(torch.randn(40, FEATURES, generator=generator), tags)
    adapter = Drawn()
    run(
        LabelFlipping(max_steps=3),
        Tagger(norm=False),
        adapter=adapter,
        data=UnlearningDataModule(DataLoader(data, 8), FORGET),
    )
    for true, drawn in zip(adapter.true, adapter.drawn, strict=True):
        assert torch.equal(drawn, 1 - true)


class Regression(Answering):
    def training_step(self, batch, batch_idx):
        return functional.mse_loss(self(batch[0])[:, 0], batch[1])


class Mirrored(BatchAdapter):
    def wrong_targets(self, targets, n_classes, *, avoid_true=True):
        return -targets


def test_labels_of_another_kind_need_an_adapter():
    generator = torch.Generator().manual_seed(1)
    rows = TensorDataset(torch.randn(40, FEATURES, generator=generator), 5 * torch.randn(40, generator=generator))
    data = UnlearningDataModule(DataLoader(rows, 8), FORGET)
    model = Regression(norm=False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MissingRequirementError, match="`wrong_targets` is overridden"):
        unlearn(
            model,
            list(FORGET),
            method=LabelFlipping(max_steps=3, stop=None),
            data=DataLoader(rows, 8),
            trainer={"accelerator": "cpu"},
            probe_samples=0,
        )
    assert same(before, model.state_dict())
    mirrored, _ = run(LabelFlipping(max_steps=3), model, adapter=Mirrored(), data=data)
    assert not same(before, mirrored.state_dict())


def test_ignored_entries_stay_ignored():
    targets = torch.tensor([0, -100, 2, -1])
    for avoid_true in (True, False):
        drawn = BatchAdapter().wrong_targets(targets, CLASSES, avoid_true=avoid_true)
        assert drawn[[1, 3]].tolist() == [-100, -1]
        assert bool((drawn[[0, 2]] >= 0).all())


class Picky(Answering):
    """Skips batches whose labels are not those of the data."""

    def training_step(self, batch, batch_idx):
        known = {(tuple(x.tolist()), int(y)) for x, y in dataset()}
        honest = all((tuple(x.tolist()), int(y)) in known for x, y in zip(*batch, strict=True))
        return super().training_step(batch, batch_idx) if honest else None


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_the_user_skips_is_skipped():
    model = Picky(norm=False)
    module, _ = run(LabelFlipping(max_epochs=1), model)
    assert same(weights(model.net), weights(module.net))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"labels": "other"}, "labels"),
        ({"draw": "epoch"}, "draw"),
        ({"seed": -1}, "seed"),
        ({"n_classes": 0}, "n_classes"),
        ({"retain_weight": 0.0}, "retain_weight"),
        ({"retain_weight": 1.5}, "retain_weight"),
        ({"stop": "never"}, "stop"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        LabelFlipping(**settings)


@pytest.mark.parametrize("method", [CEFineTune, ICEFineTune])
@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_the_range_of_alpha_is_the_papers(method, alpha):
    with pytest.raises(ValueError, match="alpha"):
        method(alpha=alpha)


def test_samples_that_no_input_tells_apart():
    class Wordless(BatchAdapter):
        def inputs(self, batch):
            return nn.Identity()

    with pytest.raises(MissingRequirementError, match="Draw labels for each batch"):
        run(LabelFlipping(max_steps=1, draw="sample", n_classes=CLASSES), adapter=Wordless())
