"""Going back to the user's own checkpoints, against a training that never saw the samples."""

import copy

import pytest
import torch
from lightning import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_unlearn.api import unlearn
from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.callbacks.leave_out import LeaveOut
from lightning_unlearn.exceptions import MissingRequirementError, StoreMismatchError
from lightning_unlearn.methods import Amnesiac, Retrain, Rewind
from lightning_unlearn.methods.rewind import plan_rewind
from lightning_unlearn.store.delta_store import DeltaStore
from tests.helpers.models import quiet_trainer
from tests.helpers.recorded import BATCH, ROWS, EpochOrder, XYClassifier, datasets

EPOCHS, LATE, NEW = 5, 3, frozenset(range(50, ROWS))
SETTINGS = {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1}


class Growing(EpochOrder):
    """New rows come in from the fourth epoch on; with a seed the order depends on the epoch alone."""

    def __init__(self, fixed=True):
        super().__init__()
        self.fixed = fixed

    def __iter__(self):
        order = list(super().__iter__()) if self.fixed else torch.randperm(ROWS).tolist()
        return iter([row for row in order if self.epoch >= LATE or row not in NEW])

    def __len__(self):
        return ROWS if self.epoch >= LATE else ROWS - len(NEW)


def loader(fixed=True):
    return DataLoader(datasets()[0], BATCH, sampler=Growing(fixed))


def fit(folder=None, *callbacks, fixed=True):
    seed_everything(1, verbose=False)
    model = XYClassifier()
    initial = copy.deepcopy(model)
    settings = {"enable_checkpointing": False}
    if folder is not None:
        saving = ModelCheckpoint(folder / "ckpt", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        middle = ModelCheckpoint(folder / "middle", filename="{step}", save_top_k=-1, every_n_train_steps=3)
        callbacks = [*callbacks, DeltaRecorder(folder / "s", keep=1.0, value_dtype="float32"), saving, middle]
        settings = {"enable_checkpointing": True}
    quiet_trainer(max_epochs=EPOCHS, callbacks=list(callbacks), reload_dataloaders_every_n_epochs=1, **settings).fit(
        model, loader(fixed)
    )
    return model, initial


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewind")
    model, _ = fit(folder)
    return model, DeltaStore.open(folder / "s"), folder


def rewind(trained, forget, **method):
    model, store, folder = trained
    method = Rewind(**{"checkpoints": folder, **method})
    trainer = {**SETTINGS, "reload_dataloaders_every_n_epochs": 1}
    return unlearn(model, forget, method=method, store=store, data=loader(), trainer=trainer, probe_samples=0)


def test_the_plan_names_the_last_checkpoint_before_the_samples_came(trained):
    model, store, folder = trained
    plan = plan_rewind(store, model, [51], [folder])
    per_epoch = -(-(ROWS - len(NEW)) // BATCH)
    assert plan.checkpoint == str(folder / "ckpt" / f"epoch={LATE - 1}.ckpt")
    assert plan.steps_before == LATE * per_epoch
    assert plan.steps == store.n_steps > plan.steps_before
    assert plan.first_touched == min(store.steps_of([51]))
    assert plan.seconds_saved == pytest.approx(sum(store.record(step).seconds for step in range(plan.steps_before)))
    assert f"{plan.steps_before} of {plan.steps} steps" in str(plan)


@pytest.mark.parametrize("order", ["same", "recorded"])
def test_the_result_is_the_training_that_never_saw_them(trained, order):
    forget = [51, 60, 63]
    twin, _ = fit(None, LeaveOut(forget))
    result = rewind(trained, forget, order=order)
    for (name, one), (_, other) in zip(result.model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert not torch.equal(result.model.net[0].weight, trained[0].net[0].weight)
    assert result.stages[0].steps == trained[1].n_steps  # of which those in the checkpoint were not made again


def test_without_a_checkpoint_before_them_the_step_is_named(trained):
    model, store, folder = trained
    first = min(store.steps_of([3]))
    with pytest.raises(MissingRequirementError, match=f"no step from {first} on"):
        rewind(trained, [3])
    with pytest.raises(MissingRequirementError, match="none"):
        plan_rewind(store, model, [51], [folder / "middle" / "step=3.ckpt"])  # in mid-epoch


def test_checkpoints_of_another_recording_do_not_count(trained, tmp_path):
    fit(tmp_path)
    model, store, _ = trained
    with pytest.raises(MissingRequirementError, match="none"):
        plan_rewind(store, model, [51], [tmp_path / "ckpt"])


@pytest.mark.filterwarnings("ignore:.*took part in.*:lightning_unlearn.exceptions.UnlearningWarning")
def test_weights_that_rest_on_an_edit_are_refused(tmp_path):
    model, _ = fit(tmp_path)
    store = DeltaStore.open(tmp_path / "s")
    edited = unlearn(model, [51], method=Amnesiac(), store=store, data=loader(), probe_samples=0, force=True).model
    with pytest.raises(StoreMismatchError, match="rest on a subtraction"):
        plan_rewind(store, edited, [52], [tmp_path])


def test_a_twin_from_the_start_agrees(trained):
    model, store, _ = trained
    trainer = {**SETTINGS, "reload_dataloaders_every_n_epochs": 1}
    again = unlearn(
        model, [51], method=Retrain(), store=store, data=loader(), trainer=trainer, probe_samples=0, record=False
    ).model
    found = rewind(trained, [51]).model
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), found.parameters(), strict=True))
