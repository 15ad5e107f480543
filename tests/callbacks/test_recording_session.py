"""Crashes, resuming, and what a store knows about weights."""

import errno
import multiprocessing
import os
import socket
import warnings

import pytest
import torch
from lightning import Callback
from torch.utils.data import RandomSampler, Subset

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.exceptions import LightningUnlearnError, MissingRequirementError, StoreMismatchError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.files import Files
from lightning_unlearn.utilities.parameters import weights_digest
from tests.helpers.models import BoringClassifier, IdDataset, loader, quiet_trainer
from tests.helpers.replay import assert_leads_to, same_weights

DENSE = {"keep": 1.0, "value_dtype": "float32"}
pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")


class BySeedAndEpoch(RandomSampler):
    """An order that depends on nothing but seed and epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(100 + self.epoch)
        return iter(torch.randperm(len(self.data_source), generator=generator).tolist())


class SaveAt(Callback):
    """Writes a checkpoint after a number of batches."""

    def __init__(self, path, batches):
        self.path, self.batches, self.count = path, batches, 0

    def on_train_batch_end(self, trainer, *args):
        self.count += 1
        if self.count == self.batches:
            trainer.save_checkpoint(self.path)


class SaveAtEpoch(Callback):
    def __init__(self, path, epoch, weights_only=False):
        self.path, self.epoch, self.weights_only = path, epoch, weights_only

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path, weights_only=self.weights_only)


class CrashAt(Callback):
    """Raises, or ends the process without a word, after a number of batches."""

    def __init__(self, batches, hard=False):
        self.batches, self.hard, self.count = batches, hard, 0

    def on_train_batch_end(self, *args):
        self.count += 1
        if self.count == self.batches:
            if self.hard:
                os._exit(3)
            raise RuntimeError("crash")


def fit(store, *callbacks, epochs=4, ckpt_path=None, data=None, module=None, seed=1, **recorder):
    torch.manual_seed(seed)
    module = module or BoringClassifier(lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    recorder = [] if store is None else [DeltaRecorder(store, **{**DENSE, **recorder})]
    trainer = quiet_trainer(callbacks=[*recorder, *callbacks], max_epochs=epochs)
    trainer.fit(module, data or loader(), ckpt_path=ckpt_path)
    return module


def fixed_order():
    return loader(sampler=BySeedAndEpoch(IdDataset()))


def crash(store, *callbacks, batches, hard, **kwargs):
    if hard:
        process = multiprocessing.get_context("fork").Process(
            target=fit, args=(store, *callbacks, CrashAt(batches, hard=True)), kwargs=kwargs
        )
        process.start()
        process.join(100)
        assert process.exitcode == 3
    else:
        with pytest.raises(RuntimeError, match="crash"):
            fit(store, *callbacks, CrashAt(batches), **kwargs)


def assert_same_records(first, second):
    assert first.n_steps == second.n_steps
    for step in range(first.n_steps):
        ours, theirs = first.record(step), second.record(step)
        assert (ours.sample_ids, ours.batch_size, ours.optimizer) == (theirs.sample_ids, theirs.batch_size, 0)
        deltas, others = first.read(step), second.read(step)
        assert deltas.keys() == others.keys()
        assert all(torch.equal(delta.values, others[name].values) for name, delta in deltas.items())


@pytest.mark.parametrize("hard", [False, True], ids=["exception", "kill"])
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_with_a_fixed_order_a_resumed_run_is_an_uninterrupted_one(tmp_path, hard):
    whole = fit(tmp_path / "whole", data=fixed_order())
    checkpoint = tmp_path / "epoch.ckpt"
    crash(tmp_path / "store", SaveAtEpoch(checkpoint, 1), batches=13, hard=hard, data=fixed_order())
    before = DeltaStore.open(tmp_path / "store").n_steps
    assert before == (10 if hard else 13)
    resumed = fit(tmp_path / "store", ckpt_path=checkpoint, data=fixed_order())
    assert same_weights(whole, resumed)
    store = DeltaStore.open(tmp_path / "store")
    assert_same_records(store, DeltaStore.open(tmp_path / "whole"))
    assert store.tip.ranges == ((0, 20),)
    assert [(run.kind, run.first) for run in store.lineage.runs] == [("fit", 0)]
    assert_leads_to(store, resumed)
    assert store.verify().ok


@pytest.mark.parametrize("hard", [False, True], ids=["exception", "kill"])
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_with_a_random_order_only_the_live_branch_is_recorded(tmp_path, hard):
    checkpoint = tmp_path / "mid.ckpt"
    crash(tmp_path / "store", SaveAt(checkpoint, 7), batches=12, hard=hard)
    kept = [DeltaStore.open(tmp_path / "store").record(step).sample_ids for step in range(7)]
    resumed = fit(tmp_path / "store", ckpt_path=checkpoint, seed=2)
    store = DeltaStore.open(tmp_path / "store")
    ids = [list(store.record(step).sample_ids) for step in range(store.n_steps)]
    assert ids[:7] == [list(batch) for batch in kept]
    assert ids[7:] == resumed.seen
    assert len(ids) == 20
    assert_leads_to(store, resumed)
    assert store.tip.digest == weights_digest(resumed)
    assert all(stop <= 20 for state in store.lineage.states for _, stop in state.ranges)


def test_resuming_twice_from_an_earlier_checkpoint(tmp_path):
    early, late = tmp_path / "early.ckpt", tmp_path / "late.ckpt"
    crash(tmp_path / "store", SaveAt(early, 5), SaveAt(late, 11), batches=12, hard=False)
    crash(tmp_path / "store", batches=2, hard=False, ckpt_path=late, seed=2)
    resumed = fit(tmp_path / "store", ckpt_path=early, seed=3)
    store = DeltaStore.open(tmp_path / "store")
    assert store.n_steps == 20
    assert [list(store.record(step).sample_ids) for step in range(5, 20)] == resumed.seen
    assert_leads_to(store, resumed)


def test_a_checkpoint_without_a_recording_is_refused_and_nothing_is_written(tmp_path):
    checkpoint = tmp_path / "plain.ckpt"
    fit(None, SaveAtEpoch(checkpoint, 0), epochs=1)
    module = BoringClassifier(lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    with pytest.raises(StoreMismatchError, match="a checkpoint written while recording"):
        fit(tmp_path / "store", ckpt_path=checkpoint, module=module)
    assert not module.seen
    assert not (tmp_path / "store").exists()
    fit(tmp_path / "store", epochs=1)
    with pytest.raises(StoreMismatchError, match="a checkpoint written while recording"):
        fit(tmp_path / "store", ckpt_path=checkpoint)
    assert DeltaStore.open(tmp_path / "store").n_steps == 5


def test_a_checkpoint_of_another_or_a_missing_store_is_refused(tmp_path):
    checkpoint = tmp_path / "epoch.ckpt"
    fit(tmp_path / "one", SaveAtEpoch(checkpoint, 0), epochs=1)
    fit(tmp_path / "two", epochs=1)
    with pytest.raises(StoreMismatchError, match="a checkpoint of store"):
        fit(tmp_path / "two", ckpt_path=checkpoint)
    with pytest.raises(StoreMismatchError, match="no store at"):
        fit(tmp_path / "three", ckpt_path=checkpoint)
    assert DeltaStore.open(tmp_path / "two").n_steps == 5
    assert not (tmp_path / "three").exists()


def test_weights_that_were_changed_in_the_checkpoint_are_refused(tmp_path):
    checkpoint = tmp_path / "epoch.ckpt"
    fit(tmp_path / "store", SaveAtEpoch(checkpoint, 0), epochs=1)
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["net.scale"] += 1
    torch.save(content, checkpoint)
    with pytest.raises(StoreMismatchError, match="changed weights"):
        fit(tmp_path / "store", ckpt_path=checkpoint, epochs=2)


@pytest.mark.parametrize("weights_only", [False, True])
def test_weights_out_of_a_checkpoint_are_recognised_and_continued(tmp_path, weights_only):
    checkpoint = tmp_path / "epoch.ckpt"
    fit(tmp_path / "store", SaveAtEpoch(checkpoint, 1, weights_only), epochs=3)
    module = BoringClassifier(lambda parameters: torch.optim.SGD(parameters, lr=1e-2), seed=9)
    module.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    fit(tmp_path / "store", module=module, epochs=1, kind="repair")
    store = DeltaStore.open(tmp_path / "store")
    assert store.tip.ranges == ((0, 10), (15, 20))
    assert store.state_of(weights_digest(module)) == store.tip
    assert [(run.kind, run.first) for run in store.lineage.runs] == [("fit", 0), ("repair", 15)]
    assert_leads_to(store, module, store.tip.ranges)
    assert store.tip.travel == pytest.approx(
        sum(
            float((parameter.detach() - store.initial_weights()[name]).double().square().sum())
            for name, parameter in module.named_parameters()
        )
        ** 0.5
    )


def test_a_checkpoint_after_the_fit_is_resumable(tmp_path):
    module = BoringClassifier()
    trainer = quiet_trainer(callbacks=[DeltaRecorder(tmp_path / "store", **DENSE)])
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    again = BoringClassifier(seed=5)
    fit(tmp_path / "store", ckpt_path=tmp_path / "after.ckpt", epochs=3, module=again)
    store = DeltaStore.open(tmp_path / "store")
    assert store.n_steps == 15
    assert_leads_to(store, again)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_starting_again_after_a_crash_before_the_first_checkpoint(tmp_path):
    crash(tmp_path / "store", batches=3, hard=True)
    assert DeltaStore.open(tmp_path / "store").n_steps == 0
    module = fit(tmp_path / "store", epochs=1)
    store = DeltaStore.open(tmp_path / "store")
    assert store.tip.ranges == ((0, 5),)
    assert [(run.kind, run.first) for run in store.lineage.runs] == [("fit", 0)]
    assert_leads_to(store, module)


def test_steps_that_changed_no_weight_belong_to_the_weights_as_well(tmp_path):
    """A learning rate of zero: the weights of several epochs are the same, and none of their steps may be dropped."""
    idle = BoringClassifier(lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    fit(tmp_path / "s", module=idle, epochs=3)
    store = DeltaStore.open(tmp_path / "s")
    assert store.tip.ranges == ((0, 15),)
    fit(tmp_path / "s", module=idle, epochs=1)
    store.refresh()
    assert store.n_steps == 20
    assert store.tip.ranges == ((0, 20),)


def test_a_resumed_fit_that_failed_early_does_not_resume_the_next_one(tmp_path):
    store, checkpoint = tmp_path / "s", tmp_path / "2.ckpt"
    first = fit(store, SaveAtEpoch(checkpoint, 1), epochs=3)
    steps = DeltaStore.open(store).n_steps

    class Fragile(Callback):
        def on_fit_start(self, *args):
            raise RuntimeError("before training")

    recorder = DeltaRecorder(store, **DENSE)
    module = BoringClassifier(first.make_optimizer)
    trainer = quiet_trainer(callbacks=[recorder, Fragile()], max_epochs=4)
    with pytest.raises(RuntimeError, match="before training"):
        trainer.fit(module, loader(), ckpt_path=checkpoint)
    # The module has the checkpoint's weights now; a fit without `ckpt_path` goes on from them, behind all steps.
    quiet_trainer(callbacks=[recorder], max_epochs=1).fit(module, loader())
    assert DeltaStore.open(store).n_steps == steps + 5


def test_unknown_weights_are_refused(tmp_path):
    fit(tmp_path / "store", epochs=1)
    with pytest.raises(StoreMismatchError, match="weights that the store knows"):
        fit(tmp_path / "store", module=BoringClassifier(seed=99), epochs=1)
    assert DeltaStore.open(tmp_path / "store").n_steps == 5


@pytest.mark.parametrize(
    ("recorder", "kwargs", "match"),
    [
        ({"keep": 0.5}, {}, "keep"),
        ({"value_dtype": "bfloat16"}, {}, "value_dtype"),
        ({"buffers": "record"}, {}, "buffers"),
        ({"sample_keys": [f"k{i}" for i in range(40)]}, {}, "identifies samples by position"),
        ({"data_digest": "other"}, {}, "data_digest"),
        ({}, {"data": lambda: loader(IdDataset(39))}, "the recorded dataset of 40 samples"),
        ({}, {"module": lambda: BoringClassifier(width=9)}, "net.inp.weight"),
    ],
)
def test_another_recording_is_refused_before_training(tmp_path, recorder, kwargs, match):
    fit(tmp_path / "store", epochs=1, data_digest="one")
    before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    kwargs = {name: make() for name, make in kwargs.items()}
    kwargs.setdefault("module", BoringClassifier())
    with pytest.raises(StoreMismatchError, match=match):
        fit(tmp_path / "store", epochs=1, **kwargs, **{"data_digest": "one", **recorder})
    assert not kwargs["module"].seen
    after = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    assert before == after


def test_a_subset_of_the_recorded_data_is_the_recorded_data(tmp_path):
    module = fit(tmp_path / "store", epochs=1)
    kept = [index for index in range(40) if index % 3]
    again = fit(tmp_path / "store", module=module, epochs=1, data=loader(Subset(IdDataset(), kept), batch_size=9))
    store = DeltaStore.open(tmp_path / "store")
    assert [list(store.record(step).sample_ids) for step in range(5, 8)] == again.seen[5:]
    assert all(index % 3 for batch in again.seen[5:] for index in batch)


def test_keys_hold_for_other_rows(tmp_path):
    keys = [f"user-{index // 2}" for index in range(40)]
    module = fit(tmp_path / "store", epochs=1, sample_keys=keys)
    fit(tmp_path / "store", module=module, epochs=1, data=loader(IdDataset(30)), sample_keys=keys[:30])
    assert DeltaStore.open(tmp_path / "store").n_steps == 9


def test_two_recorders_of_one_store_at_once_are_refused(tmp_path):
    fit(tmp_path / "store", epochs=1)
    writer = DeltaStore.open(tmp_path / "store").writer()
    try:
        with pytest.raises(StoreMismatchError, match="another writer"):
            fit(tmp_path / "store", epochs=1)
    finally:
        writer.close()


def ddp(store, checkpoint, resume, crash_at, epochs=3):
    torch.manual_seed(1)
    module = BoringClassifier()
    callbacks = [DeltaRecorder(store, **DENSE), SaveAtEpoch(checkpoint, 0), CrashAt(crash_at)]
    trainer = quiet_trainer(strategy="ddp", devices=2, callbacks=callbacks, max_epochs=epochs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.fit(module, loader(IdDataset(43), batch_size=4), ckpt_path=resume)
        except (RuntimeError, StoreMismatchError) as error:
            return str(error), module.seen, None
    return "", module.seen, {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def test_two_processes_crash_and_resume(gloo_pool, tmp_path):
    store, checkpoint = str(tmp_path / "store"), str(tmp_path / "epoch.ckpt")
    failed = gloo_pool.run(ddp, store, checkpoint, None, 8)
    assert [message for message, _, _ in failed] == ["crash", "crash"]
    resumed = gloo_pool.run(ddp, store, checkpoint, checkpoint, 100)
    assert [message for message, _, _ in resumed] == ["", ""]
    opened = DeltaStore.open(store)
    assert opened.n_steps == 18
    assert opened.tip.ranges == ((0, 18),)
    for step in range(6, 18):
        ids = [rank[1][step - 6] for rank in resumed]
        assert sorted(opened.record(step).sample_ids) == sorted(ids[0] + ids[1])
    module = BoringClassifier()
    module.load_state_dict(resumed[0][2])
    assert_leads_to(opened, module)
    # A refusal by rank 0 reaches every rank, so that none of them waits.
    refused = gloo_pool.run(ddp, str(tmp_path / "none"), checkpoint, checkpoint, 100)
    assert all("no store at" in message for message, _, _ in refused)


def disk_full_on_one(store, failing):
    """What each of two processes gets to know, and at which step, where the disk of one is full."""
    torch.manual_seed(1)
    trainer = quiet_trainer(strategy="ddp", devices=2, callbacks=[DeltaRecorder(store, **DENSE)], max_epochs=3)
    publish = Files.publish

    def full(files, name, data, **kwargs):
        if trainer.global_rank == failing and "segment" in name:
            raise OSError(errno.ENOSPC, "No space left on device", name)
        publish(files, name, data, **kwargs)

    Files.publish = full
    try:
        trainer.fit(BoringClassifier(), loader(IdDataset(43), batch_size=4))
    except (LightningUnlearnError, OSError) as error:
        return f"{type(error).__name__}: {error}", trainer.global_step
    finally:
        Files.publish = publish
    return "", trainer.global_step


@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_of_one_process_is_an_error_of_both_and_nobody_waits(gloo_pool, tmp_path, failing):
    found = gloo_pool.run(disk_full_on_one, str(tmp_path / "store"), failing)
    own, other = found[failing], found[1 - failing]
    assert "No space left" in own[0]
    assert f"Rank {failing} failed" in other[0]
    assert "No space left" in other[0]
    assert own[1] == other[1] == 6  # as the first epoch ends
    assert DeltaStore.open(tmp_path / "store").verify().ok


@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_trainer_that_launches_its_own_processes(tmp_path, monkeypatch, strategy):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    torch.manual_seed(1)
    module = BoringClassifier()
    trainer = quiet_trainer(strategy=strategy, devices=2, callbacks=[DeltaRecorder(tmp_path / "store", **DENSE)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader(IdDataset(43), batch_size=4))
    store = DeltaStore.open(tmp_path / "store")
    assert (store.n_steps, store.world_size) == (12, 2)
    assert {sample for step in range(6) for sample in store.record(step).sample_ids} == set(range(43))
    assert store.state_of(weights_digest(module)) == store.tip
    assert_leads_to(store, module)


def test_what_a_run_left_that_failed_before_its_first_step_is_replaced(tmp_path):
    """A typo in the first script must not cost its directory: the corrected one starts from other weights."""
    store = tmp_path / "store"
    with pytest.raises(MissingRequirementError, match="no_such_key"):
        fit(store, module=BoringClassifier(seed=1), epochs=1, sample_id="no_such_key")
    assert DeltaStore.exists(store)
    assert DeltaStore.open(store).n_steps == 0
    left = DeltaStore.open(store).store_id
    module = fit(store, module=BoringClassifier(seed=2), epochs=1)
    opened = DeltaStore.open(store)
    assert opened.store_id != left
    assert opened.verify().ok
    assert_leads_to(opened, module)
    # One that holds steps is not.
    with pytest.raises(StoreMismatchError, match="weights that the store knows"):
        fit(store, module=BoringClassifier(seed=3), epochs=1)
    with pytest.raises(StoreMismatchError, match="without a step"):
        opened.discard_empty()


def test_an_empty_store_that_somebody_is_writing_is_not_replaced(tmp_path):
    store = tmp_path / "store"
    with pytest.raises(MissingRequirementError):
        fit(store, module=BoringClassifier(seed=1), epochs=1, sample_id="no_such_key")
    with DeltaStore.open(store).writer(), pytest.raises(StoreMismatchError, match="another writer"):
        fit(store, module=BoringClassifier(seed=2), epochs=1)
    assert DeltaStore.open(store).verify().ok


@pytest.mark.filterwarnings("ignore:.*fast_dev_run.*")
def test_a_fast_dev_run_records_nothing(tmp_path):
    recorder = DeltaRecorder(tmp_path / "store", **DENSE)
    quiet_trainer(fast_dev_run=True, callbacks=[recorder]).fit(BoringClassifier(), loader())
    assert not DeltaStore.exists(tmp_path / "store")
    fit(tmp_path / "store", epochs=1)
    assert DeltaStore.open(tmp_path / "store").n_steps == 5
