"""The penalty of KL-FT against plain loops, and where it is another method."""

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.methods import ICEFineTune, KLFineTune
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
from tests.modules.cases import CLASSES, FEATURES


def divergence(logits, target, reverse):
    """Mean KL by torch's own loss function."""
    log_p = logits.log_softmax(1)
    if reverse:
        return functional.kl_div(target.log(), log_p, reduction="batchmean", log_target=True)
    return functional.kl_div(log_p, target, reduction="batchmean")


@pytest.mark.parametrize(
    ("settings", "smoothing"),
    [
        ({}, 0.1),
        ({"smoothing": 0.4, "reverse": True}, 0.4),
        ({"target": "one_hot"}, 0.0),
        ({"target": "uniform"}, 1.0),
        ({"target": "uniform", "reverse": True}, 1.0),
    ],
    ids=["default", "reverse", "one-hot", "uniform", "uniform-reverse"],
)
def test_the_pass_is_a_plain_loop(settings, smoothing):
    method, model, drawn = KLFineTune(max_steps=8, alpha=0.7, **settings), Answering(), Drawn()
    module, seen = run(method, model, adapter=drawn)
    uniform = settings.get("target") == "uniform"
    assert len(drawn.drawn) == (0 if uniform else 8)

    def loss(twin, batch, step):
        kept = cross_entropy(twin, batch["retain"])
        labels = batch["forget"][1] if uniform else drawn.drawn[step]
        target = torch.full((len(labels), CLASSES), smoothing / CLASSES)
        target[torch.arange(len(labels)), labels] += 1 - smoothing
        logits = answers_without_statistics(twin, batch["forget"][0])
        return kept + 0.7 * divergence(logits, target, settings.get("reverse", False))

    assert_close(module, plain(model, seen.batches, loss, model.hparams.lr / 10))


def test_with_one_hot_targets_it_is_ice_fine_tune():
    by_divergence, _ = run(KLFineTune(max_steps=6, target="one_hot", alpha=0.4))
    by_loss, _ = run(ICEFineTune(max_steps=6, alpha=0.4))
    assert_close(by_divergence, by_loss)
    smoothed, _ = run(KLFineTune(max_steps=6, alpha=0.4))
    with pytest.raises(AssertionError):
        assert_close(smoothed, by_loss)


class Pixels(Answering):
    """One class for each of two places, of which some are ignored."""

    def __init__(self):
        super().__init__(norm=False)
        self.net = torch.nn.Sequential(torch.nn.Linear(FEATURES, 2 * CLASSES), torch.nn.Unflatten(1, (CLASSES, 2)))

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1], ignore_index=-100)


def test_ignored_places_do_not_count():
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(0, CLASSES, (40, 2), generator=generator)
    targets[::2, 1] = -100
    rows = TensorDataset(torch.randn(40, FEATURES, generator=generator), targets)
    data, model, drawn = UnlearningDataModule(DataLoader(rows, 8), FORGET), Pixels(), Drawn()
    module, seen = run(KLFineTune(max_steps=4, target="one_hot", alpha=1.0), model, adapter=drawn, data=data)

    def loss(twin, batch, step):
        kept = functional.cross_entropy(twin.net(batch["retain"][0]), batch["retain"][1], ignore_index=-100)
        wrong = drawn.drawn[step]
        assert bool((wrong == -100).any())
        return kept + functional.cross_entropy(twin.net(batch["forget"][0]), wrong, ignore_index=-100)

    assert_close(module, plain(model, seen.batches, loss, model.hparams.lr / 10))


class Tagger(Answering):
    def training_step(self, batch, batch_idx):
        return functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])


def test_several_labels_a_sample():
    generator = torch.Generator().manual_seed(1)
    tags = torch.randint(0, 2, (40, CLASSES), generator=generator).float()
    rows = TensorDataset(torch.randn(40, FEATURES, generator=generator), tags)
    data, model = UnlearningDataModule(DataLoader(rows, 8), FORGET), Tagger(norm=False)
    module, seen = run(KLFineTune(max_steps=4, smoothing=0.2, alpha=1.0), model, adapter=BatchAdapter(), data=data)

    def loss(twin, batch, step):
        binary = functional.binary_cross_entropy_with_logits
        kept = binary(twin.net(batch["retain"][0]), batch["retain"][1])
        target = 0.8 * (1 - batch["forget"][1]) + 0.1
        # The entropy of the target is a constant, so cross-entropy has the same gradient.
        return kept + binary(twin.net(batch["forget"][0]), target)

    assert_close(module, plain(model, seen.batches, loss, model.hparams.lr / 10))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"alpha": 0}, "alpha"),
        ({"target": "soft"}, "target"),
        ({"smoothing": 0.0}, "smoothing"),
        ({"target": "one_hot", "reverse": True}, "infinite"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        KLFineTune(**settings)
