"""Anchors, threads that write, checkpoints of weights alone, and errors of one process among several."""

import gc
import pickle
import threading
import time
import warnings
import weakref

import pytest
import torch
from lightning import Callback
from torch import nn
from torch.nn import functional

from lightning_unlearn.callbacks import delta_capture, signals_at_batch_end
from lightning_unlearn.callbacks.checkpoint_tap import listen_to_checkpoints
from lightning_unlearn.callbacks.delta_capture import DeltaCapture
from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.exceptions import MissingDeltaError, StoreMismatchError, UnlearningWarning
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.step_encoder import StepEncoder
from lightning_unlearn.types import StepStatus
from lightning_unlearn.utilities.files import Files
from lightning_unlearn.utilities.parameters import weights_digest
from tests.helpers.models import BoringClassifier, IdDataset, loader, quiet_trainer
from tests.helpers.replay import assert_leads_to, replayed, same_weights

DENSE = {"keep": 1.0, "value_dtype": "float32"}


class Dropping(BoringClassifier):
    """Draws random numbers in every step."""

    def __init__(self, optimizer=None):
        super().__init__(optimizer)
        self.batches = []

    def forward(self, x):
        return functional.dropout(super().forward(x), 0.2, self.training)

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return super().training_step(batch, batch_idx)


class Cumulative(Dropping):
    """Running statistics that are averages over all batches, so that their number is part of the state."""

    def __init__(self, optimizer=None):
        super().__init__(optimizer)
        self.net.norm.momentum = None


class TwoDropping(Dropping):
    """Manual optimization: the second optimizer steps on every second batch."""

    def __init__(self, optimizer=None):
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        for optimizer in self.optimizers()[: 2 if batch_idx % 2 else 1]:
            optimizer.zero_grad()
            self.manual_backward(functional.cross_entropy(self(batch["x"]), batch["y"]))
            optimizer.step()

    def configure_optimizers(self):
        head = list(self.net.head.parameters())
        return torch.optim.AdamW(head, lr=0.01), torch.optim.SGD(self.net.inp.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Dropping(lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9)),
        lambda: Dropping(lambda parameters: torch.optim.AdamW(parameters, lr=0.01)),
        lambda: Cumulative(lambda parameters: torch.optim.SGD(parameters, lr=0.05)),
    ],
    ids=["sgd", "adamw", "cumulative average"],
)
def test_from_an_anchor_the_training_goes_on_bit_for_bit(make, tmp_path):
    torch.manual_seed(3)
    module = make()
    recorder = DeltaRecorder(tmp_path / "s", anchor_every=4, **DENSE)
    quiet_trainer(callbacks=[recorder]).fit(module, loader())
    store = DeltaStore.open(tmp_path / "s")
    assert store.anchors == [4, 8]
    for step in store.anchors:
        anchor = store.read_anchor(step)
        weights = replayed(store, [(0, step)])
        assert all(
            float((weights[name] - anchor.weights[name].double()).abs().max()) <= 1e-6
            for name, _ in module.named_parameters()
        )
        # Plain PyTorch from here on.
        again = make()
        optimizer = again.configure_optimizers()
        again.load_state_dict(anchor.weights, strict=False)
        optimizer.load_state_dict(anchor.optimizers[0])
        with torch.random.fork_rng(devices=[]):
            anchor.rng.restore()
            for index, batch in enumerate(module.batches[step:], step):
                if index == 5:  # the order of the second epoch is drawn from the same numbers
                    iter(loader()).__next__()
                optimizer.zero_grad()
                again.training_step(batch, 0).backward()
                optimizer.step()
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, again.get_parameter(name)), (step, name)
        for name, buffer in module.named_buffers():
            assert torch.equal(buffer, again.get_buffer(name)), (step, name)
    with pytest.raises(MissingDeltaError, match="anchor"):
        store.read_anchor(5)


def test_anchors_count_the_steps_of_all_optimizers(tmp_path):
    module = TwoDropping()
    recorder = DeltaRecorder(tmp_path / "s", anchor_every=3, **DENSE)
    quiet_trainer(callbacks=[recorder]).fit(module, loader())
    store = DeltaStore.open(tmp_path / "s")
    assert store.n_steps == 14
    assert store.anchors == [3, 6, 9, 12]
    for step in store.anchors:
        anchor = store.read_anchor(step)
        assert len(anchor.optimizers) == 2
        weights = replayed(store, [(0, step)])
        for name, _ in module.named_parameters():
            assert float((weights[name] - anchor.weights[name].double()).abs().max()) <= 1e-6
        heads = [state["step"] for state in anchor.optimizers[0]["state"].values()]
        assert {int(count) for count in heads} == {sum(store.record(one).optimizer == 0 for one in range(step))}


class SaveThenCrash(Callback):
    def __init__(self, path, save, crash):
        self.path, self.save, self.crash = path, save, crash

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.save:
            trainer.save_checkpoint(self.path)
        if trainer.global_step == self.crash:
            raise RuntimeError("crash")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_anchors_of_a_branch_that_was_given_up_are_gone(tmp_path):
    def fit(*callbacks, **kwargs):
        module = BoringClassifier()
        recorder = DeltaRecorder(tmp_path / "s", anchor_every=2, **DENSE)
        quiet_trainer(callbacks=[recorder, *callbacks]).fit(module, loader(), **kwargs)
        return module

    with pytest.raises(RuntimeError, match="crash"):
        fit(SaveThenCrash(tmp_path / "c.ckpt", 5, 9))
    assert DeltaStore.open(tmp_path / "s").anchors == [2, 4, 6, 8]
    before = DeltaStore.open(tmp_path / "s").read_anchor(6).weights["net.scale"]
    torch.manual_seed(77)
    fit(ckpt_path=tmp_path / "c.ckpt")
    store = DeltaStore.open(tmp_path / "s")
    assert store.anchors == [2, 4, 6, 8, 10]
    assert not torch.equal(store.read_anchor(6).weights["net.scale"], before)
    for step in store.anchors:
        weights = replayed(store, [(0, step)])
        found = store.read_anchor(step).weights
        assert all(float((weights[name] - found[name].double()).abs().max()) <= 1e-6 for name in ("net.scale",))
    assert store.verify().ok


@pytest.mark.parametrize("background", ["auto", True, False])
def test_where_it_is_written_makes_no_difference(tmp_path, background):
    def run(name, **kwargs):
        torch.manual_seed(5)
        module = BoringClassifier()
        quiet_trainer(callbacks=[DeltaRecorder(tmp_path / name, **kwargs, **DENSE)]).fit(module, loader())
        return module

    before = threading.active_count()
    plain, threaded = run("plain", background=False), run("s", background=background)
    assert same_weights(plain, threaded)
    assert threading.active_count() == before
    one, other = DeltaStore.open(tmp_path / "plain"), DeltaStore.open(tmp_path / "s")
    for step in range(10):
        deltas, others = one.read(step), other.read(step)
        assert deltas.keys() == others.keys()
        assert all(torch.equal(delta.values, others[name].values) for name, delta in deltas.items())


@pytest.mark.parametrize("background", ["auto", True, False])
def test_an_error_of_writing_ends_the_fit_and_leaves_a_sound_store(tmp_path, monkeypatch, background):
    """The disk is full from the second epoch on."""
    publish, state = Files.publish, {"full": False}

    def full(files, name, *args, **kwargs):
        if state["full"] and "segment-" in name:
            raise OSError(28, "No space left on device", name)
        publish(files, name, *args, **kwargs)

    class Fill(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            state["full"] = True

    monkeypatch.setattr(Files, "publish", full)
    module = BoringClassifier()
    recorder = DeltaRecorder(tmp_path / "s", background=background, **DENSE)
    with pytest.raises(OSError, match="No space left"):
        quiet_trainer(callbacks=[recorder, Fill()], max_epochs=4).fit(module, loader())
    assert recorder.state_dict() == {}
    monkeypatch.undo()
    store = DeltaStore.open(tmp_path / "s")
    assert store.verify().ok
    assert store.n_steps == 5
    assert store.tip.ranges == ((0, 5),)
    assert store.state_of(weights_digest(module)) is None
    store.writer().close()


class SaveWeights(Callback):
    """A checkpoint of the weights alone, in mid-epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path, weights_only=True)


def test_weights_alone_that_were_saved_in_mid_epoch_are_known(tmp_path):
    recorder = DeltaRecorder(tmp_path / "s", **DENSE)
    quiet_trainer(callbacks=[recorder, SaveWeights(tmp_path / "w.ckpt")]).fit(BoringClassifier(), loader())
    module = BoringClassifier(seed=9)
    module.load_state_dict(torch.load(tmp_path / "w.ckpt", weights_only=True)["state_dict"])
    store = DeltaStore.open(tmp_path / "s")
    state = store.state_of(weights_digest(module))
    assert state.ranges == ((0, 3),)
    assert_leads_to(store, module, state.ranges)
    plan = DeletionRequest([store.record(1).sample_ids[0]]).plan(store, module)
    assert plan.steps.tolist() == [1]


def test_the_strategy_is_left_as_it_was():
    trainer = quiet_trainer()
    heard = []
    first = listen_to_checkpoints(trainer.strategy, lambda checkpoint: heard.append(1))
    first()
    first()
    assert "save_checkpoint" not in vars(trainer.strategy)
    mine = trainer.strategy.save_checkpoint = lambda checkpoint, path: heard.append(path)
    second = listen_to_checkpoints(trainer.strategy, lambda checkpoint: heard.append(2))
    trainer.strategy.save_checkpoint({}, "there")
    second()
    assert heard == [2, "there"]
    assert trainer.strategy.save_checkpoint is mine


class FailAt(Callback):
    def __init__(self, batch, ranks):
        self.batch, self.ranks = batch, ranks

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch and trainer.global_rank in self.ranks:
            raise RuntimeError("deliberate")


def ddp_failing(url, anchor_every):
    torch.manual_seed(1)
    module = BoringClassifier()
    callbacks = [DeltaRecorder(url, anchor_every=anchor_every, **DENSE), FailAt(2, (0, 1))]
    trainer = quiet_trainer(strategy="ddp", devices=2, callbacks=callbacks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.fit(module, loader(IdDataset(43), batch_size=4))
        except RuntimeError as error:
            return str(error), {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    return "", None


def test_an_error_on_every_process_leaves_weights_that_are_known_and_anchors(gloo_pool, tmp_path):
    ranks = gloo_pool.run(ddp_failing, str(tmp_path / "s"), 2)
    assert [message for message, _ in ranks] == ["deliberate", "deliberate"]
    store = DeltaStore.open(tmp_path / "s")
    assert store.n_steps == 3
    module = BoringClassifier()
    module.load_state_dict(ranks[0][1])
    assert store.state_of(weights_digest(module)).ranges == ((0, 3),)
    assert_leads_to(store, module)
    assert store.anchors == [2]
    first, second = store.read_anchor(2), store.read_anchor(2, rank=1)
    assert first.weights.keys() == second.weights.keys()
    assert all(torch.equal(tensor, second.weights[name]) for name, tensor in first.weights.items())
    assert first.rng is not None
    assert second.rng is not None


def test_a_frozen_base_model_is_in_no_anchor(tmp_path):
    class Few(BoringClassifier):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(300, 20).requires_grad_(False)

    module = Few()
    quiet_trainer(callbacks=[DeltaRecorder(tmp_path / "s", anchor_every=5)]).fit(module, loader())
    store = DeltaStore.open(tmp_path / "s")
    assert {"base.weight", "base.bias"} <= set(store.frozen)
    assert set(store.read_anchor(5).weights) == {*store.initial_weights(), "net.norm.num_batches_tracked"}


def fit_resuming(store, path, **kwargs):
    quiet_trainer(max_epochs=4, callbacks=[DeltaRecorder(store, **DENSE)]).fit(
        BoringClassifier(), loader(), ckpt_path=path, **kwargs
    )


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_resuming_into_a_store_that_somebody_writes_changes_nothing(tmp_path):
    save = SaveThenCrash(tmp_path / "c.ckpt", save=3, crash=99)
    quiet_trainer(callbacks=[DeltaRecorder(tmp_path / "s", **DENSE), save]).fit(BoringClassifier(), loader())
    store = DeltaStore.open(tmp_path / "s")
    before = store.lineage
    assert {state.n_steps for state in before.states} == {0, 3, 5, 10}
    with store.writer(), pytest.raises(StoreMismatchError, match="the lock is held"):
        fit_resuming(tmp_path / "s", tmp_path / "c.ckpt")
    assert DeltaStore.open(tmp_path / "s").lineage == before
    fit_resuming(tmp_path / "s", tmp_path / "c.ckpt")


@pytest.mark.parametrize("background", [True, "auto"])
def test_a_start_that_a_warning_ends_gives_the_store_back(tmp_path, background):
    def fit():
        recorder = DeltaRecorder(tmp_path / "s", background=background, **DENSE)
        quiet_trainer(max_epochs=1, callbacks=[recorder]).fit(BoringClassifier(), loader())

    outside = BoringClassifier(lambda parameters: torch.optim.SGD([*parameters, nn.Parameter(torch.ones(1))], lr=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnlearningWarning)
        with pytest.raises(UnlearningWarning, match="not part of the module"):
            quiet_trainer(callbacks=[DeltaRecorder(tmp_path / "s", background=background)]).fit(outside, loader())
    fit()


def test_the_copy_of_the_weights_is_gone_as_the_fit_ends(tmp_path):
    class Find(Callback):
        def on_train_start(self, *args):
            self.found = [weakref.ref(one) for one in gc.get_objects() if type(one) is DeltaCapture]

    find, recorder, module = Find(), DeltaRecorder(tmp_path / "s"), BoringClassifier()
    trainer = quiet_trainer(max_epochs=1, callbacks=[recorder, find])
    gc.collect()
    gc.disable()
    try:
        trainer.fit(module, loader())
        assert len(find.found) == 1
        assert find.found[0]() is None
    finally:
        gc.enable()


class ClampsTwice(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step in (2, 7):
            with torch.no_grad():
                pl_module.net.head.weight.clamp_(-0.01, 0.01)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("later", [False, True], ids=["at once", "as on an accelerator"])
def test_edits_are_said_and_marked_where_steps_are_not_watched_as_well(tmp_path, monkeypatch, later, background):
    monkeypatch.setattr(delta_capture, "_has_streams", lambda device: later)
    torch.manual_seed(0)
    module = BoringClassifier()
    recorder = DeltaRecorder(tmp_path / "s", watch=[3], background=background, **DENSE)
    with pytest.warns(UnlearningWarning, match="changed (weights|'net.head.weight') after step 2 ") as caught:
        quiet_trainer(callbacks=[ClampsTwice(), recorder]).fit(module, loader())
    assert [one.category for one in caught].count(UnlearningWarning) == 1
    store = DeltaStore.open(tmp_path / "s")
    records = [store.record(step) for step in range(store.n_steps)]
    assert {record.status for record in records} == {StepStatus.STORED, StepStatus.UNWATCHED}
    assert [record.step for record in records if record.edited] == [2, 7]
    for record in records:
        assert (record.status is StepStatus.STORED) == (3 in module.seen[record.step])
    assert any(records[step].status is StepStatus.UNWATCHED for step in (2, 7))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_deltas_that_are_encoded_later_are_still_those_of_their_step(tmp_path, monkeypatch, scope):
    encode = StepEncoder.encode

    def slow(*args):
        time.sleep(0.03)  # steps are made meanwhile, as many as the queue takes
        return encode(*args)

    monkeypatch.setattr(StepEncoder, "encode", slow)
    module = BoringClassifier()
    recorder = DeltaRecorder(tmp_path / "s", background=True, scope=scope, **DENSE)
    quiet_trainer(callbacks=[recorder]).fit(module, loader())
    assert_leads_to(DeltaStore.open(tmp_path / "s"), module)


def test_a_recorder_can_be_pickled_before_a_fit_and_after_it(tmp_path, monkeypatch):
    """As `ddp_spawn` does it; under SLURM, where the recorder puts signals off while a fit is running."""
    monkeypatch.setattr(signals_at_batch_end, "signals_put_off", lambda trainer: ("_sigterm_notifier_fn",))
    recorder = DeltaRecorder(tmp_path / "s", **DENSE)
    pickle.dumps(recorder)
    quiet_trainer(max_epochs=1, callbacks=[recorder]).fit(BoringClassifier(), loader())
    pickle.dumps(recorder)
