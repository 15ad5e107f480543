import inspect
from collections import Counter

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, Subset
from torchmetrics import MeanMetric

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.methods.fine_tune import FineTune
from lightning_unlearn.modules.hooks import ADAPTED_HOOKS, adapted_hooks
from lightning_unlearn.modules.unlearning_module import UnlearningModule
from tests.modules.cases import Ascent, Joint, OwnLoss, User, dataset, loader, trainer

FORGET = [0, 1, 2, 3]
HOOKS = sorted(
    {name for base in (CheckpointHooks, DataHooks, ModelHooks) for name, _ in inspect.getmembers(base, callable)}
    - set(dir(object))
    - {"train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader", "configure_sharded_model"}
    | {"optimizer_step", "optimizer_zero_grad", "backward", "configure_gradient_clipping", "lr_scheduler_step"}
)


def counting(name):
    original = getattr(LightningModule, name)

    def hook(self, *args, **kwargs):
        self.counts[name] += 1
        return original(self, *args, **kwargs)

    hook.__name__ = name
    return hook


class Everywhere(User):
    """Overrides every hook of Lightning and counts its calls."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


for _name in HOOKS:
    setattr(Everywhere, _name, counting(_name))


def fit(model, train, **kwargs):
    fitted = trainer(**{"max_epochs": 2, **kwargs})
    # As mappings of loaders, not a datamodule: Lightning warns when module and datamodule might both have hooks.
    fitted.fit(model, train, DataLoader(dataset(6), 3) if isinstance(model, Everywhere) else None)
    return fitted


@pytest.fixture(scope="module")
def native_counts():
    native = Everywhere()
    fit(native, DataLoader(Subset(dataset(), range(4, 40)), 8))
    return native.counts


def split(method):
    return UnlearningDataModule(loader(), FORGET, parts=method.parts).train_dataloader()


def test_every_hook_fires_as_often_as_without_the_wrapper(native_counts):
    model, method = Everywhere(), FineTune(max_epochs=2)
    fit(UnlearningModule(model, method), split(method))
    assert model.counts == native_counts
    assert model.counts["on_train_batch_end"] == 10
    assert len(model.counts) > 25


def test_only_transfer_hooks_fire_once_more_for_a_second_part(native_counts):
    model, method = Everywhere(), Joint(max_epochs=2, max_steps=None)
    fit(UnlearningModule(model, method), split(method))
    transfer = {"on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"}
    for name in set(native_counts) - transfer:
        assert model.counts[name] == native_counts[name], name
    for name in transfer:
        assert model.counts[name] == native_counts[name] + 10


@pytest.mark.parametrize("method", [OwnLoss(), Ascent()])
def test_hooks_around_the_users_step_stay_silent_where_it_does_not_run_on_retain(method):
    model = Everywhere()
    fit(UnlearningModule(model, method), split(method), max_epochs=-1, max_steps=3)
    assert model.counts["on_train_batch_end"] == 0
    assert model.counts["on_train_epoch_end"] == 0
    assert model.counts["on_train_epoch_start"] > 0


def test_batch_hooks_see_the_retain_batch_and_the_outputs_of_the_users_step():
    class Watching(User):
        def __init__(self):
            super().__init__()
            self.started, self.ended, self.moved = [], [], []

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.moved.append(len(batch))
            return [batch[0] * 2, batch[1]]

        def on_train_batch_start(self, batch, batch_idx):
            self.started.append(batch[0])

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.ended.append((outputs["logits"].shape, float(outputs["loss"]), batch[0]))

    model, method = Watching(), Joint(max_steps=2)
    fit(UnlearningModule(model, method), split(method), max_epochs=-1, max_steps=2)
    x = dataset().tensors[0]
    for started, (shape, _, ended) in zip(model.started, model.ended, strict=True):
        assert started.shape == ended.shape == (8, 5)
        assert shape == (8, 3)
        assert torch.equal(started, ended)
        assert all((x * 2 == row).all(dim=1).any() for row in ended)
    assert model.moved == [2] * len(model.moved)


def test_an_epoch_can_be_skipped_by_the_users_hook():
    class Skipping(User):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    method = FineTune(max_epochs=1)
    fitted = fit(UnlearningModule(Skipping(), method), split(method), max_epochs=1)
    assert fitted.global_step == 2


def test_metrics_computed_at_epoch_end_hold_the_retain_part_only():
    class AtEnd(User):
        def __init__(self):
            super().__init__()
            self.seen = MeanMetric()
            self.results = []

        def training_step(self, batch, batch_idx):
            self.seen.update(batch[0].sum(1))
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self):
            self.results.append(float(self.seen.compute()))
            self.seen.reset()

    model, method = AtEnd(), Joint()
    fit(UnlearningModule(model, method), split(method))
    expected = float(dataset().tensors[0][4:].sum(1).mean())
    assert model.results == pytest.approx([expected] * 2, rel=1e-5)


def test_only_overridden_hooks_are_adapted():
    wrapped = UnlearningModule(User(), Joint())
    assert adapted_hooks(User) == {}
    assert not any(is_overridden(name, wrapped) for name in ADAPTED_HOOKS)
    assert set(adapted_hooks(Everywhere)) == set(ADAPTED_HOOKS)
