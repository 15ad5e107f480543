"""Unrolled influence against plain loops: the twin itself where first order is exact, its derivative elsewhere."""

import copy

import pytest
import torch
from lightning import Callback
from torch import nn

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.exceptions import (
    DeletionRequestError,
    LightningUnlearnError,
    MissingRequirementError,
    StoreMismatchError,
    UnsupportedStrategyError,
)
from lightning_unlearn.methods import Amnesiac, UnrolledInfluence
from tests.helpers.models import quiet_trainer
from tests.methods.trajectories import BATCH, EPOCHS, Regressor, cosine, dataset, fit, flat, forget, loader, loop, twin

pytestmark = pytest.mark.filterwarnings("ignore:.*took part in.*:lightning_unlearn.exceptions.UnlearningWarning")
FORGET = [3, 11, 17]
STEPS = EPOCHS * 4
QUADRATIC = {
    "plain": {},
    "momentum, dampening, decay": {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "lr": 0.02},
    "nesterov": {"momentum": 0.8, "nesterov": True, "lr": 0.02},
    "schedule of epochs": {"momentum": 0.5, "schedule": (cosine(EPOCHS), "epoch")},
    "schedule of steps": {"schedule": (cosine(STEPS), "step")},
}


@pytest.mark.parametrize("name", QUADRATIC)
def test_a_quadratic_loss_gives_the_twin(tmp_path, name):
    model = Regressor(**QUADRATIC[name])
    # Without whole deltas the weights are computed again, in float64: what is left is rounding alone.
    initial, store = fit(tmp_path / "s", model, keep=0.5)
    expected = twin(initial, store, FORGET)
    assert float((flat(expected) - flat(model)).norm()) > 0.01
    found = forget(model, store, FORGET, UnrolledInfluence())
    torch.testing.assert_close(flat(found), flat(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "settings", [{"value_dtype": "float32"}, {"value_dtype": "scaled_float16"}, {"anchor_every": 5}]
)
def test_recorded_deltas_and_anchors_lead_to_the_same(tmp_path, settings):
    model = Regressor(momentum=0.9, lr=0.02)
    initial, store = fit(tmp_path / "s", model, **({"keep": 0.5} if "anchor_every" in settings else {}), **settings)
    expected = twin(initial, store, FORGET)
    precise = {"float32": 1e-7, "scaled_float16": 3e-3}.get(settings.get("value_dtype"), 1e-10)
    found = forget(model, store, FORGET, UnrolledInfluence())
    apart = float((flat(expected) - flat(model)).norm())
    assert float((flat(found) - flat(expected)).norm()) < precise * apart < apart


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "lr": 0.02}], ids=["plain", "momentum"])
def test_a_batch_with_nothing_left_is_no_step(tmp_path, settings):
    model = Regressor(**settings)
    initial, store = fit(tmp_path / "s", model, keep=0.5)
    ids = sorted({*store.record(5).sample_ids, 0})
    assert sum(set(store.record(step).sample_ids) <= set(ids) for step in range(STEPS)) == 1
    found = forget(model, store, ids, UnrolledInfluence())
    torch.testing.assert_close(flat(found), flat(twin(initial, store, ids)), rtol=0, atol=1e-10)


def test_terms_that_become_zero_leave_the_denominator_and_the_step(tmp_path):
    model = Regressor(momentum=0.9, weight_decay=0.1, lr=0.02)
    initial, store = fit(tmp_path / "s", model, keep=0.5)
    ids = sorted({*store.record(5).sample_ids, 0})
    x, y = dataset().tensors

    def loss(module, step, batch):
        weights = torch.tensor([float(one not in ids) for one in batch], dtype=torch.float64)
        return module.loss(x[batch], y[batch], weights)

    found = forget(model, store, ids, UnrolledInfluence(reduction="sum"))
    torch.testing.assert_close(flat(found), flat(loop(initial, store, loss)), rtol=0, atol=1e-10)


FIRST_ORDER = {
    "momentum": {"momentum": 0.9, "weight_decay": 0.02, "lr": 0.02},
    "nesterov, schedule": {"momentum": 0.7, "nesterov": True, "schedule": (cosine(STEPS), "step")},
    "adam": {"optimizer": torch.optim.Adam, "lr": 0.02, "eps": 1e-3, "weight_decay": 0.1},
    "adamw": {"optimizer": torch.optim.AdamW, "lr": 0.02, "eps": 1e-3, "weight_decay": 0.1},
}


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_with_the_papers_settings_it_is_the_derivative_by_the_samples_weight(tmp_path, name):
    model = Regressor(hidden=5, **FIRST_ORDER[name])
    initial, store = fit(tmp_path / "s", model, keep=0.5)
    x, y = dataset().tensors

    def end(share):
        def loss(module, step, ids):
            weights = torch.tensor([1.0 - share * (one in FORGET) for one in ids], dtype=torch.float64)
            return module.loss(x[ids], y[ids], weights)

        return flat(loop(initial, store, loss))

    torch.testing.assert_close(end(0.0), flat(model), rtol=0, atol=1e-12)  # the loop is the recorded training
    step = 1e-5
    derivative = (end(step) - end(-step)) / (2 * step)
    found = forget(model, store, FORGET, UnrolledInfluence(reduction="sum", hessian="batch"))
    assert float(derivative.norm()) > 0.01
    torch.testing.assert_close(flat(found) - flat(model), derivative, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_by_default_it_is_the_derivative_from_the_recorded_run_to_its_twin(tmp_path, name):
    model = Regressor(hidden=5, **FIRST_ORDER[name])
    initial, store = fit(tmp_path / "s", model, keep=0.5)
    x, y = dataset().tensors
    known = []  # at the recorded weights: what the missing samples had added to each gradient
    kept_of = [[one for one in store.record(step).sample_ids if one not in FORGET] for step in range(STEPS)]

    def note(module, step, ids):
        parameters = list(module.parameters())
        losses = module.loss(x[ids], y[ids]), module.loss(x[kept_of[step]], y[kept_of[step]])
        whole, kept = (torch.autograd.grad(one, parameters) for one in losses)
        known.append([one - other for one, other in zip(whole, kept, strict=True)])
        return module.loss(x[ids], y[ids])

    loop(initial, store, note)

    def end(share):
        def loss(module, step, ids):
            pull = sum((one * part).sum() for one, part in zip(module.parameters(), known[step], strict=True))
            return module.loss(x[kept_of[step]], y[kept_of[step]]) + (1.0 - share) * pull

        return flat(loop(initial, store, loss))

    torch.testing.assert_close(end(0.0), flat(model), rtol=0, atol=1e-10)
    torch.testing.assert_close(end(1.0), flat(twin(initial, store, FORGET)), rtol=0, atol=1e-10)
    step = 1e-5
    derivative = (end(step) - end(-step)) / (2 * step)
    found = forget(model, store, FORGET, UnrolledInfluence())
    torch.testing.assert_close(flat(found) - flat(model), derivative, rtol=1e-6, atol=1e-8)


def test_adam_with_whole_deltas_gets_its_state_from_gradients_or_an_anchor(tmp_path):
    changes = {}
    for name, settings in {"deltas": {}, "anchors": {"anchor_every": 2}, "neither": {"keep": 0.5}}.items():
        model = Regressor(hidden=5, optimizer=torch.optim.Adam, lr=0.02, eps=1e-3)
        _, store = fit(tmp_path / name, model, **settings)
        # A sample that comes late, so that steps lie before it.
        first = {one: min(store.steps_of([one])) for one in range(24)}
        late = max(first, key=first.get)
        assert first[late] > 2
        changes[name] = flat(forget(model, store, [late], UnrolledInfluence())) - flat(model)
    for name in ("deltas", "anchors"):
        apart = float((changes[name] - changes["neither"]).norm())
        assert apart < 1e-4 * float(changes["neither"].norm())


def test_groups_of_their_own_rates_and_decays_are_followed(tmp_path):
    def grouped(parameters, lr):
        weight, bias = parameters
        groups = [{"params": [bias], "lr": 3 * lr, "weight_decay": 0.0}, {"params": [weight]}]
        return torch.optim.SGD(groups, lr=lr, momentum=0.5, weight_decay=0.2)

    model = Regressor(optimizer=grouped, lr=0.02)
    initial, store = fit(tmp_path / "s", model, keep=0.5)
    found = forget(model, store, FORGET, UnrolledInfluence())
    torch.testing.assert_close(flat(found), flat(twin(initial, store, FORGET)), rtol=0, atol=1e-10)


def test_a_schedule_sized_by_the_trainer_is_known(tmp_path):
    class Sized(Regressor):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05)
            steps = self.trainer.estimated_stepping_batches
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, cycle_momentum=False)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    model = Sized()
    initial, store = fit(tmp_path / "s", model)
    found = forget(model, store, FORGET, UnrolledInfluence())
    one_cycle = Regressor(
        schedule=(
            lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS, cycle_momentum=False),
            "step",
        )
    )
    one_cycle.load_state_dict(initial.state_dict())
    torch.testing.assert_close(flat(found), flat(twin(one_cycle, store, FORGET)), rtol=0, atol=1e-6)
    assert "_trainer" not in vars(found) or found._trainer is None


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=STEPS + 1)


REFUSED = {
    "another optimizer": ({"optimizer": torch.optim.RMSprop}, {}, UnsupportedStrategyError, "RMSprop"),
    "amsgrad": ({"optimizer": torch.optim.Adam, "amsgrad": True}, {}, UnsupportedStrategyError, "amsgrad"),
    "accumulation": ({}, {"accumulate_grad_batches": 2}, UnsupportedStrategyError, "accumulation"),
    "clipping": ({"lr": 0.01}, {"gradient_clip_val": 0.05}, StoreMismatchError, "Clipped gradients"),
    "momentum in a schedule": (
        {"lr": 0.01, "momentum": 0.9, "schedule": (one_cycle, "step")},
        {},
        UnsupportedStrategyError,
        "cycle_momentum",
    ),
    "dropout": ({"hidden": 8, "extra": (nn.Dropout(0.5),)}, {}, StoreMismatchError, "dropout"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(tmp_path, name):
    settings, trainer, error, match = REFUSED[name]
    model = Regressor(**settings)
    _, store = fit(tmp_path / "s", model, trainer=trainer)
    before = flat(model).clone()
    with pytest.raises(error, match=match):
        forget(model, store, FORGET, UnrolledInfluence())
    assert torch.equal(flat(model), before)


def test_rates_that_nobody_knows_can_be_given(tmp_path):
    rates = [0.05 * 0.8**step for step in range(STEPS)]
    decaying = (lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8), "step")
    model = Regressor(schedule=decaying)
    initial, store = fit(tmp_path / "s", model, keep=0.5)
    expected = flat(twin(initial, store, FORGET))
    model.made = (torch.optim.SGD, (plateau, "epoch"), {})
    with pytest.raises(MissingRequirementError, match="Pass `lr=`"):
        forget(model, store, FORGET, UnrolledInfluence())
    for lr in (rates, rates.__getitem__):
        torch.testing.assert_close(
            flat(forget(model, store, FORGET, UnrolledInfluence(lr=lr))), expected, rtol=0, atol=1e-10
        )
    with pytest.raises(StoreMismatchError, match="12 rates"):
        forget(model, store, FORGET, UnrolledInfluence(lr=rates[1:]))
    with pytest.raises(StoreMismatchError, match="leads to the module's weights"):
        forget(model, store, FORGET, UnrolledInfluence(lr=0.05))


def test_a_module_configured_otherwise_is_refused(tmp_path):
    model = Regressor(momentum=0.9, lr=0.02)
    _, store = fit(tmp_path / "s", model)
    for settings, match in [({"momentum": 0.5, "lr": 0.02}, "momentum"), ({"momentum": 0.9, "lr": 0.03}, "lr=0.03")]:
        model.made = (torch.optim.SGD, None, settings)
        with pytest.raises(StoreMismatchError, match=match):
            forget(model, store, FORGET, UnrolledInfluence())
    model.made = (torch.optim.SGD, None, {"momentum": 0.9, "lr": 0.02, "weight_decay": 0.5})
    with pytest.raises(StoreMismatchError, match="the change of its optimizer"):
        forget(model, store, FORGET, UnrolledInfluence())


def test_ids_and_weights_that_were_not_recorded_are_refused(tmp_path):
    model = Regressor()
    _, store = fit(tmp_path / "s", model)
    with pytest.raises(MissingRequirementError, match="the weights before training"):
        forget(model, None, FORGET, UnrolledInfluence())
    other = copy.deepcopy(model)
    other.net[0].bias.data += 1
    with pytest.raises(StoreMismatchError, match="other weights"):
        forget(other, store, FORGET, UnrolledInfluence())
    edited = forget(model, store, [3], Amnesiac(), force=True, record=True)
    with pytest.raises(StoreMismatchError, match="rest on a subtraction"):
        forget(edited, store, [4], UnrolledInfluence())
    store.purge([5])
    with pytest.raises(StoreMismatchError, match="ids of every step"):
        forget(model, store, FORGET, UnrolledInfluence())


def test_samples_that_no_step_saw_are_refused(tmp_path):
    model = Regressor()
    data = torch.utils.data.DataLoader(dataset(), BATCH)
    _, store = fit(tmp_path / "s", model, train=data, epochs=1, trainer={"limit_train_batches": 2})
    with pytest.raises(DeletionRequestError, match="ids of recorded steps"):
        forget(model, store, [20], UnrolledInfluence(), data=data)


def test_a_change_longer_than_the_training_is_refused(tmp_path):
    model = Regressor(hidden=5, optimizer=torch.optim.Adam, lr=0.3)  # a rate at which first order says nothing
    _, store = fit(tmp_path / "s", model, keep=0.5)
    with pytest.raises(LightningUnlearnError, match="approximates nothing any more"):
        forget(model, store, list(range(0, 24, 3)), UnrolledInfluence(), force=True)


def test_the_module_is_left_alone_also_by_an_error(tmp_path):
    model = Regressor(hidden=5)
    _, store = fit(tmp_path / "s", model)
    calls = []

    class Failing(Regressor):
        def training_step(self, batch, batch_idx):
            calls.append(len(batch[0]))
            return super().training_step(batch, batch_idx) if len(calls) < 4 else torch.tensor(float("nan"))

    failing = Failing(hidden=5)
    failing.load_state_dict(model.state_dict())
    before = flat(failing).clone()
    with pytest.raises(LightningUnlearnError, match="finite loss"):
        forget(failing, store, FORGET, UnrolledInfluence())
    assert len(calls) == 4
    assert torch.equal(flat(failing), before)


def test_arguments():
    for arguments in ({"reduction": "max"}, {"hessian": "none"}, {"lr": -1.0}, {"lr": [0.1, -0.1]}, {"tolerance": 0.0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            UnrolledInfluence(**arguments)
    assert UnrolledInfluence(lr=[1, 2]).settings["lr"] == (1.0, 2.0)
    assert loader().batch_size == BATCH


def test_a_training_that_went_on_or_was_edited_is_refused_and_what_others_added_later_is_not(tmp_path):
    model = Regressor()
    initial, store = fit(tmp_path / "s", model)
    first = copy.deepcopy(model)
    quiet_trainer(max_epochs=1, callbacks=[DeltaRecorder.like(store)]).fit(model, loader())
    store.refresh()
    assert len(store.lineage.runs) == 2
    with pytest.raises(StoreMismatchError, match="a single training"):
        forget(model, store, FORGET, UnrolledInfluence())
    found = forget(first, store, FORGET, UnrolledInfluence())
    torch.testing.assert_close(
        flat(found) - flat(first), flat(twin(initial, store, FORGET, steps=STEPS)) - flat(first), rtol=0, atol=1e-6
    )


class Clamped(Callback):
    def on_train_batch_end(self, trainer, module, *args):
        with torch.no_grad():
            module.net[0].weight.clamp_(-0.2, 0.2)


@pytest.mark.filterwarnings("ignore:Something other than an optimizer:lightning_unlearn.exceptions.UnlearningWarning")
def test_weights_that_something_else_moved_are_refused(tmp_path):
    model = Regressor()
    _, store = fit(tmp_path / "s", model, trainer={"callbacks": [Clamped()]})
    with pytest.raises(StoreMismatchError, match="moved by its optimizer alone"):
        forget(model, store, FORGET, UnrolledInfluence())


def test_two_optimizers_are_refused(tmp_path):
    class Two(Regressor):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD([one], lr=0.01) for one in self.net.parameters()]

    model = Two()
    _, store = fit(tmp_path / "s", model)
    with pytest.raises(UnsupportedStrategyError, match="manual optimization"):
        forget(model, store, FORGET, UnrolledInfluence())
