"""Trainers of a pass, as users write their arguments: what they watch for in training does not fit an errand."""

import pytest
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

from lightning_unlearn.api import unlearn
from lightning_unlearn.deltas.ledger import DeletionLedger
from lightning_unlearn.exceptions import MissingRequirementError, UnsupportedStrategyError
from lightning_unlearn.methods import Amnesiac, FineTune, Retrain
from lightning_unlearn.procedures.trainers import TrainerSource
from tests.helpers.models import quiet_trainer
from tests.helpers.recorded import XYClassifier, loaders, record

pytestmark = pytest.mark.filterwarnings("ignore:.*took part in.*:lightning_unlearn.exceptions.UnlearningWarning")

MONITORING = [EarlyStopping("val_loss"), ModelCheckpoint(monitor="val_loss")]


@pytest.mark.parametrize("callback", MONITORING, ids=lambda callback: type(callback).__name__)
@pytest.mark.parametrize("given", ["arguments", "trainer", "factory"])
def test_callbacks_that_wait_for_a_metric_are_refused(tmp_path, callback, given):
    trained = record(tmp_path, epochs=1)

    def factory(**overrides):
        return quiet_trainer(**{"callbacks": [callback], "enable_checkpointing": True, "max_epochs": -1, **overrides})

    trainer = {"arguments": {"callbacks": callback}, "trainer": factory(max_steps=2), "factory": factory}[given]
    name = type(callback).__name__
    with pytest.raises(ValueError, match=rf"monitor a metric.* got \"{name}\(monitor='val_loss'\)\"\. Leave"):
        unlearn(
            trained.model, [1], method=Amnesiac(), data=loaders(), store=trained.url, then=FineTune(max_steps=2),
            force=True, probe_samples=0, trainer=trainer,
        )  # fmt: skip
    assert all(entry.undone for entry in DeletionLedger.open(trained.store).entries)


def test_a_users_checkpoint_callback_switches_checkpoints_on(tmp_path):
    kept = ModelCheckpoint(tmp_path, every_n_train_steps=2, filename="repaired")
    arguments = {"accelerator": "cpu", "devices": 1, "callbacks": [kept], "max_epochs": -1}
    unlearn(XYClassifier(), [1], method=FineTune(max_steps=2), data=loaders(), trainer=arguments)
    assert (tmp_path / "repaired.ckpt").exists()
    assert TrainerSource({"accelerator": "cpu"}).make(max_epochs=1).checkpoint_callback is None
    with pytest.raises(Exception, match="enable_checkpointing=False"):
        TrainerSource({"accelerator": "cpu", "callbacks": kept, "enable_checkpointing": False}).make(max_epochs=1)


@pytest.mark.parametrize("trainer", [None, {}, {"accelerator": "cpu", "callbacks": [LearningRateMonitor()]}])
def test_retraining_of_no_length_is_refused(trainer):
    with pytest.raises(MissingRequirementError, match="max_epochs"):
        unlearn(XYClassifier(), [1], method=Retrain(module_factory=XYClassifier), data=loaders(), trainer=trainer)


def test_what_cannot_be_wrapped_is_refused_before_the_edit(tmp_path):
    trained = record(tmp_path, epochs=1)
    trained.model.training_step = lambda batch, batch_idx: None
    with pytest.raises(UnsupportedStrategyError, match="replaced on the instance"):
        unlearn(
            trained.model, [1], method=Amnesiac(), data=loaders(), store=trained.url, then=FineTune(max_steps=2),
            force=True, probe_samples=0,
        )  # fmt: skip
    assert DeletionLedger.open(trained.store).entries == ()


def test_what_is_retrained_may_stop_early(tmp_path):
    trained = record(tmp_path, epochs=1)
    stopping = EarlyStopping("train_loss", patience=1, min_delta=1e9)
    arguments = {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, "max_epochs": 9, "callbacks": [stopping]}
    result = unlearn(
        trained.model, [1], method=Retrain(), data=loaders(), store=trained.url, trainer=arguments, probe_samples=0
    )
    assert result.stages[0].steps == 2 * 8
