"""What a method is told about the ends of epochs and of the pass, and the data it can look at meanwhile."""

from typing import ClassVar

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_unlearn.api import unlearn
from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.methods import LossMethod, PushingMethod
from lightning_unlearn.methods.loss_method import as_loss
from lightning_unlearn.modules.probe import ProbeData
from lightning_unlearn.modules.unlearning_module import UnlearningModule
from lightning_unlearn.procedures.held_out_stop import HeldOutStop
from tests.modules.cases import User, dataset, loader, trainer

FORGET = range(0, 40, 3)


class Ending(LossMethod):
    """Forget data in the first of three epochs; takes note of every end."""

    guarantee: ClassVar = "heuristic"
    source: ClassVar = "a test"
    parts: ClassVar = ("forget", "retain")
    schedule: ClassVar = [("forget",), ("retain",), ("forget", "retain")]

    def __init__(self, fail_at=None):
        super().__init__(max_epochs=3)
        self._fail_at, self.seen = fail_at, []

    def step(self, host, batch, batch_idx):
        if host.global_step == self._fail_at:
            raise RuntimeError("broken")
        return as_loss(host.user_step(next(iter(batch)), next(iter(batch.values())), batch_idx))

    def end_epoch(self, host):
        self.seen.append(("epoch", host.current_epoch, host.global_step))

    def conclude(self, host):
        self.seen.append(("end", host.global_step))
        with torch.no_grad():
            host.net[0].bias.fill_(7.0)

    def remarks(self):
        return [f"{len(self.seen)} ends were seen."]

    def finish(self, host):
        self.seen.append("finish")


def run(method, model=None, callbacks=(), data=None):
    model = User() if model is None else model
    wrapped = UnlearningModule(model, method)
    source = loader() if data is None else data
    parts = UnlearningDataModule(source, FORGET, seed=1).with_parts(method.parts, method.schedule)
    settings = {"reload_dataloaders_every_n_epochs": int(method.schedule is not None), "limit_val_batches": 0}
    fitted = trainer(max_epochs=method.max_epochs or 50, callbacks=list(callbacks), **settings)
    try:
        fitted.fit(wrapped, datamodule=parts)
    finally:
        wrapped.unwrap()
    return model, fitted


def test_every_end_is_told_once_and_the_last_weights_are_the_methods():
    class AtEnd(User):
        def on_train_epoch_end(self):
            method.seen.append("user")

        def on_train_end(self):
            method.seen.append("user's end")

    method = Ending()
    model, _ = run(method, AtEnd())
    # two steps over 14 samples, then four over 26: a last batch of two each
    # the user's hook only where the user's step saw retain data: in the third epoch the forget part came first
    wanted = [("epoch", 0, 2), "user", ("epoch", 1, 6), ("epoch", 2, 10), "user's end", ("end", 10), "finish"]
    assert method.seen == wanted
    assert model.net[0].bias.eq(7.0).all()


def test_an_epoch_ends_where_the_method_says_so_and_the_users_hook_is_still_asked():
    class Watching(User):
        def on_train_batch_start(self, batch, batch_idx):
            watched.append(len(batch[0]))

    class Short(Ending):
        def epoch_is_over(self, host, batch_idx):
            return host.current_epoch < 2 and batch_idx == 1

    watched, method = [], Short()
    _, fitted = run(method, Watching())
    assert [one for one in method.seen if one[0] == "epoch"] == [("epoch", 0, 1), ("epoch", 1, 2), ("epoch", 2, 6)]
    assert fitted.current_epoch == 3
    assert watched == [8, 8, 8, 8, 2]  # the retain batch of every step that has one


def test_a_pass_that_breaks_has_no_end():
    method = Ending(fail_at=3)
    with pytest.raises(RuntimeError, match="broken"):
        run(method)
    assert method.seen == [("epoch", 0, 2), "finish"]


def test_remarks_are_in_the_result():
    result = unlearn(User(), list(FORGET), method=Ending(), data=loader(), probe_samples=0, seed=1)
    assert "5 ends were seen." in result.notes


class Reads(LossMethod):
    """Reads batches of every part before the first step."""

    guarantee: ClassVar = "heuristic"
    source: ClassVar = "a test"

    def __init__(self):
        super().__init__(max_epochs=1)

    def prepare(self, host):
        self.read = {part: list(host.part_batches(part)) for part in ("forget", "retain", "held_out")}

    def step(self, host, batch, batch_idx):
        return as_loss(host.user_step("retain", batch["retain"], batch_idx))


@pytest.mark.filterwarnings(
    "ignore:You passed in a `val_dataloader`:UserWarning", "ignore:You have overridden:UserWarning"
)
def test_batches_of_a_part_come_as_the_step_gets_them():
    class Doubling(User):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [2 * batch[0], batch[1]]

    method, held_out = Reads(), dataset(9, seed=4)
    run(method, Doubling(), data={"train": loader(), "val": DataLoader(held_out, 4)})
    x = dataset().tensors[0]
    retain = [row for row in range(40) if row not in FORGET]
    for part, rows in {"forget": x[list(FORGET)], "retain": x[retain], "held_out": held_out.tensors[0]}.items():
        assert torch.equal(torch.cat([batch[0] for batch in method.read[part]]), 2 * rows), part


def test_no_validation_data_is_said():
    with pytest.raises(MissingRequirementError, match="Reads needs validation data"):
        run(Reads())


class Pushes(PushingMethod):
    """Climbs on the forget data in a schedule of its own."""

    guarantee: ClassVar = "heuristic"
    source: ClassVar = "a test"
    parts: ClassVar = ("forget", "retain")
    schedule: ClassVar = [("forget",), ("forget",), ("retain",), ("forget",), ("retain",)]

    def __init__(self):
        super().__init__(max_epochs=5, check_every=None)

    def step(self, host, batch, batch_idx):
        part = next(iter(batch))
        loss = as_loss(host.user_step(part, batch[part], batch_idx))
        return -loss if part == "forget" else loss * 0.0


@pytest.mark.parametrize(("reached_at", "ended_at"), [(None, 14), (8, 8), (2, 8)])
def test_epochs_are_looked_at_where_steps_are_not_counted(monkeypatch, reached_at, ended_at):
    source, looked = UnlearningDataModule(loader(), FORGET), []

    def scripted(data, module):
        looked.append(module.global_step)
        return float(reached_at is not None and module.global_step >= reached_at) if len(data) == len(FORGET) else 0.5

    monkeypatch.setattr(ProbeData, "mean_loss", scripted)
    loaders = source.forget_loader(), source.retain_loader(), source.retain_loader()
    looks = HeldOutStop(*loaders, every=None, epochs=[2, 4])
    _, fitted = run(Pushes(), callbacks=[looks])
    # two steps an epoch over the forget data, four over the retain data; never in or after the former
    assert fitted.global_step == ended_at
    assert looks.stopped_at == (None if reached_at is None else ended_at)
    assert sorted(set(looked)) == ([0, 8] if ended_at == 8 else [0, 8, 14])
