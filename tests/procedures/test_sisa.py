"""SISA's guarantee: after a deletion the folder holds what a training without the samples would have put there."""

import contextlib
import os
import random
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning import Callback, LightningDataModule, seed_everything
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from torch.utils.data import DataLoader, Subset

from lightning_unlearn.api import unlearn
from lightning_unlearn.exceptions import (
    DeletionRequestError,
    MissingRequirementError,
    StoreCorruptedError,
    StoreMismatchError,
    UnsupportedStrategyError,
)
from lightning_unlearn.methods import Sisa
from lightning_unlearn.shards.folder import SisaFolder
from lightning_unlearn.utilities.rng import seed_of
from tests.helpers.models import quiet_trainer
from tests.helpers.sisa import (
    BATCH,
    EPOCHS,
    ROWS,
    SEEN,
    SHARDS,
    SLICES,
    TRAINER,
    Noted,
    dataset,
    files,
    loader,
    parts,
    same,
    training,
)
from tests.helpers.stores import Killed, Killer


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A trained folder; tests work on copies."""
    folder = tmp_path_factory.mktemp("sisa") / "original"
    return folder, training(folder).fit(loader())


@pytest.fixture
def copied(original, tmp_path):
    shutil.copytree(original[0], tmp_path / "copy")
    return tmp_path / "copy"


def requests():
    """Name -> which ids of the parts are forgotten."""
    return {
        "one of a first slice": lambda found: found[0, 0][:1],
        "one of a last slice": lambda found: found[1, SLICES - 1][-1:],
        "several": lambda found: [found[0, 1][0], found[0, 2][1], found[1, 0][2], found[1, 1][3]],
        "a whole slice": lambda found: found[0, 1],
        "the last slice": lambda found: found[1, SLICES - 1],
        "a whole shard": lambda found: [one for number in range(SLICES) for one in found[1, number]],
    }


@pytest.mark.parametrize("name", list(requests()))
def test_a_deletion_gives_what_training_without_the_samples_gives(original, copied, tmp_path, name):
    sisa = training(copied)
    ids = requests()[name](parts(sisa))
    plan = sisa.plan(ids)
    torch.rand(5)  # what was drawn before must not matter
    SEEN.clear()
    ensemble = sisa.unlearn(ids, loader())
    seen = [one for batch in SEEN for one in batch]
    assert not set(seen) & set(ids)
    assert len(seen) == plan.sample_epochs
    SEEN.clear()
    twin = training(tmp_path / "twin").fit(loader(), without=ids)
    assert sum(map(len, SEEN)) == plan.full_sample_epochs
    assert plan.share == plan.sample_epochs / plan.full_sample_epochs
    assert same(ensemble, twin)
    assert not same(ensemble, original[1])
    assert files(copied) == files(tmp_path / "twin"), "a checkpoint that saw the samples is left, or one is lost"
    assert same(training(copied).ensemble(), twin)
    assert sisa.deleted == tuple(ids)
    assert len(ensemble.members) == (1 if name == "a whole shard" else SHARDS)


def test_only_the_touched_slices_are_trained_again(original, copied):
    sisa = training(copied)
    found = parts(sisa)
    plan = sisa.plan([found[1, 2][0], found[1, 1][0]])
    assert plan.first_slices == {1: 1}
    assert "shard 1 from slice 1 on" in str(plan)
    SEEN.clear()
    ensemble = sisa.unlearn([found[1, 2][0], found[1, 1][0]], loader())
    assert {one for batch in SEEN for one in batch} < {one for number in range(SLICES) for one in found[1, number]}
    assert same(ensemble.members["0"], original[1].members["0"])
    assert not same(ensemble.members["1"], original[1].members["1"])


def test_deleting_in_sequence_is_deleting_at_once(copied, tmp_path):
    shutil.copytree(copied, tmp_path / "other")
    found = parts(training(copied))
    first, second, third = found[0, 2][:2], found[0, 0][:1], found[1, 1][1:3]
    for ids in (first, second):
        training(copied).unlearn(ids, loader())
    stepwise = training(copied).unlearn(third, loader())
    at_once = training(tmp_path / "other").unlearn([*third, *first, *second], loader())
    assert same(stepwise, at_once)
    assert files(copied) == files(tmp_path / "other")


def test_the_shards_are_those_of_a_plain_loop(original):
    """Epochs, cumulative slices, a fresh optimizer and schedule for each slice, the order and the dropout of a seed."""
    folder, ensemble = original
    found, rows = parts(training(folder)), dataset()
    for shard in range(SHARDS):
        (start,) = (folder / f"shard-{shard}").glob("start-*.ckpt")
        module = Noted()
        module.load_state_dict(torch.load(start, weights_only=True)["state_dict"])
        chosen = []
        for number in range(SLICES):
            chosen = sorted([*chosen, *found[shard, number]])
            assert len(chosen) % BATCH != 1, "the loop knows nothing of single samples"
            generator = torch.Generator().manual_seed(seed_of(3, shard, number, "order"))
            batches = DataLoader(Subset(rows, chosen), BATCH, shuffle=True, generator=generator)
            schedule = module.configure_optimizers()
            optimizer, scheduler = schedule["optimizer"], schedule["lr_scheduler"]
            seed_everything(seed_of(3, shard, number, "fit"), verbose=False)
            module.train()
            for _ in range(2):  # 2 * 4 / (3 + 1) epochs for each of three slices
                for index, batch in enumerate(batches):
                    optimizer.zero_grad()
                    module.training_step(batch, index).backward()
                    optimizer.step()
                scheduler.step()
        assert same(module, ensemble.members[str(shard)])
    visits = 2 * sum(
        len(found[shard, number]) * (SLICES - number) for shard in range(SHARDS) for number in range(SLICES)
    )
    assert visits == pytest.approx(EPOCHS * ROWS, rel=0.05)


class Shuffled(LightningDataModule):
    """Splits without a seed of its own, holds out a part, and adds noise on the way to the device."""

    def __init__(self):
        super().__init__()
        self.setups = 0

    def setup(self, stage):
        self.setups += 1
        order = torch.randperm(ROWS).tolist()
        self.train, self.held_out = Subset(dataset(), order[:34]), Subset(dataset(), order[34:])

    def train_dataloader(self):
        return DataLoader(self.train, BATCH, shuffle=True)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 0.1 * torch.randn_like(batch[0]), *batch[1:]]


def test_a_datamodule_keeps_its_hooks_and_its_split(tmp_path):
    data = Shuffled()
    sisa = training(tmp_path / "a", shards=1, slices=2)
    sisa.fit(data)
    assert data.setups == 1
    assert data.trainer is None
    ids = [parts(sisa)[0, 1][0]]
    torch.rand(9)
    ensemble = training(tmp_path / "a", shards=1, slices=2).unlearn(ids, Shuffled())
    twin = training(tmp_path / "b", shards=1, slices=2).fit(Shuffled(), without=ids)
    assert same(ensemble, twin)


def test_subjects_of_several_rows_may_be_gone_from_the_data(tmp_path):
    keys = [f"user-{row // 2}" for row in range(ROWS)]
    keep = [row for row in range(ROWS) if keys[row] != "user-7"]
    settings = {"shards": 2, "slices": 2}
    sisa = training(tmp_path / "a", sample_keys=keys, **settings)
    sisa.fit(loader())
    shorter = DataLoader(Subset(dataset(), keep), BATCH, shuffle=True)
    remaining = TensorRows([dataset()[row] for row in keep])
    left = training(tmp_path / "a", sample_keys=[keys[row] for row in keep], **settings)
    ensemble = left.unlearn(["user-7"], DataLoader(remaining, BATCH, shuffle=True))
    twin = training(tmp_path / "b", sample_keys=keys, **settings).fit(loader(), without=["user-7"])
    assert same(ensemble, twin)
    assert same(training(tmp_path / "a", sample_keys=keys, **settings).fit(shorter), twin)


class TensorRows(torch.utils.data.Dataset):
    """Other rows than a dataset of tensors has: what is left of it."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_whatever_stops_a_deletion_it_is_there_or_not_and_is_finished(tmp_path, monkeypatch):
    settings = {"shards": 1, "slices": 2, "epochs": 3}
    training(tmp_path / "start", **settings).fit(loader(12))
    before = files(tmp_path / "start")
    ids = [parts(training(tmp_path / "start", **settings))[0, 0][1]]
    twin = training(tmp_path / "twin", **settings).fit(loader(12), without=ids)
    wanted = files(tmp_path / "twin")
    endings = set()
    for survive in range(40):
        folder = tmp_path / str(survive)
        shutil.copytree(tmp_path / "start", folder)
        with monkeypatch.context() as patch:
            killer = Killer(survive, torn=True).install(patch)
            with contextlib.suppress(Killed):
                training(folder, **settings).unlearn(ids, loader(12))
        left = [name for name in files(folder) if ".tmp-" not in name]
        # Nothing old goes before everything new is there.
        assert set(before) <= set(left) or set(wanted) <= set(left)
        deleted, finished = bool(training(folder, **settings).deleted), files(folder) == wanted
        endings.add((deleted, finished))
        if not killer.struck:
            break
        if deleted and finished:  # it ended before the last sync only: the same request would be refused as met
            after = training(folder, **settings).ensemble()
        else:
            after = training(folder, **settings).unlearn(ids, loader(12))
        assert same(after, twin)
        assert files(folder) == wanted
    assert not killer.struck
    assert endings == {(False, False), (True, False), (True, True)}


def test_a_fit_that_was_stopped_goes_on(original, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        Killer(4 * 5, torn=True).install(patch)  # the manifest and its folder, two initial weights, two stages
        with pytest.raises(Killed):
            training(tmp_path / "s").fit(loader())
    done = [name for name in files(tmp_path / "s") if "/slice-" in name and ".tmp-" not in name]
    assert 0 < len(done) < SHARDS * SLICES
    SEEN.clear()
    ensemble = training(tmp_path / "s").fit(loader())
    assert same(ensemble, original[1])
    assert files(tmp_path / "s") == files(original[0])
    again = sum(map(len, SEEN))
    SEEN.clear()
    training(tmp_path / "s").fit(loader())
    assert not SEEN, "what is finished is not trained again"
    assert 0 < again < EPOCHS * ROWS


class Tired(Callback):
    """Ends the training after five steps, whatever epoch they are in: it remembers those of earlier fits."""

    def __init__(self):
        self.steps = 0

    def on_train_batch_end(self, trainer, *args):
        self.steps += 1
        trainer.should_stop = self.steps >= 5


def test_callbacks_come_to_every_fit_as_they_were_given(tmp_path):
    given = Tired()
    settings = {"shards": 1, "slices": 3, "trainer": {"accelerator": "cpu", "callbacks": [given]}}
    SEEN.clear()
    training(tmp_path, **settings).fit(loader())
    assert given.steps == 0
    assert len(SEEN) >= 3 * 5


def test_a_module_of_other_hyper_parameters_is_trusted_on_request(tmp_path):
    settings = {"shards": 1, "slices": 2, "epochs": 3, "module_factory": Keeping, "weights_only": False}
    training(tmp_path / "a", **settings).fit(loader(12))
    ensemble = training(tmp_path / "a", **settings).unlearn([4], loader(12))
    assert same(ensemble, training(tmp_path / "b", **settings).fit(loader(12), without=[4]))


def test_what_else_is_in_the_folder_stays(copied):
    for name in ("notes.txt", "shard-0/mine.ckpt", "shard-x/slice-0.ckpt"):
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_text("mine")
    training(copied).unlearn([1], loader())
    assert {"shard-0/mine.ckpt", "shard-x/slice-0.ckpt"} <= set(files(copied))
    assert (copied / "notes.txt").exists()


def test_reloaded_loaders_do_not_repeat_their_order(tmp_path):
    SEEN.clear()
    trainer = {**TRAINER, "reload_dataloaders_every_n_epochs": 1}
    training(tmp_path, shards=1, slices=1, epochs=2, trainer=trainer).fit(loader(12))
    assert SEEN[:3] != SEEN[3:6]
    assert sorted(one for batch in SEEN[3:6] for one in batch) == list(range(12))


def test_workers_are_seeded_as_well(tmp_path):
    settings = {"shards": 1, "slices": 2, "epochs": 3}

    def noisy():
        return DataLoader(Noisy(), BATCH, shuffle=True, num_workers=1)

    training(tmp_path / "a", **settings).fit(noisy())
    torch.rand(3)
    ensemble = training(tmp_path / "a", **settings).unlearn([4], noisy())
    assert same(ensemble, training(tmp_path / "b", **settings).fit(noisy(), without=[4]))


class Noisy(torch.utils.data.Dataset):
    """Augments where it loads."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        x, y, position = dataset()[index]
        return x + 0.1 * torch.randn(6), y, position


def test_the_user_s_state_is_left_alone(tmp_path):
    data = loader(12, generator=torch.Generator().manual_seed(5))
    seed_everything(11, workers=False, verbose=False)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    order, variables = data.generator.get_state(), dict(os.environ)
    training(tmp_path, shards=1, slices=1).fit(data)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert before[2] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(order, data.generator.get_state())
    assert variables == dict(os.environ)


class Fixed:
    """A factory of Trainers that does as it likes."""

    def __init__(self, **own):
        self.own = own

    def __call__(self, **asked):
        return quiet_trainer(**{**asked, **self.own})


class EvensFirst(torch.utils.data.Sampler):
    """A sampler of the user's."""

    def __iter__(self):
        return iter([*range(0, ROWS, 2), *range(1, ROWS, 2)])

    def __len__(self):
        return ROWS


class Stream(torch.utils.data.IterableDataset):
    """No sample has an id."""

    def __iter__(self):
        return iter(range(ROWS))


class Keeping(Noted):
    """Its checkpoints hold a function."""

    def __init__(self, keep=print):
        super().__init__()
        self.save_hyperparameters("keep")


SHARED = Noted()
REFUSED = {
    "few samples": (lambda: loader(5), {}, MissingRequirementError, "at least 6 samples"),
    "iterable": (lambda: DataLoader(Stream(), BATCH), {}, UnsupportedStrategyError, "map-style"),
    "sampler": (lambda: loader(shuffle=None, sampler=EvensFirst()), {}, UnsupportedStrategyError, "EvensFirst"),
    "devices": (loader, {"trainer": {"accelerator": "cpu", "devices": 2}}, UnsupportedStrategyError, "one process"),
    "checkpoints": (
        loader,
        {"trainer": {"accelerator": "cpu", "callbacks": [ModelCheckpoint("elsewhere")]}},
        UnsupportedStrategyError,
        "without checkpoints",
    ),
    "own checkpoints": (
        loader,
        {"trainer": Fixed(callbacks=[ModelCheckpoint("elsewhere")], enable_checkpointing=True)},
        UnsupportedStrategyError,
        "without checkpoints of its own",
    ),
    "clock": (loader, {"trainer": Fixed(max_time="00:01:00:00")}, UnsupportedStrategyError, "a Timer"),
    "length": (loader, {"trainer": Fixed(max_epochs=7)}, UnsupportedStrategyError, "max_epochs=7"),
    "steps": (loader, {"trainer": Fixed(max_steps=7)}, UnsupportedStrategyError, "max_steps=7"),
    "callback": (
        loader,
        {"trainer": {"accelerator": "cpu", "callbacks": [LambdaCallback(on_fit_start=threading.Lock())]}},
        UnsupportedStrategyError,
        "can be copied",
    ),
    "shared": (loader, {"module_factory": lambda: SHARED}, ValueError, "new module each time"),
    "hyper-parameters": (loader, {"module_factory": Keeping}, UnsupportedStrategyError, "weights_only=False"),
    "module": (loader, {"module_factory": lambda: torch.nn.Linear(1, 1)}, TypeError, "LightningModule"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, name):
    make_data, settings, error, match = REFUSED[name]
    with pytest.raises(error, match=match):
        training(tmp_path / "s", **settings).fit(make_data())
    assert not (tmp_path / "s").exists()


def test_settings_that_cannot_work_are_refused(tmp_path):
    for settings, match in [
        ({"epochs": 1}, "at least 2 for 3 slices"),
        ({"epochs": (1, 2)}, "one for each of 3 slices"),
        ({"shards": 0}, "shards"),
        ({"vote": "loudest"}, "vote"),
        ({"trainer": quiet_trainer()}, "6 fits"),
    ]:
        with pytest.raises(ValueError, match=match):
            training(tmp_path, **settings)
    with pytest.raises(MissingRequirementError, match="folder of a SISA training"):
        training(tmp_path / "nothing").plan([1])


CHANGED = {
    "new samples": (lambda: loader(ROWS + 2), {}, "dataset of 40"),
    "lost samples": (lambda: DataLoader(Subset(dataset(), range(30)), BATCH, shuffle=True), {}, "none of"),
    "more of a larger dataset": (lambda: loader(shuffle=False), {}, "SequentialSampler"),
    "batch size": (lambda: loader(batch_size=8), {}, "'batch_size': 8"),
    "drop_last": (lambda: loader(drop_last=True), {}, "'drop_last': True"),
    "order": (lambda: DataLoader(Subset(dataset(), range(ROWS)[::-1]), BATCH, shuffle=True), {}, "another order"),
    "keys": (loader, {"sample_keys": list(range(ROWS))}, "None, as in the training"),
    "shape": (loader, {"module_factory": lambda: Noted(width=9)}, r"net\.0\.bias"),
    "seed": (loader, {"seed": 4}, "3, as in the training"),
    "slices": (loader, {"slices": 4}, "as in the training"),
    "epochs": (loader, {"epochs": 8}, "as in the training"),
}


@pytest.mark.parametrize("name", list(CHANGED))
def test_another_training_s_data_module_or_settings_are_refused_and_nothing_changes(original, name):
    folder = original[0]
    before = (folder / "sisa.json").read_bytes(), files(folder)
    make_data, settings, match = CHANGED[name]
    with pytest.raises(StoreMismatchError, match=match):
        training(folder, **settings).unlearn([1], make_data())
    with pytest.raises(StoreMismatchError, match=match):
        training(folder, **settings).fit(make_data())
    assert before == ((folder / "sisa.json").read_bytes(), files(folder))


def test_ids_that_cannot_be_forgotten(original, copied):
    sisa = training(copied)
    for ids, match in [([ROWS], "unknown"), (["a"], "unknown"), ([], "at least one"), (range(ROWS), "all 40")]:
        with pytest.raises(DeletionRequestError, match=match):
            sisa.unlearn(ids, loader())
    last = parts(sisa)[0, SLICES - 1][0]
    sisa.unlearn([last], loader())
    with pytest.raises(DeletionRequestError, match="not forgotten yet"):
        sisa.unlearn([last], loader())
    with pytest.raises(DeletionRequestError, match="not forgotten yet"):
        sisa.plan([last])
    with pytest.raises(StoreMismatchError, match="left out"):
        training(original[0]).fit(loader(), without=[last])


def test_one_sample_is_not_left_to_batch_normalisation(copied):
    sisa = training(copied)
    before = (copied / "sisa.json").read_bytes(), files(copied)
    own = [one for slice_ in range(SLICES) for one in parts(sisa)[0, slice_]]
    with pytest.raises(DeletionRequestError, match=r"none or two samples in shard 0 .* forget it as well"):
        sisa.unlearn(own[1:], loader())
    assert before == ((copied / "sisa.json").read_bytes(), files(copied))
    ensemble = sisa.unlearn(own, loader())
    assert len(ensemble.members) == SHARDS - 1


def test_keys_are_missed_and_new_keys_refused(tmp_path):
    keys = [f"user-{row}" for row in range(12)]
    settings = {"shards": 1, "slices": 2, "epochs": 3}
    training(tmp_path, sample_keys=keys, **settings).fit(loader(12))
    with pytest.raises(MissingRequirementError, match="sample_keys"):
        training(tmp_path, **settings).unlearn(["user-3"], loader(12))
    with pytest.raises(StoreMismatchError, match="new samples 'user-12'"):
        training(tmp_path, sample_keys=[*keys, "user-12"], **settings).unlearn(["user-3"], loader(13))


def test_a_batch_larger_than_a_slice_is_trained_on_even_where_last_batches_are_dropped(tmp_path):
    SEEN.clear()
    training(tmp_path, shards=2, slices=2, epochs=3).fit(loader(12, batch_size=5, drop_last=True))
    assert {one for batch in SEEN for one in batch} == set(range(12))
    assert [len(batch) for batch in SEEN[:4]] == [3, 3, 5, 5]  # a slice of three twice, then five of six twice


def test_a_damaged_manifest_is_told(copied):
    path = copied / "sisa.json"
    path.write_bytes(path.read_bytes().replace(b'"seed": 3', b'"seed": 4'))
    with pytest.raises(StoreCorruptedError, match="checksum"):
        training(copied).ensemble()


def test_a_folder_that_is_not_finished_has_no_ensemble(copied):
    (copied / files(copied)[-1]).unlink()
    with pytest.raises(MissingRequirementError, match="finished"):
        training(copied).ensemble()


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_clip_val": 0.1},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"limit_train_batches": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_trainer_of_other_settings_is_refused(copied, settings):
    sisa, before = training(copied, trainer={**TRAINER, **settings}), files(copied)
    with pytest.raises(StoreMismatchError, match=rf"as in the training.*{next(iter(settings))}.*Pass `trainer=`"):
        sisa.unlearn(parts(sisa)[0, 0][:1], loader())
    assert (files(copied), sisa.deleted) == (before, ())


def test_folders_that_do_not_know_their_trainer_are_continued_with_any(copied):
    folder = SisaFolder(copied)
    folder.write(replace(folder.manifest(), trainer={}))
    sisa = training(copied, trainer={**TRAINER, "gradient_clip_val": 0.1})
    sisa.unlearn(parts(sisa)[0, 0][:1], loader())
    assert len(sisa.deleted) == 1


def test_the_method_is_held_to_the_trainer_of_the_training(tmp_path):
    sisa = training(tmp_path, trainer={**TRAINER, "gradient_clip_val": 0.1})
    ensemble = sisa.fit(loader())
    ids = parts(sisa)[0, 0][:1]
    method, settings = Sisa(folder=tmp_path, module_factory=Noted), {"data": loader(), "probe_samples": 0}
    with pytest.raises(StoreMismatchError, match="gradient_clip_val"):
        unlearn(ensemble, ids, method=method, **settings)
    assert sisa.deleted == ()
    result = unlearn(ensemble, ids, method=method, trainer={**TRAINER, "gradient_clip_val": 0.1}, **settings)
    assert same(result.model, sisa.ensemble())
