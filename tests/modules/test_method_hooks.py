"""What the wrapper offers to methods: epochs of different parts, outputs, frozen twins, masks, beginning and end."""

from typing import ClassVar

import pytest
import torch
from lightning import LightningDataModule

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.methods import PartialUpdates
from lightning_unlearn.methods.loss_method import LossMethod, PushingMethod, as_loss
from lightning_unlearn.modules.unlearning_module import UnlearningModule
from tests.modules.cases import CLASSES, User, dataset, loader, same, trainer, weights

FORGET = [1, 4, 8, 15, 30]


class Forwarding(User):
    def forward(self, x):
        return self.net(x)


class InTurn(LossMethod):
    """A pass over the forget data, then one over the retain data, and so on."""

    guarantee: ClassVar = "heuristic"
    source: ClassVar = "a test"
    parts: ClassVar = ("forget", "retain")

    def __init__(self, fail=False):
        self._fail = fail
        super().__init__(max_epochs=4)
        self.seen, self.ended = [], 0

    @property
    def schedule(self):
        return [("forget",), ("retain",), ("forget",), ("forget", "retain")]

    def prepare(self, host):
        self.twin = host.frozen_twin()

    def finish(self, host):
        self.ended += 1

    def step(self, host, batch, batch_idx):
        self.seen.append((host.current_epoch, tuple(batch), [len(part[0]) for part in batch.values()]))
        if self._fail and host.current_epoch == 1:
            raise RuntimeError("broken")
        part = next(iter(batch))
        return as_loss(host.user_step(part, batch[part], batch_idx))


class Looks(PushingMethod):
    """Compares statistics and outputs inside a step."""

    guarantee: ClassVar = "heuristic"
    source: ClassVar = "a test"
    parts: ClassVar = ("forget",)

    def __init__(self, **settings):
        super().__init__(max_steps=2, **settings)
        self.outputs = []

    def step(self, host, batch, batch_idx):
        before = host.net[1].running_mean.clone()
        logits, targets = host.outputs_of("forget", batch["forget"])
        self.outputs.append((logits.shape, targets.shape, not torch.equal(before, host.net[1].running_mean)))
        return host.batch_adapter.loss(logits, targets)


def run(method, model=None, **settings):
    model = model or Forwarding()
    wrapped = UnlearningModule(model, method)
    data = UnlearningDataModule(loader(), FORGET, seed=1).with_parts(method.parts, method.schedule)
    limits = {"max_steps": method.max_steps or -1, "max_epochs": method.max_epochs}
    try:
        trainer(**{**limits, **settings}).fit(wrapped, datamodule=data)
    finally:
        wrapped.unwrap()
    return model


def test_every_epoch_has_the_parts_of_the_schedule():
    method = InTurn()
    run(method, reload_dataloaders_every_n_epochs=1)
    per_epoch = [[one for one in method.seen if one[0] == epoch] for epoch in range(4)]
    assert [{parts for _, parts, _ in epoch} for epoch in per_epoch] == [
        {("forget",)},
        {("retain",)},
        {("forget",)},
        {("forget", "retain")},
    ]
    assert [sum(sizes[0] for _, _, sizes in epoch) for epoch in per_epoch[:3]] == [5, 35, 5]
    assert method.ended == 1


def test_behind_the_schedule_its_last_parts_stay():
    method = InTurn()
    run(method, reload_dataloaders_every_n_epochs=1, max_epochs=6)
    assert {(epoch, parts) for epoch, parts, _ in method.seen if epoch > 2} == {
        (epoch, ("forget", "retain")) for epoch in (3, 4, 5)
    }


class Orders(InTurn):
    """Two passes over the retain data, whose rows it keeps."""

    schedule: ClassVar = [("retain",), ("retain",)]
    parts: ClassVar = ("retain",)

    def __init__(self):
        super().__init__()
        self.max_epochs, self.rows = 2, ([], [])

    def step(self, host, batch, batch_idx):
        self.rows[host.current_epoch].extend(map(tuple, batch["retain"][0].tolist()))
        return super().step(host, batch, batch_idx)


def test_every_pass_over_a_part_has_an_order_of_its_own_that_the_seed_names():
    first, again = Orders(), Orders()
    for method in (first, again):
        run(method, reload_dataloaders_every_n_epochs=1)
    one, two = first.rows
    assert first.rows == again.rows
    assert one != two
    assert sorted(one) == sorted(two)
    assert len(set(one)) == 35


class Doubles:
    """A transfer hook that knows the user's batches only."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return [2 * x, y]


class DoublingData(Doubles, LightningDataModule):
    def train_dataloader(self):
        return loader()


class DoublingModule(Doubles, Forwarding):
    pass


@pytest.mark.filterwarnings("ignore:You have overridden:UserWarning")  # Lightning says which of two hooks it takes
@pytest.mark.parametrize(
    ("source", "model"), [(DoublingData, Forwarding), (loader, DoublingModule)], ids=["datamodule", "module"]
)
def test_the_users_transfer_hook_sees_single_parts_of_an_epoch_as_well(source, model):
    class Keeps(InTurn):
        def step(self, host, batch, batch_idx):
            for part, piece in batch.items():
                kept.setdefault((host.current_epoch, part), []).append(piece[0])
            return super().step(host, batch, batch_idx)

    kept, method = {}, Keeps()
    data = UnlearningDataModule(source(), FORGET, seed=1).with_parts(method.parts, method.schedule)
    wrapped = UnlearningModule(model(), method)
    trainer(max_epochs=4, reload_dataloaders_every_n_epochs=1).fit(wrapped, datamodule=data)
    x = dataset().tensors[0]
    retain = [row for row in range(len(x)) if row not in FORGET]
    for epoch, part, rows in ((0, "forget", FORGET), (1, "retain", retain), (3, "retain", retain)):
        seen = torch.cat(kept[epoch, part])
        assert sorted(seen[:, 0].tolist()) == sorted((2 * x[rows, 0]).tolist())


@pytest.mark.parametrize("every", [0, 2])
def test_a_trainer_that_keeps_its_loaders_is_refused(every):
    with pytest.raises(UnsupportedStrategyError, match=f"reload_dataloaders_every_n_epochs.*got {every}"):
        run(InTurn(), reload_dataloaders_every_n_epochs=every)


def test_the_method_lets_go_after_an_exception_as_well():
    method = InTurn(fail=True)
    with pytest.raises(RuntimeError, match="broken"):
        run(method, reload_dataloaders_every_n_epochs=1)
    assert method.ended == 1


def test_a_frozen_twin_stays_what_the_module_was():
    model, method = Forwarding(), InTurn()
    start = weights(model)
    run(method, model, reload_dataloaders_every_n_epochs=1)
    assert type(method.twin) is Forwarding
    assert same(weights(method.twin), start)
    assert not same(weights(model), start)
    assert not any(module.training for module in method.twin.modules())
    assert not any(parameter.requires_grad for parameter in method.twin.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("statistics", "learnt"), [("auto", False), ("running", False), ("batch", False), ("update", True)]
)
def test_running_statistics_follow_forget_batches_only_if_told_to(statistics, learnt):
    model, method = Forwarding(), Looks(forget_statistics=statistics)
    before = model.net[1].running_mean.clone()
    run(method, model)
    assert method.outputs == [((5, CLASSES), (5,), learnt)] * 2
    assert torch.equal(model.net[1].running_mean, before) is not learnt


class Counting(InTurn):
    """Keeps the numbers of steps that masks are asked for."""

    schedule: ClassVar = None
    parts: ClassVar = ("retain",)

    def __init__(self):
        super().__init__()
        self.asked = []

    def update_masks(self, host, iteration):
        self.asked.append(iteration)
        return super().update_masks(host, iteration)


def test_every_fit_of_a_wrapper_begins_anew_and_ends_without_unwrapping():
    method, model = Counting(), Forwarding()
    wrapped = UnlearningModule(model, method)
    for fits in (1, 2):
        data = UnlearningDataModule(loader(), FORGET, seed=1).with_parts(method.parts)
        fitted = trainer(max_steps=3)
        fitted.fit(wrapped, datamodule=data)
        assert method.asked == [0, 1, 2] * fits
        assert method.ended == fits
        assert not fitted.optimizers[0]._optimizer_step_post_hooks
    wrapped.unwrap()
    assert method.ended == 2


def test_masks_are_the_same_in_every_pass():
    method = Looks().with_updates(PartialUpdates(0.3, "cyclic"))
    first, second = run(method), run(method)
    assert same(weights(first), weights(second))
