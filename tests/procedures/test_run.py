"""The pass as a whole: refusals before changes, rollback, repair that is recorded, lineage, and the twin."""

import copy
import dataclasses
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from lightning import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_unlearn.api import unlearn
from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.callbacks.subject_grouping import SubjectGrouping
from lightning_unlearn.deltas.ledger import DeletionLedger
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.exceptions import (
    DeletionRequestError,
    MissingRequirementError,
    StoreMismatchError,
    UnlearningWarning,
    UnsupportedStrategyError,
)
from lightning_unlearn.methods import Amnesiac, FineTune, PartialAmnesiac, Retrain, WeightEdit
from lightning_unlearn.procedures.planning import warn_of_plan
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.parameters import weights_digest
from tests.helpers.models import quiet_trainer
from tests.helpers.recorded import BATCH, EPOCHS, XYClassifier, batches_of, datasets, loaders, record

# Sixty-four rows in twenty-four steps: every plan has something to warn of, which is not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*took part in.*:lightning_unlearn.exceptions.UnlearningWarning")


@pytest.fixture
def trained(tmp_path):
    return record(tmp_path)


class Wreck(WeightEdit):
    """Replaces what the model knows by noise."""

    guarantee, source = "heuristic", "test"

    def compute_edit(self, context):
        generator = torch.Generator().manual_seed(0)
        return {
            name: 10 * torch.randn(parameter.shape, generator=generator)
            for name, parameter in context.module.named_parameters()
            if parameter.requires_grad
        }


def same(one, other):
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return all(torch.equal(a, b) for (_, a), (_, b) in pairs)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "at least one"), ([1, 1], r"repeats|duplicate|twice|once"), ([999], "unknown"), ([1.5], "int")],
)
def test_bad_ids_are_one_clear_error(trained, ids, message):
    with pytest.raises(DeletionRequestError, match=message):
        unlearn(trained.model, ids, method=Amnesiac(), data=loaders(), store=trained.url, force=True)


def test_a_destructive_plan_is_refused_and_can_be_forced(trained):
    before, entries = weights_digest(trained.model), len(DeletionLedger.open(trained.store).entries)
    with pytest.raises(DeletionRequestError, match="force=True"):
        unlearn(trained.model, list(range(20)), method=Amnesiac(), data=loaders(), store=trained.url)
    assert weights_digest(trained.model) == before
    assert len(DeletionLedger.open(trained.store).entries) == entries


def test_a_store_of_another_model_is_refused(trained):
    class Other(XYClassifier):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(2, 2)

    with pytest.raises(StoreMismatchError, match="extra"):
        unlearn(Other(), [1], method=Amnesiac(), data=loaders(), store=trained.url, force=True)


def test_weights_the_store_does_not_know_are_refused(trained):
    moved = copy.deepcopy(trained.model)
    with torch.no_grad():
        next(moved.parameters()).add_(1e-3)
    with pytest.raises(StoreMismatchError, match="weights"):
        unlearn(moved, [1], method=Amnesiac(), data=loaders(), store=trained.url, force=True)


def test_positions_in_another_dataset_are_refused(trained):
    train, _ = datasets()
    shorter = DataLoader(torch.utils.data.TensorDataset(*(t[:-1] for t in train.tensors)), BATCH)
    with pytest.raises(StoreMismatchError, match="64 samples"):
        unlearn(trained.model, [1], method=Amnesiac(), data=shorter, store=trained.url, force=True)


def test_a_request_already_honoured_is_refused_on_the_new_model_only(trained):
    settings = {"method": Amnesiac(), "store": trained.url, "force": True}
    first = unlearn(trained.model, [1], data=loaders(), **settings)
    with pytest.raises(DeletionRequestError, match=first.entry_id):
        unlearn(first.model, [1], data=loaders(), **settings)
    # The original still holds the sample; forgetting it there again is a new request on those weights.
    again = unlearn(trained.model, [1], data=loaders(), **settings)
    assert same(again.model, first.model)


def test_a_model_that_is_no_lightning_module(trained):
    with pytest.raises(TypeError, match="LightningModule"):
        unlearn(nn.Linear(2, 2), [1], method=Amnesiac(), data=loaders(), store=trained.url)


def test_subtracting_buffers_needs_recorded_buffers(trained):
    with pytest.raises(MissingRequirementError, match="buffers"):
        unlearn(trained.model, [1], method=Amnesiac(), data=loaders(), store=trained.url, batch_norm="subtract")


# --- trainers -----------------------------------------------------------------------------------------------------


def test_a_finished_trainer_is_not_run_for_zero_steps(trained):
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(XYClassifier(), loaders()["train"])
    with pytest.raises(ValueError, match="already run"):
        unlearn(trained.model, [1], method=FineTune(max_steps=5), data=loaders(), trainer=trainer)


def test_one_trainer_is_good_for_one_stage_with_its_own_limits(trained):
    with pytest.raises(ValueError, match="2 fits"):
        unlearn(
            trained.model, [1], method=FineTune(max_steps=5), data=loaders(), then=FineTune(max_steps=5),
            trainer=quiet_trainer(max_steps=5, max_epochs=-1),
        )  # fmt: skip
    with pytest.raises(MissingRequirementError, match="max_steps=5"):
        unlearn(trained.model, [1], method=FineTune(max_steps=5), data=loaders(), trainer=quiet_trainer())
    own = quiet_trainer(max_steps=5, max_epochs=-1)
    result = unlearn(trained.model, [1], method=FineTune(max_steps=5), data=loaders(), trainer=own)
    assert result.stages[0].steps == own.global_step == 5


def test_a_factory_is_called_with_the_limits_of_the_method(trained):
    calls = []

    def factory(**overrides):
        calls.append(overrides)
        return quiet_trainer(**{"max_epochs": -1, **overrides})

    unlearn(
        trained.model, [1], method=FineTune(max_steps=3), data=loaders(), trainer=factory, then=FineTune(max_steps=2)
    )
    assert [call["max_steps"] for call in calls] == [3, 2]


# --- damage -------------------------------------------------------------------------------------------------------


def test_a_collapsed_model_is_rolled_back(trained):
    with pytest.warns(UnlearningWarning, match="returned unchanged"):
        result = unlearn(trained.model, [1], method=Wreck(), data=loaders(), store=trained.url)
    assert result.rolled_back
    assert same(result.model, trained.model)
    assert not same(result.candidate, trained.model)
    assert result.entry_id is None
    probe = result.stages[0]
    assert probe.probe_before["accuracy"] - probe.probe_after["accuracy"] > 0.05


def test_rollback_leaves_no_trace_in_store_and_ledger(trained):
    steps = trained.store.n_steps
    with pytest.warns(UnlearningWarning):
        result = unlearn(
            trained.model, [1], method=Wreck(), data=loaders(), store=trained.url, then=FineTune(max_steps=1)
        )
    assert result.rolled_back
    assert trained.store.n_steps == steps
    assert trained.store.state_of(weights_digest(result.candidate)) is None
    # The original is as before: it can be asked again.
    again = unlearn(trained.model, [1], method=Amnesiac(), data=loaders(), store=trained.url, force=True)
    assert again.entry_id is not None


def test_an_exception_in_a_later_stage_leaves_the_store_as_it_was(trained):
    class Broken(FineTune):
        def step(self, host, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("power cut")
            return super().step(host, batch, batch_idx)

    steps, states = trained.store.n_steps, len(trained.store.lineage.states)
    with pytest.raises(RuntimeError, match="power cut"):
        unlearn(
            trained.model, [1], method=Amnesiac(), data=loaders(), store=trained.url, force=True, probe_samples=0,
            then=Broken(max_steps=5),
        )  # fmt: skip
    assert trained.store.n_steps == steps
    assert len(trained.store.lineage.states) == states
    assert all(entry.undone for entry in DeletionLedger.open(trained.store).entries)
    assert trained.store.verify().ok


def test_a_validation_step_without_validation_data_is_no_noise(trained):
    class Validating(XYClassifier):
        def validation_step(self, batch, batch_idx):
            raise AssertionError("a pass does not validate")

    model = Validating()
    unlearn(model, [1], method=FineTune(max_steps=2), data=loaders()["train"])


def test_force_keeps_the_damaged_model(trained):
    with pytest.warns(UnlearningWarning, match="as asked"):
        result = unlearn(trained.model, [1], method=Wreck(), data=loaders(), force=True)
    assert not result.rolled_back
    assert not same(result.model, trained.model)


# --- repair, lineage ----------------------------------------------------------------------------------------------


def test_repair_steps_are_recorded_and_can_be_forgotten_later(trained):
    steps = trained.store.n_steps
    first = unlearn(
        trained.model, [1], method=Amnesiac(), data=loaders(), store=trained.url, force=True, seed=3,
        then=FineTune(max_steps=12),
    )  # fmt: skip
    assert [stage.name for stage in first.stages] == ["Amnesiac", "batch_norm", "FineTune"]
    assert first.stages[-1].steps == 12
    store = trained.store
    assert store.n_steps == steps + 12
    state = store.state_of(weights_digest(first.model))
    assert state.ranges == ((0, steps), (steps, steps + 12)) or state.ranges == ((0, steps + 12),)
    assert state.edits == (first.entry_id,)
    repaired_with = {sample for step in range(steps, steps + 12) for sample in store.record(step).sample_ids}
    assert 1 not in repaired_with
    asked = next(iter(sorted(repaired_with)))
    plan = DeletionRequest([asked]).plan(store, first.model)
    assert any(step >= steps for step in plan.steps)
    second = unlearn(first.model, [asked], method=Amnesiac(), data=loaders(), store=trained.url, force=True)
    assert second.entry_id is not None


def test_undo_brings_the_weights_back(trained):
    result = unlearn(
        trained.model, [1], method=Amnesiac(), data=loaders(), store=trained.url, force=True, batch_norm="keep"
    )
    assert not same(result.model, trained.model)
    DeletionLedger.open(trained.store).undo(result.entry_id, result.model)
    largest = max(float(p.detach().abs().max()) for p in trained.model.parameters())
    for (name, mine), (_, theirs) in zip(
        result.model.named_parameters(), trained.model.named_parameters(), strict=True
    ):
        # One rounding down and one up again.
        assert float((mine - theirs).detach().abs().max()) <= torch.finfo(torch.float32).eps * largest, name


def test_keys_survive_that_the_data_of_the_subject_is_gone(tmp_path):
    keys = [f"user-{row // 4}" for row in range(64)]
    trained = record(tmp_path, sample_keys=keys)
    result = unlearn(
        trained.model, ["user-3"], method=PartialAmnesiac(keep=0.1), data=loaders(), store=trained.url, force=True,
        sample_keys=keys, then=FineTune(max_steps=2),
    )  # fmt: skip
    assert result.entry_id is not None
    assert set(result.plan.request.sample_ids) == {"user-3"}
    recorded = trained.store
    fresh = {sample for step in range(24, 26) for sample in recorded.record(step).sample_ids}
    assert fresh
    assert "user-3" not in fresh
    assert fresh <= set(keys)


def row_names(batch):
    """What a batch says of itself: rows are told by their first feature."""
    first = datasets()[0].tensors[0][:, 0].tolist()
    return [f"row-{first.index(value)}" for value in batch[0][:, 0].tolist()]


def test_batches_that_name_their_samples_need_keys_for_the_split_alone(tmp_path):
    trained = record(tmp_path, sample_id=row_names)
    settings = {"method": Amnesiac(), "data": loaders(), "store": trained.url, "force": True, "probe_samples": 0}
    settings |= {"sample_keys": [f"row-{row}" for row in range(64)], "then": FineTune(max_steps=2)}
    result = unlearn(trained.model, ["row-5"], sample_id=row_names, **settings)
    assert trained.store.state_of(weights_digest(result.model)).edits == (result.entry_id,)
    assert "row-5" not in trained.store.ids_in(range(24, 26))
    with pytest.warns(UnlearningWarning, match="not recorded.*`sample_id`"):
        unlearn(trained.model, ["row-6"], **settings)


@pytest.mark.parametrize("identity", ["key", "position"])
def test_data_split_by_other_ids_than_the_stores_is_refused(tmp_path, identity):
    """Integer keys are positions as well: of other samples, which would be repaired on and forgotten in part."""
    keys = [(row + 7) % 64 for row in range(64)]
    trained = record(tmp_path, sample_keys=keys if identity == "key" else None)
    error, given = (MissingRequirementError, {}) if identity == "key" else (StoreMismatchError, {"sample_keys": keys})
    with pytest.raises(error, match=f"sample_keys.*{identity}"):
        unlearn(trained.model, [5], method=Amnesiac(), data=loaders(), store=trained.url, force=True, **given)
    assert not trained.store.lineage.entries


def train_on_two(url):
    torch.manual_seed(0)
    model = XYClassifier()
    recorder = DeltaRecorder(url, keep=1.0, value_dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own, about synchronised logging
        train = DataLoader(datasets()[0], BATCH, shuffle=True)
        quiet_trainer(strategy="ddp", devices=2, max_epochs=2, callbacks=[recorder]).fit(model, train)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_trained_on_two_processes_unlearned_and_repaired_on_one(gloo_pool, tmp_path):
    url = str(tmp_path / "store")
    model = XYClassifier()
    model.load_state_dict(gloo_pool.run(train_on_two, url)[0])
    steps = DeltaStore.open(url).n_steps
    settings = {"method": Amnesiac(), "store": url, "force": True, "probe_samples": 0, "batch_norm": "keep"}
    first = unlearn(model, [1], data=loaders(), then=FineTune(max_steps=3), **settings)
    store = DeltaStore.open(url)
    assert store.n_steps == steps + 3
    assert store.verify().ok
    state = store.state_of(weights_digest(first.model))
    assert state.edits == (first.entry_id,)
    # Initial weights, all steps, minus what was subtracted: from the parts of both ranks and of the joined writer.
    expected = store.initial_weights()
    names = [layer.name for layer in store.signature.layers]
    gone = first.plan.amounts
    for step in range(store.n_steps):
        for delta in store.read(step).values():
            flat = expected[names[delta.layer]].double().view(-1)
            share = 1.0 - gone.get(step, 0.0)
            index = torch.arange(flat.numel()) if delta.indices is None else delta.indices
            flat = flat.index_add(0, index, share * delta.values.double())
            expected[names[delta.layer]] = flat.view_as(expected[names[delta.layer]])
    for name, parameter in first.model.named_parameters():
        assert torch.allclose(parameter.double(), expected[name].double(), atol=5e-7), name
    repaired_with = sorted({sample for step in range(steps, steps + 3) for sample in store.record(step).sample_ids})
    assert 1 not in repaired_with
    second = unlearn(first.model, repaired_with[:1], data=loaders(), **settings)
    assert second.entry_id is not None
    # And an ordinary training goes on from there.
    recorder = DeltaRecorder(url, keep=1.0, value_dtype="float32")
    quiet_trainer(max_epochs=1, callbacks=[recorder]).fit(second.model, loaders()["train"])
    assert DeltaStore.open(url).tip.edits == (first.entry_id, second.entry_id)
    assert DeltaStore.open(url).n_steps == steps + 3 + 8


def test_a_model_in_eval_mode_is_repaired_as_in_training(trained):
    """Whoever evaluated the model before left it in eval mode, which is not how it is to be trained."""
    quiet = copy.deepcopy(trained.model).eval()
    settings = {"method": FineTune(max_steps=4), "data": loaders(), "seed": 0}
    one, other = (unlearn(model, [1], **settings).model for model in (trained.model, quiet))
    for (name, value), (_, expected) in zip(other.state_dict().items(), one.state_dict().items(), strict=True):
        assert torch.equal(value, expected), name
    assert not any(module.training for module in other.modules())
    assert "Linear" not in repr(unlearn(quiet, [1], **settings))


def test_the_result_is_attached_to_nothing(trained):
    result = unlearn(trained.model, [1], method=FineTune(max_steps=2), data=loaders())
    with pytest.raises(RuntimeError, match="not attached"):
        _ = result.model.trainer


def test_leftovers_name_the_store_and_older_states(trained):
    states = len(trained.store.lineage.states) - 1  # all but the initial weights, which saw nothing
    result = unlearn(
        trained.model, [1], method=Amnesiac(), data=loaders(), store=trained.url, force=True,
        then=FineTune(max_steps=2),
    )  # fmt: skip
    text = " ".join(result.leftovers)
    assert trained.url in text
    assert f"{states} recorded model states" in text
    assert "DeletionLedger.purge" in text
    assert "optimizer state" in text
    assert "EMA" in text
    tuned = unlearn(trained.model, [1], method=FineTune(max_steps=2), data=loaders(), store=trained.url)
    assert "DeltaStore.purge" in " ".join(tuned.leftovers)


def test_what_was_recorded_since_the_store_was_opened_survives_a_rollback(trained):
    opened, original = trained.store, copy.deepcopy(trained.model)
    assert opened.lineage.states
    quiet_trainer(max_epochs=1, callbacks=[DeltaRecorder.like(opened)]).fit(trained.model, loaders()["train"])
    steps, states = trained.store.n_steps, trained.store.lineage.states
    with pytest.warns(UnlearningWarning, match="returned unchanged"):
        assert unlearn(original, [1], method=Wreck(), data=loaders(), store=opened).rolled_back
    assert trained.store.n_steps == steps
    assert trained.store.lineage.states == states


def test_a_module_that_cannot_be_copied_is_refused(trained):
    trained.model.last = next(trained.model.parameters()).sum()  # a tensor with a gradient history
    with pytest.raises(UnsupportedStrategyError, match="deepcopy"):
        unlearn(trained.model, [1], method=Amnesiac(), data=loaders(), store=trained.url, force=True)
    assert not trained.store.lineage.entries


def test_an_edit_is_recorded_by_one_process_only(trained, monkeypatch):
    settings = {"method": Amnesiac(), "data": loaders(), "store": trained.url, "force": True, "probe_samples": 0}
    two = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    with pytest.raises(UnsupportedStrategyError, match="devices=1"):
        unlearn(trained.model, [1], then=FineTune(max_steps=1), trainer=two, **settings)
    assert all(entry.undone for entry in trained.store.lineage.entries)
    monkeypatch.setattr("lightning_unlearn.procedures.run.process_rank", lambda: 1)
    with pytest.raises(UnsupportedStrategyError, match="rank 0"):
        unlearn(trained.model, [1], **settings)


def test_an_edit_without_deltas_has_nothing_to_add_back(trained):
    class Nudge(WeightEdit):
        guarantee, source = "heuristic", "test"

        def compute_edit(self, context):
            return {"net.0.bias": torch.full((16,), 1e-3)}

    # Unforced, and no warning: what the store predicts of a subtraction says nothing about this edit.
    many = list(range(30))
    assert DeletionRequest(many).plan(trained.store).refuses
    result = unlearn(trained.model, many, method=Nudge(), data=loaders(), store=trained.url)
    entry = DeletionLedger.open(trained.store).entries[-1]
    assert entry.entry_id == result.entry_id
    assert dict(entry.amounts) == {}


# --- BatchNorm ----------------------------------------------------------------------------------------------------


def test_batch_norm_policies(tmp_path):
    trained = record(tmp_path, buffers="record")
    settings = {"method": Amnesiac(), "store": trained.url, "force": True, "probe_samples": 0}
    kept = unlearn(trained.model, [1, 2], data=loaders(), batch_norm="keep", **settings).model
    fresh = unlearn(trained.model, [1, 2], data=loaders(), batch_norm="reestimate", **settings).model
    less = unlearn(trained.model, [1, 2], data=loaders(), batch_norm="subtract", **settings).model
    norm = "net.1.running_mean"
    assert torch.equal(kept.state_dict()[norm], trained.model.state_dict()[norm])
    assert same(kept, fresh)
    assert same(kept, less)
    assert not torch.equal(less.state_dict()[norm], kept.state_dict()[norm])
    assert (less.state_dict()["net.1.running_var"] >= 0).all()
    # The mean over the retain data, through the unlearned first layer; the last batch is smaller, so not exactly.
    train, _ = datasets()
    rows = [row for row in range(64) if row not in (1, 2)]
    mean = fresh.net[0](train.tensors[0][rows]).mean(0)
    gap = (fresh.state_dict()[norm] - mean).abs().max()
    assert gap < 0.1
    assert gap < 0.5 * (kept.state_dict()[norm] - mean).abs().max()


# --- retraining ---------------------------------------------------------------------------------------------------


def hand_written_twin(left_out):
    """The training of `record`, in a plain loop, without some samples."""
    torch.manual_seed(0)
    model = XYClassifier()
    optimizer = model.configure_optimizers()
    train, _ = datasets()
    for epoch in range(EPOCHS):
        for batch in batches_of(epoch):
            x, y = train[[row for row in batch.tolist() if row not in left_out]]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


def test_retrain_is_the_twin_of_the_run_bit_for_bit(trained):
    result = unlearn(
        trained.model, [3, 17], method=Retrain(), data=loaders(), store=trained.url, trainer={"max_epochs": EPOCHS},
        probe_samples=0,
    )  # fmt: skip
    assert result.stages[0].steps == EPOCHS * 8
    assert same(result.model, hand_written_twin({3, 17}))
    assert not same(result.model, trained.model)


def test_retrain_from_a_factory_and_in_fresh_order(trained):
    with pytest.raises(MissingRequirementError, match="module_factory"):
        unlearn(trained.model, [3], method=Retrain(), data=loaders())
    seen = []

    class Watching(XYClassifier):
        def training_step(self, batch, batch_idx):
            seen.extend(batch[0][:, 0].tolist())
            return super().training_step(batch, batch_idx)

    result = unlearn(
        trained.model, [3], method=Retrain(module_factory=Watching, order="fresh"), data=loaders(), seed=5,
        trainer={"max_epochs": 1}, probe_samples=0,
    )  # fmt: skip
    first = datasets()[0].tensors[0][:, 0]
    assert type(result.model) is Watching
    assert sorted(seen) == sorted(value for row, value in enumerate(first.tolist()) if row != 3)


# --- any module ---------------------------------------------------------------------------------------------------


class ManualPair(LightningModule):
    """Manual optimization with two optimizers; no loss is returned and batches are dicts."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = nn.Linear(6, 3), nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        for optimizer, layer in zip(self.optimizers(), (self.one, self.two), strict=True):
            loss = torch.nn.functional.cross_entropy(layer(batch["x"]), batch["y"])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("loss", loss)

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.one, self.two)]


class DictData(LightningDataModule):
    """A datamodule whose batches are dicts."""

    def __init__(self):
        super().__init__()
        train, _ = datasets()
        self.rows = [{"x": x, "y": y} for x, y in train]

    def train_dataloader(self):
        return DataLoader(self.rows, BATCH, shuffle=True)


def test_manual_optimization_and_dict_batches(tmp_path):
    torch.manual_seed(0)
    model, url = ManualPair(), str(tmp_path / "store")
    recorder = DeltaRecorder(url, keep=1.0, value_dtype="float32")
    quiet_trainer(max_epochs=1, callbacks=[recorder]).fit(model, datamodule=DictData())
    result = unlearn(
        model, [2], method=Amnesiac(), data=DictData(), store=url, force=True, then=FineTune(max_steps=4), seed=0
    )
    assert result.stages[-1].steps == 4
    assert result.model.automatic_optimization is False
    assert not same(result.model, model)
    # No logits, no loss: that nothing was probed is said, and not passed over as "fine".
    assert any("neither an accuracy nor a loss" in note for note in result.notes)


def test_the_saved_result_loads_without_this_package(trained, tmp_path):
    result = unlearn(trained.model, [1], method=Amnesiac(), data=loaders(), store=trained.url, force=True)
    path = tmp_path / "forgotten.ckpt"
    result.save(path)
    torch.save(dict(result.model.named_parameters()), tmp_path / "expected.pt")
    code = f"""
    import sys, torch, warnings
    sys.modules["lightning_unlearn"] = None
    from torch import nn
    from lightning import LightningModule

    class XYClassifier(LightningModule):
        def __init__(self, lr, momentum):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
            self.fixed = nn.Linear(2, 2)

    model = XYClassifier.load_from_checkpoint({str(path)!r}, map_location="cpu")
    expected = torch.load({str(tmp_path / "expected.pt")!r})
    assert all(torch.equal(value, expected[name]) for name, value in model.named_parameters())
    assert "optimizer_states" not in torch.load({str(path)!r}, weights_only=True)
    print("loaded")
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)  # noqa: S603
    assert out.stdout.strip() == "loaded", out.stderr


@pytest.mark.parametrize("force", [False, True])
def test_plain_sgd_is_always_warned_of(tmp_path, force):
    plain = record(tmp_path, momentum=0.0)
    tiny = PartialAmnesiac(keep=0.001, scale="share")
    with pytest.warns(UnlearningWarning, match="SGD without momentum"):
        unlearn(plain.model, [1], method=tiny, data=loaders(), store=plain.url, force=force, probe_samples=0)


@pytest.mark.parametrize(
    ("damage", "specificity", "repaired", "warns"),
    [
        ("fine", "specific", False, False),
        ("note", "note", False, False),
        ("warn", "specific", False, True),
        ("warn", "specific", True, False),
        ("strong", "specific", True, True),
        ("fine", "warn", True, True),
        # Refused: an exception said so before it was forced.
        ("refuse", "specific", True, False),
        ("strong", "refuse", False, False),
    ],
)
def test_what_a_plan_warns_of(trained, damage, specificity, repaired, warns):
    plan = DeletionRequest([1]).plan(trained.store, trained.model)
    plan = dataclasses.replace(plan, damage=damage, specificity=specificity, plain_sgd=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_plan(plan, repaired=repaired)
    assert [str(item.message) for item in caught] == ([plan.recommendation] if warns else [])


def test_a_pass_without_trouble_is_quiet(tmp_path):
    grouping = SubjectGrouping([f"user-{row // 4}" for row in range(64)], max_share=0.5)
    keys = [f"user-{row // 4}" for row in range(64)]
    shuffled = DataLoader(datasets()[0], BATCH, shuffle=True)
    trained = record(tmp_path, callbacks=[grouping], sample_keys=keys, train=shuffled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=r".*LeafSpec.*", category=FutureWarning)
        result = unlearn(
            trained.model, ["user-3"], method=PartialAmnesiac(keep=0.01), data=loaders(), store=trained.url,
            sample_keys=keys, then=FineTune(max_steps=3), seed=0,
        )  # fmt: skip
    assert result.plan.specificity == "specific"
    assert not result.rolled_back
