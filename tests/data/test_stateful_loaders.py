"""Loaders that can go on in mid-epoch: what is recorded after it is what is trained on, and nothing comes twice."""

import contextlib
import itertools

import pytest
import torch
from lightning import Callback
from torch.utils.data import SequentialSampler, WeightedRandomSampler

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.data.index_tap import IndexTap
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.store.delta_store import DeltaStore
from tests.helpers.models import BoringClassifier, IdDataset, quiet_trainer
from tests.helpers.replay import assert_leads_to

StatefulDataLoader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
DENSE = {"keep": 1.0, "value_dtype": "float32"}
ROWS, BATCHES = 43, 11


class ByEpoch(SequentialSampler):
    """A fixed order, and no state of its own: the loader leaves aside what it drew before."""

    def __iter__(self):
        return iter(torch.randperm(ROWS, generator=torch.Generator().manual_seed(7)).tolist())


class Chunks:
    """A batch sampler of uneven sizes, without a state."""

    def __iter__(self):
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(8)).tolist()
        bounds = itertools.accumulate([0, 2, 6, 2, 5, 4, 3, 6, 2, 5, 4, 4])
        return iter([order[start:stop] for start, stop in itertools.pairwise(bounds)])

    def __len__(self):
        return BATCHES


class Remembers:
    """A batch sampler with a state."""

    def __init__(self):
        self.done = 0

    def __iter__(self):
        self.done %= BATCHES
        while self.done < BATCHES:
            self.done += 1
            yield list(range((self.done - 1) * 4, min(self.done * 4, ROWS)))

    def __len__(self):
        return BATCHES

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


def make(seed=0, **kwargs):
    torch.manual_seed(seed)
    if "batch_sampler" not in kwargs:
        kwargs["batch_size"] = 4
    return StatefulDataLoader(IdDataset(ROWS), **kwargs)


CASES = {
    "shuffle": lambda: {"shuffle": True},
    "two workers": lambda: {"shuffle": True, "num_workers": 2},
    "persistent": lambda: {"shuffle": True, "num_workers": 2, "persistent_workers": True},
    "rare snapshots": lambda: {"shuffle": True, "num_workers": 2, "snapshot_every_n_steps": 3},
    "sampler without a state": lambda: {"sampler": ByEpoch(range(ROWS))},
    "the same with workers": lambda: {"sampler": ByEpoch(range(ROWS)), "num_workers": 2},
    "batch sampler without a state": lambda: {"batch_sampler": Chunks()},
    "the same with workers, too": lambda: {"batch_sampler": Chunks(), "num_workers": 1},
    "batch sampler with a state": lambda: {"batch_sampler": Remembers()},
}


class SaveAndStop(Callback):
    def __init__(self, path, batches):
        self.path, self.batches = path, batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.path)
            raise KeyError("stop")


def ids_of(path):
    store = DeltaStore.open(path)
    return [list(store.record(step).sample_ids) for step in range(store.n_steps)]


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_goes_on_in_mid_epoch(tmp_path, case):
    whole = BoringClassifier()
    recorder = DeltaRecorder(tmp_path / "whole", **DENSE)
    quiet_trainer(callbacks=[recorder]).fit(whole, make(1, **CASES[case]()))
    assert ids_of(tmp_path / "whole") == whole.seen
    assert len(whole.seen) == 2 * BATCHES

    store, checkpoint = tmp_path / "store", tmp_path / "mid.ckpt"
    first = BoringClassifier()
    callbacks = [DeltaRecorder(store, **DENSE), SaveAndStop(checkpoint, 4)]
    with pytest.raises(KeyError, match="stop"):
        quiet_trainer(callbacks=callbacks).fit(first, make(1, **CASES[case]()))
    second = BoringClassifier()
    loader = make(2, **CASES[case]())
    quiet_trainer(callbacks=[DeltaRecorder(store, **DENSE)]).fit(second, loader, ckpt_path=checkpoint)

    assert ids_of(store) == first.seen + second.seen
    epoch = [index for batch in (first.seen + second.seen)[:BATCHES] for index in batch]
    assert sorted(epoch) == list(range(ROWS))
    assert (first.seen + second.seen)[:BATCHES] == whole.seen[:BATCHES]
    opened = DeltaStore.open(store)
    assert opened.tip.ranges == ((0, 2 * BATCHES),)
    assert_leads_to(opened, second)
    # Nothing of the recorder is left in the user's loader.
    assert type(loader) is StatefulDataLoader
    assert sorted(index for batch in loader for index in batch["index"].tolist()) == list(range(ROWS))


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_with_repeats_are_recorded_as_they_come(tmp_path, workers):
    sampler = WeightedRandomSampler([1.0] * 5 + [0.1] * (ROWS - 5), 40)
    module = BoringClassifier()
    trainer = quiet_trainer(callbacks=[DeltaRecorder(tmp_path / "s", **DENSE)])
    trainer.fit(module, make(sampler=sampler, num_workers=workers))
    assert ids_of(tmp_path / "s") == module.seen


def test_the_state_is_the_loaders_own():
    plain, listened = make(3, shuffle=True), make(3, shuffle=True)
    tap = IndexTap(listened)
    for batch, other in zip(plain, tap.view, strict=True):
        assert torch.equal(batch["index"], other["index"])
        ours, theirs = tap.view.state_dict(), plain.state_dict()
        assert ours.keys() == theirs.keys()
        assert str(ours["_sampler_iter_state"]) == str(theirs["_sampler_iter_state"])
        assert ours["_num_yielded"] == theirs["_num_yielded"]


def test_the_iterator_that_a_loader_keeps_is_its_own_again():
    loader = make(3, shuffle=True)
    tap = IndexTap(loader)
    next(iter(tap.view))
    kept = loader._iterator
    assert "lightning_unlearn" in type(kept._sampler_iter).__module__
    tap.close()
    assert loader._iterator is kept
    assert kept._index_sampler is loader.batch_sampler
    assert "lightning_unlearn" not in type(kept._sampler_iter).__module__


def test_an_iterator_from_before_is_refused():
    loader = make(shuffle=True)
    loader.state_dict()  # the loader makes its first iterator for its state, and keeps it for the first epoch
    tap = IndexTap(loader)
    with pytest.raises(UnsupportedStrategyError, match="an iterator that was there before"):
        next(iter(tap.view))


def ddp_resumed(folder, listen):
    seen = []
    for resume in (None, f"{folder}/{listen}.ckpt"):
        module = BoringClassifier()
        callbacks = [DeltaRecorder(f"{folder}/store", **DENSE)] if listen else []
        if resume is None:
            callbacks.append(SaveAndStop(f"{folder}/{listen}.ckpt", 3))
        trainer = quiet_trainer(strategy="ddp", devices=2, callbacks=callbacks, max_epochs=1)
        with contextlib.suppress(KeyError):
            trainer.fit(module, make(1, shuffle=True), ckpt_path=resume)
        seen += module.seen
    return seen


def test_two_processes_go_on_in_mid_epoch(gloo_pool, tmp_path):
    plain = gloo_pool.run(ddp_resumed, str(tmp_path), False)
    ranks = gloo_pool.run(ddp_resumed, str(tmp_path), True)
    assert ranks == plain
    assert [len(seen) for seen in ranks] == [6, 6]
    wanted = [first + second for first, second in zip(*ranks, strict=True)]
    assert ids_of(tmp_path / "store") == wanted
