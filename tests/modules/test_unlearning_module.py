import copy
import pickle
from typing import ClassVar

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, StochasticWeightAveraging
from torch.nn import functional
from torch.utils.data import DataLoader, Subset

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.exceptions import MissingRequirementError, UnlearningWarning, UnsupportedStrategyError
from lightning_unlearn.methods.fine_tune import FineTune
from lightning_unlearn.modules.unlearning_module import UnlearningModule
from lightning_unlearn.utilities.batch_adapter import BatchAdapter
from tests.modules.cases import (
    Adversarial,
    Ascent,
    Joint,
    OwnLoss,
    User,
    dataset,
    loader,
    network,
    same,
    trainer,
    weights,
)

FORGET = [1, 4, 8, 15, 30]
RETAIN = [i for i in range(40) if i not in FORGET]


def run(model, method, *, data=None, steps=None, epochs=None, **kwargs):
    """One pass; returns the trainer and the wrapper."""
    wrapped = UnlearningModule(model, method)
    data = data or UnlearningDataModule(loader(), FORGET, parts=method.parts, seed=3)
    limits = {"max_epochs": epochs} if epochs else {"max_steps": steps or method.max_steps}
    fitted = trainer(**limits, **kwargs)
    fitted.fit(wrapped, datamodule=data.with_parts(method.parts))
    return fitted, wrapped


def retain_part():
    """The retain batches of `run`, from torch alone: same seed, same order."""
    return DataLoader(Subset(dataset(), RETAIN), 8, shuffle=True, generator=torch.Generator().manual_seed(4))


# ---- what is computed ----


class HandWritten(User):
    """The joint pass as somebody would write it by hand."""

    def training_step(self, batch, batch_idx):
        first, norm, relu, last = self.net
        x, y = batch["forget"]
        # The batch's own statistics, and no running ones to learn from it.
        hidden = functional.batch_norm(first(x), None, None, norm.weight, norm.bias, training=True)
        forget = functional.cross_entropy(last(relu(hidden)), y)
        x, y = batch["retain"]
        return functional.cross_entropy(self.net(x), y) - 0.3 * forget

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def test_a_pass_equals_a_hand_written_module_bit_for_bit():
    model, by_hand = User(lr=0.2), HandWritten()
    run(model, Joint(lr_scale=0.5))
    parts = {
        name: DataLoader(Subset(dataset(), ids), 8, shuffle=True, generator=torch.Generator().manual_seed(seed))
        for name, ids, seed in (("forget", FORGET, 3), ("retain", RETAIN, 4))
    }
    trainer(max_steps=12).fit(by_hand, parts)
    assert same(weights(model), weights(by_hand))
    assert not same(weights(model), weights(User()))


def test_fine_tuning_runs_the_users_step_unchanged():
    model, native = User(), User()
    native.configure_optimizers = lambda: torch.optim.SGD(native.parameters(), lr=0.1, momentum=0.9)
    run(model, FineTune(max_steps=9, lr_scale=0.5))
    trainer(max_steps=9).fit(native, retain_part())
    assert same(weights(model), weights(native))


def test_a_manual_module_with_two_optimizers_runs_unchanged():
    model, native = Adversarial(), Adversarial()
    fitted, _ = run(model, FineTune(max_steps=10, lr_scale=1.0))
    trainer(max_steps=10).fit(native, retain_part())
    assert fitted.global_step == 10
    assert same(weights(model), weights(native))
    assert not same(weights(model), weights(Adversarial()))


def test_manual_learning_rates_and_schedules_are_scaled():
    fitted, _ = run(Adversarial(), FineTune(max_steps=12, lr_scale=0.5))
    assert [optimizer.param_groups[0]["lr"] for optimizer in fitted.optimizers] == pytest.approx([0.025, 0.005])


def test_a_method_with_a_loss_of_its_own_trains():
    model = User()
    fitted, _ = run(model, OwnLoss())
    assert fitted.global_step == 3
    assert not same(weights(model), weights(User()))


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.:UserWarning")  # said once per process
def test_a_skipped_batch_is_skipped():
    class Skips(User):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    model, native = Skips(), Skips()
    native.configure_optimizers = lambda: torch.optim.SGD(native.parameters(), lr=0.2, momentum=0.9)
    run(model, FineTune(max_steps=9, lr_scale=1.0))
    trainer(max_steps=9).fit(native, retain_part())
    assert same(weights(model), weights(native))


# ---- running statistics ----


@pytest.mark.parametrize("method", [Joint(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)), Ascent()])
def test_forget_batches_leave_no_trace_in_running_statistics(method):
    model, shifted = User(), dataset()
    shifted.tensors[0][FORGET] += 1e6
    data = UnlearningDataModule(DataLoader(shifted, 8, shuffle=True), FORGET, parts=method.parts)
    run(model, method, data=data)
    assert model.net[1].running_mean.abs().max() < 10
    assert int(model.net[1].num_batches_tracked) == (12 if "retain" in method.parts else 0)
    assert model.net[1].momentum == 0.1


def test_forget_alone_is_normalised_with_the_running_statistics():
    class Watching(User):
        modes: ClassVar = []

        def training_step(self, batch, batch_idx):
            self.modes.append(self.net[1].training)
            return super().training_step(batch, batch_idx)

    model = Watching()
    run(model, Ascent())
    assert model.modes == [False] * 3
    assert model.net[1].training


# ---- logging ----


def test_both_parts_are_logged_under_their_own_names_and_counted_apart():
    model = User(norm=False)
    fitted, _ = run(model, Joint(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)), epochs=1)
    logged = {name: float(value) for name, value in fitted.callback_metrics.items()}
    for prefix, ids in (("", RETAIN), ("forget/", FORGET)):
        x, y = (tensor[ids] for tensor in dataset().tensors)
        logits = network(norm=False)(x).detach()
        assert logged[f"{prefix}train_acc"] == pytest.approx(float((logits.argmax(1) == y).double().mean()))
        # Weighted by samples: the last retain batch has three of them.
        assert logged[f"{prefix}train_loss_epoch"] == pytest.approx(float(functional.cross_entropy(logits, y)), 1e-5)
    assert logged["train_acc"] != logged["forget/train_acc"]


def test_metrics_of_the_forget_part_start_anew_in_every_epoch():
    model = User(norm=False)
    fitted, _ = run(model, Joint(ascent=0.0), epochs=3)
    x, y = (tensor[FORGET] for tensor in dataset().tensors)
    # Five batches of the whole forget part; within the last epoch the weights move, so bounds are all one can say.
    assert 0.0 <= float(fitted.callback_metrics["forget/train_acc"]) <= 1.0
    assert model.acc.update_count == 0  # Lightning has reset it
    assert isinstance(model.acc(model.net(x), y), torch.Tensor)


def test_monitors_of_the_users_names_keep_working():
    stopper = EarlyStopping("train_loss_epoch", stopping_threshold=100.0, check_on_train_epoch_end=True)
    fitted, _ = run(User(), Joint(max_epochs=5, max_steps=None), epochs=5, callbacks=[stopper])
    assert fitted.current_epoch == 1


def test_silence():
    wrapped = UnlearningModule(User(), Joint())
    x, y = (tensor[:4] for tensor in dataset().tensors)
    with wrapped.silent():
        output = wrapped.user_step("retain", (x, y), 0)
    assert output["loss"].requires_grad
    with pytest.warns(UserWarning, match="trainer` reference is not registered"):
        wrapped.user_step("retain", (x, y), 0)


# ---- optimizers ----


def test_the_users_optimizer_is_fresh_scaled_and_without_schedule():
    fitted, _ = run(User(lr=0.3), FineTune(max_steps=3, lr_scale=1 / 3))
    [optimizer] = fitted.optimizers
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert fitted.lr_scheduler_configs == []


def test_the_methods_optimizer_replaces_the_users():
    class WarmingUp(User):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            for group in optimizer.param_groups:
                group["lr"] = 1e9
            optimizer.step(closure=optimizer_closure)

    method = FineTune(max_steps=3, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    fitted, _ = run(WarmingUp(), method)
    [optimizer] = fitted.optimizers
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_frozen_parameters_stay_out_of_the_methods_optimizer():
    model = User()
    model.net[0].requires_grad_(False)
    before = weights(model.net[0])
    given = []

    def build(parameters):
        given.extend(parameters)
        return torch.optim.AdamW(given, lr=0.1, weight_decay=0.5)

    run(model, FineTune(max_steps=2, optimizer=build))
    assert not {id(parameter) for parameter in model.net[0].parameters()} & {id(item) for item in given}
    assert same(before, weights(model.net[0]))


def test_lbfgs_is_announced():
    class Second(User):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=2)

    with pytest.warns(UnlearningWarning, match="several times"):
        run(Second(), FineTune(max_steps=1))


def test_an_estimated_number_of_steps_is_at_hand():
    class Cycling(User):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=0.6, total_steps=self.trainer.estimated_stepping_batches
            )
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    fitted, _ = run(Cycling(), FineTune(max_epochs=1, lr_scale=0.5), epochs=1)
    assert fitted.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.3)


def test_no_optimizer_is_refused():
    class Without(User):
        def configure_optimizers(self):
            return None

    with pytest.raises(MissingRequirementError, match="Give the method an `optimizer`"):
        run(Without(), FineTune(max_steps=1))


# ---- callbacks ----


class Plain(User):
    """Without a schedule, which a pass leaves out."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Watcher(Callback):
    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(list(batch))
        assert isinstance(pl_module, User)
        assert pl_module.net is not None


def test_callbacks_find_the_users_module_and_the_parts():
    watcher = Watcher()
    run(User(), Joint(max_steps=2), callbacks=[watcher])
    assert watcher.batches == [["forget", "retain"]] * 2


def test_callbacks_of_the_users_training_stay_away():
    class WithStopper(User):
        def configure_callbacks(self):
            return [EarlyStopping("nothing that is ever logged")]

    fitted, wrapped = run(WithStopper(), FineTune(max_steps=2))
    assert not any(isinstance(callback, EarlyStopping) for callback in fitted.callbacks)
    assert len(wrapped.unwrap().configure_callbacks()) == 1


@pytest.mark.parametrize(
    "setting",
    [
        {"callbacks": [EMAWeightAveraging(decay=0.5)]},
        {"callbacks": [StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)], "max_epochs": 3},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
    ],
    ids=["ema", "swa", "accumulation and clipping", "bf16"],
)
def test_a_trainers_settings_do_what_they_do_without_the_wrapper(setting):
    results = []
    for wrap in (True, False):
        torch.manual_seed(0)
        model = Plain()
        fitted = trainer(**{"max_epochs": 2, **copy.deepcopy(setting)})
        wrapped = UnlearningModule(model, FineTune(max_epochs=2, lr_scale=1.0)) if wrap else model
        part = retain_part()
        fitted.fit(wrapped, {"retain": part} if wrap else part)
        results.append((weights(model), fitted.global_step))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] > 0


# ---- unwrapping ----


def test_unwrap_gives_the_users_object_without_a_trace():
    model = User()
    kept = set(model.__dict__)
    fitted, wrapped = run(model, Joint())
    assert isinstance(wrapped, User)
    assert isinstance(wrapped, UnlearningModule)
    assert fitted.global_step == 12
    assert wrapped.unwrap() is model
    assert wrapped.unwrap() is model
    assert type(model) is User
    assert set(model.__dict__) == kept
    assert set(model.state_dict()) == set(User().state_dict())
    assert b"lightning_unlearn" not in pickle.dumps(model)
    x, y = (tensor[:4] for tensor in dataset().tensors)
    model.trainer = None
    with pytest.warns(UserWarning, match="not registered"):
        assert set(model.training_step((x, y), 0)) == {"loss", "logits"}


def test_after_unwrapping_the_wrapper_passes_through():
    model = User()
    wrapped = UnlearningModule(model, Joint())
    wrapped.unwrap()
    part = DataLoader(dataset(), 8)
    trainer(max_steps=4).fit(wrapped, part)
    native = User()
    trainer(max_steps=4).fit(native, part)
    assert same(weights(model), weights(native))


class BreaksError(RuntimeError):
    pass


def test_after_an_exception_the_users_object_is_clean():
    class Breaks(User):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise BreaksError
            return super().training_step(batch, batch_idx)

    model = Breaks()
    kept, original = set(model.__dict__), model.acc
    wrapped = UnlearningModule(model, Joint())
    data = UnlearningDataModule(loader(), FORGET, parts=("forget", "retain"))
    with pytest.raises(BreaksError):
        trainer(max_steps=5).fit(wrapped, datamodule=data)
    assert wrapped.unwrap() is model
    assert set(model.__dict__) == kept
    assert model.acc is original
    assert model.net[1].momentum == 0.1


def test_a_module_may_be_wrapped_again():
    model = User()
    for _ in range(2):
        fitted, wrapped = run(model, FineTune(max_steps=2))
        assert fitted.global_step == 2
        wrapped.unwrap()


@pytest.mark.parametrize("copied", [lambda item: pickle.loads(pickle.dumps(item)), copy.deepcopy])  # noqa: S301
def test_copies_are_whole(copied):
    wrapped = UnlearningModule(User(), Joint(), adapter=BatchAdapter(target_key="y"))
    twin = copied(wrapped)
    assert isinstance(twin, UnlearningModule)
    assert twin.batch_adapter.target_key == "y"
    assert same(weights(twin), weights(wrapped))
    assert twin.net is not wrapped.net
    user = twin.unwrap()
    assert type(user) is User
    assert user.__dict__ is twin.__dict__


def test_user_attributes_set_through_the_wrapper_are_the_users():
    model = User()
    wrapped = UnlearningModule(model, Joint())
    wrapped.extra = torch.nn.Linear(1, 1)
    wrapped.flag = 3
    assert model.extra is wrapped.extra
    assert model.flag == 3
    assert "extra.weight" in model.state_dict()


def test_preparation_runs_at_fit_start():
    class Prepared(Joint):
        def prepare(self, host):
            self.seen = host.trainer.training, next(host.parameters()).device.type

    method = Prepared(max_steps=1)
    run(User(), method)
    assert method.seen == (True, "cpu")


def test_wrapping_a_wrapper_is_refused():
    with pytest.raises(UnsupportedStrategyError, match=r"Call its `unwrap\(\)` first"):
        UnlearningModule(UnlearningModule(User(), Joint()), Joint())
