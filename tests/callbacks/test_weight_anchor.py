"""Where the anchor of a weight-change penalty comes from, and that a resumed training is held to the same one."""

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import BaseFinetuning
from safetensors.torch import save_file

from lightning_unlearn.callbacks.anchor_sources import read_weights
from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.callbacks.unlearning_error_monitor import UnlearningErrorMonitor
from lightning_unlearn.callbacks.weight_change_penalty import WeightChangePenalty
from lightning_unlearn.exceptions import MissingRequirementError, StoreMismatchError
from lightning_unlearn.store.delta_store import DeltaStore
from tests.callbacks.penalised import STRENGTH, OwnDistance, Plain, fit, largest_difference
from tests.helpers.models import BoringClassifier, IdDataset, loader, quiet_trainer


class Saves(Callback):
    """Writes a checkpoint after every epoch, and has no state of its own in it."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"epoch={trainer.current_epoch}.ckpt")


def run(module, callbacks, epochs, ckpt_path=None, **trainer):
    """Batches in an order that does not depend on where the training begins."""
    data = loader(IdDataset(32), shuffle=False)
    quiet_trainer(callbacks=callbacks, max_epochs=epochs, **trainer).fit(module, data, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("anchor", ["initial", "moving"])
def test_a_resumed_training_has_the_anchor_of_the_whole_one(tmp_path, anchor, accumulate):
    def penalty():
        return WeightChangePenalty(STRENGTH, anchor=anchor, decay=0.9)

    windows = {"accumulate_grad_batches": accumulate}
    whole = run(Plain(), [penalty()], 4, **windows)
    run(Plain(), [penalty(), Saves(tmp_path)], 2, **windows)
    resumed = run(Plain(seed=9), [penalty()], 4, tmp_path / "epoch=1.ckpt", **windows)
    assert largest_difference(resumed, whole) == 0.0
    assert largest_difference(whole, run(Plain(), [], 4, **windows)) > 1e-3


@pytest.mark.filterwarnings("ignore:.*Please add the following callbacks:UserWarning")
def test_an_anchor_that_the_recorder_holds_is_not_in_checkpoints(tmp_path):
    def callbacks(*more):
        return [WeightChangePenalty(STRENGTH), DeltaRecorder(tmp_path / "store", keep=1.0), *more]

    # In either order: the recorder opens its store as the training starts.
    run(Plain(), callbacks(Saves(tmp_path))[::-1], 2)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["callbacks"]
    penalty = next(state for name, state in saved.items() if name.startswith("WeightChangePenalty"))
    assert penalty == {"anchor": {"store_id": DeltaStore.open(tmp_path / "store").store_id}}
    resumed = run(Plain(seed=9), callbacks(), 4, tmp_path / "epoch=1.ckpt")
    assert largest_difference(resumed, run(Plain(), [WeightChangePenalty(STRENGTH)], 4)) == 0.0
    for others in ([], [DeltaRecorder(tmp_path / "another", keep=1.0)]):
        with pytest.raises((MissingRequirementError, StoreMismatchError)):
            run(Plain(), [WeightChangePenalty(STRENGTH), *others], 4, tmp_path / "epoch=1.ckpt")


def test_a_store_that_began_with_other_weights_is_not_the_start(tmp_path):
    module = run(Plain(), [DeltaRecorder(tmp_path / "store", keep=1.0)], 1)
    continued = run(module, [WeightChangePenalty(STRENGTH), DeltaRecorder(tmp_path / "store", keep=1.0)], 1)
    alone = run(run(Plain(), [], 1), [WeightChangePenalty(STRENGTH)], 1)
    assert largest_difference(continued, alone) == 0.0


def test_a_checkpoint_written_without_it_is_refused(tmp_path):
    run(Plain(), [Saves(tmp_path)], 1)
    checkpoint = tmp_path / "epoch=0.ckpt"
    with pytest.raises(MissingRequirementError, match=r"`ckpt_path`.*as `anchor`"):
        run(Plain(), [WeightChangePenalty(STRENGTH)], 2, checkpoint)
    assert largest_difference(run(Plain(), [WeightChangePenalty(0.0)], 2, checkpoint), run(Plain(), [], 2)) == 0.0
    run(Plain(), [WeightChangePenalty(STRENGTH, anchor=checkpoint)], 2, checkpoint)


def kept_elsewhere(folder):
    """The same weights in every kind of place, and where they are found there."""
    other = Plain(seed=5)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    run(Plain(seed=5), [DeltaRecorder(folder / "store")], 1)
    trainer = quiet_trainer()
    trainer.strategy.connect(other)
    trainer.save_checkpoint(folder / "lightning.ckpt")
    torch.save(state, folder / "state.pt")
    # Tied weights are one entry in this format.
    save_file({name: tensor for name, tensor in state.items() if name != "net.tied.weight"}, folder / "s.safetensors")
    stored = DeltaStore.open(folder / "store")
    files = [folder / name for name in ("lightning.ckpt", "state.pt", "s.safetensors", "store")]
    return [state, stored, str(files[0]), *files]


def test_an_anchor_that_is_kept_elsewhere(tmp_path):
    class Held(OwnDistance):
        def on_train_start(self):
            self.start = [one.detach().clone() for one in Plain(seed=5).parameters() if one.requires_grad]

    expected = fit(Held())
    penalties = [WeightChangePenalty(STRENGTH, anchor=source) for source in kept_elsewhere(tmp_path)]
    for penalty in penalties:
        assert largest_difference(fit(Plain(), penalty), expected) < 1e-6
        assert penalty.state_dict() == {}


def test_what_is_no_anchor_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    torch.save(torch.zeros(1), tmp_path / "tensor.pt")
    torch.save({"net.inp.weight": torch.zeros(8, 6)}, tmp_path / "few.pt")
    torch.save({"state_dict": Plain().state_dict(), "made by": BoringClassifier}, tmp_path / "pickled.ckpt")
    state = Plain().state_dict()
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    for source, message in (
        (tmp_path / "nowhere", "a checkpoint file or a store"),
        (tmp_path / "folder", "consolidated"),
        (tmp_path / "tensor.pt", "weights by name"),
        (tmp_path / "few.pt", "none for 'net.scale', 'net.inp.bias'"),
        (tmp_path / "pickled.ckpt", "Save the weights alone"),
        (tmp_path / "text.ckpt", "Save the weights alone"),
    ):
        with pytest.raises(MissingRequirementError, match=message):
            fit(Plain(), WeightChangePenalty(STRENGTH, anchor=source))
    with pytest.raises(ValueError, match=r"of shape \(8, 6\) for net.inp.weight, but got \(8, 5\)"):
        fit(Plain(), WeightChangePenalty(STRENGTH, anchor={**state, "net.inp.weight": torch.zeros(8, 5)}))
    with pytest.raises(ValueError, match=r"'nothing.\*'.*There are 'net.scale'"):
        fit(Plain(), WeightChangePenalty(STRENGTH, layers=["net.*", "nothing.*"]))
    assert read_weights(state) is state


class SomeLayers(OwnDistance):
    """Holds two layers only."""

    def penalised(self, loss, logits):
        named = [(name, one) for name, one in self.named_parameters() if one.requires_grad]
        pairs = [(one, at) for (name, one), at in zip(named, self.start, strict=True) if name.startswith("net.mix")]
        pairs += [(one, at) for (name, one), at in zip(named, self.start, strict=True) if name == "net.head.bias"]
        return loss + STRENGTH * sum((one - at).pow(2).sum() for one, at in pairs)


def test_some_layers():
    penalty = WeightChangePenalty(STRENGTH, layers=["net.mix.*", "net.head.b*"])
    assert largest_difference(fit(Plain(), penalty), fit(SomeLayers())) < 1e-6


def test_two_of_them_in_one_trainer(tmp_path):
    two = [WeightChangePenalty(0.1, layers=[pattern], name=None) for pattern in ("net.mix.*", "net.head.*")]
    both = WeightChangePenalty(0.1, layers=["net.mix.*", "net.head.*"], name=None)
    assert largest_difference(fit(Plain(), *two), fit(Plain(), both)) < 1e-6


class Moving(OwnDistance):
    """A moving average in the step, written out."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches and not self.trainer.is_last_batch:
            return
        active = [one for one in self.parameters() if one.requires_grad]
        self.start = [0.9 * start + 0.1 * one.detach() for start, one in zip(self.start, active, strict=True)]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_moving_anchor_follows_the_steps(accumulate):
    found = fit(Plain(), WeightChangePenalty(STRENGTH, anchor="moving", decay=0.9), accumulate_grad_batches=accumulate)
    assert largest_difference(found, fit(Moving(), accumulate_grad_batches=accumulate)) < 1e-6


def test_a_moving_anchor_changes_nobody_elses_weights():
    state = {name: tensor.clone() for name, tensor in Plain(seed=5).state_dict().items()}
    fit(Plain(), WeightChangePenalty(STRENGTH, anchor=state), WeightChangePenalty(0.1, layers=["net.*"]))
    for name, tensor in Plain(seed=5).state_dict().items():
        assert torch.equal(state[name], tensor)


def test_the_anchor_is_the_start_whatever_the_schedule_begins_with():
    class Late(OwnDistance):
        def penalised(self, loss, logits):
            return super().penalised(loss, logits) if self.current_epoch else loss

    late = WeightChangePenalty(STRENGTH, schedule=lambda trainer: min(trainer.current_epoch, 1))
    assert largest_difference(fit(Plain(), late, max_epochs=3), fit(Late(), max_epochs=3)) < 1e-6


def test_one_copy_serves_several_callbacks():
    penalties = [WeightChangePenalty(STRENGTH), WeightChangePenalty(1.0, layers=["net.mix.*"])]
    callbacks = [penalties[0], UnlearningErrorMonitor(3), penalties[1]]
    module = fit(Plain(), *callbacks)
    values = [callback.state_dict()["anchor"]["values"] for callback in callbacks]
    assert len({one["net.mix.weight"].data_ptr() for one in values}) == 1
    assert largest_difference(module, fit(Plain(), *penalties)) == 0.0
    moving = WeightChangePenalty(STRENGTH, anchor="moving", decay=0.5, name=None)
    fit(Plain(), moving, UnlearningErrorMonitor(3))
    start = dict(Plain().named_parameters())
    assert not torch.equal(moving.state_dict()["anchor"]["values"]["net.mix.weight"], start["net.mix.weight"])


class Unfreezing(BaseFinetuning):
    """Trains the head alone in the first epoch."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net.mix)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.mix, optimizer)


def test_a_layer_that_is_unfrozen_later_is_held_to_what_it_was():
    class Own(OwnDistance):
        def on_train_start(self):
            self.start = {name: one.detach().clone() for name, one in self.named_parameters()}

        def penalised(self, loss, logits):
            pairs = [(one, self.start[name]) for name, one in self.named_parameters() if one.requires_grad]
            return loss + STRENGTH * sum((one - start).pow(2).sum() for one, start in pairs)

    penalty = WeightChangePenalty(STRENGTH)
    found, expected = fit(Plain(), Unfreezing(), penalty, max_epochs=3), fit(Own(), Unfreezing(), max_epochs=3)
    assert largest_difference(found, expected) < 1e-6
    assert "net.frozen.weight" not in penalty.state_dict()["anchor"]["values"]
