"""SISA under the one contract: partition, plan, ensemble, and the method that `unlearn` runs."""

import shutil
from collections import Counter
from fractions import Fraction

import pytest
import torch
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_unlearn.api import evaluate, unlearn
from lightning_unlearn.exceptions import MissingRequirementError, StoreMismatchError, UnsupportedStrategyError
from lightning_unlearn.methods import FineTune, Sisa, SisaEnsemble
from lightning_unlearn.procedures.outcome import save_checkpoint
from lightning_unlearn.shards.manifest import assign, slice_epochs
from lightning_unlearn.utilities.batch_adapter import BatchAdapter
from tests.helpers.models import quiet_trainer
from tests.helpers.sisa import TRAINER, Noted, dataset, files, loader, parts, same, training

FORGET = [5, 17]
ADAPTER = BatchAdapter()  # batches are of inputs, targets and positions


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sisa") / "original"
    return folder, training(folder).fit(loader())


@pytest.fixture
def copied(original, tmp_path):
    shutil.copytree(original[0], tmp_path / "copy")
    return tmp_path / "copy"


def forget(model, folder, ids=FORGET, data=None, **settings):
    method = Sisa(folder=folder, module_factory=settings.pop("module_factory", Noted))
    settings = {"trainer": TRAINER, "probe_samples": 0, **settings}
    return unlearn(model, ids, method=method, data=loader() if data is None else data, **settings)


@pytest.mark.parametrize("slices", range(1, 9))
def test_epochs_of_the_slices_make_up_the_whole_training(slices):
    for epochs in range((slices + 2) // 2, 60):
        found = slice_epochs(epochs, slices)
        assert len(found) == slices
        assert min(found) >= 1
        assert sum(found) == 2 * epochs * slices // (slices + 1)
        visits = sum(Fraction(number * (place + 1), slices) for place, number in enumerate(found))
        assert abs(visits - epochs) < 1  # whole epochs; exact where they divide
        if 2 * epochs % (slices + 1) == 0:
            assert visits == epochs
    for epochs in range(1, (slices + 2) // 2):
        with pytest.raises(ValueError, match="at least"):
            slice_epochs(epochs, slices)


def test_every_id_is_in_one_part_whatever_the_order_of_the_data():
    ids = [*range(20), *(f"user-{one}" for one in range(17))]
    found = assign(ids, 3, 4, seed=1)
    assert set(found) == set(ids)
    sizes = Counter(found.values())
    assert set(sizes) == set(range(12))
    assert max(sizes.values()) - min(sizes.values()) <= 1
    assert assign(reversed(ids), 3, 4, seed=1) == found
    assert assign([*ids, *ids], 3, 4, seed=1) == found
    assert assign(ids, 3, 4, seed=2) != found
    with pytest.raises(MissingRequirementError, match="at least 38 samples"):
        assign(ids, 19, 2, seed=1)


def test_unlearn_gives_what_the_training_gives(original, copied, tmp_path):
    folder, model = original
    result = forget(model, copied, probe_samples=100, adapter=ADAPTER)
    assert {"accuracy", "samples"} == set(result.stages[0].probe_after), "no step of the ensemble has a loss"
    twin = training(tmp_path / "twin").fit(loader(), without=FORGET)
    assert same(result.model, twin)
    assert files(copied) == files(tmp_path / "twin")
    assert training(copied).deleted == tuple(FORGET)
    assert not same(result.model, model)
    assert result.method == "Sisa"
    assert result.stages[0].steps > 0
    assert same(training(folder).ensemble(), model), "the pass worked on another folder"
    data = {"train": loader(), "test": loader()}
    verdict = evaluate(model, result.model, FORGET, data=data, retrained=twin, adapter=ADAPTER)
    assert verdict.verdict


def test_subjects_named_by_keys(tmp_path):
    keys = [f"user-{row // 2}" for row in range(12)]
    settings = {"shards": 1, "slices": 2, "epochs": 3, "sample_keys": keys}
    model = training(tmp_path / "a", **settings).fit(loader(12))
    result = forget(model, tmp_path / "a", ["user-2"], loader(12), sample_keys=keys)
    assert same(result.model, training(tmp_path / "b", **settings).fit(loader(12), without=["user-2"]))


def test_a_whole_shard_leaves_the_vote(original, copied):
    found = parts(training(copied))
    ids = [one for (shard, _), own in found.items() if shard == 0 for one in own]
    result = forget(original[1], copied, ids)
    assert list(result.model.members) == ["1"]
    assert same(result.model.members["1"], original[1].members["1"])
    assert result.stages[0].relative_change == 0
    with pytest.raises(StoreMismatchError, match="another one"):
        forget(result.model, copied, [found[1, 0][0]], module_factory=lambda: Noted(width=9))


def test_other_models_and_folders_are_refused_and_nothing_changes(original, copied, tmp_path):
    before = (copied / "sisa.json").read_bytes(), files(copied)
    with pytest.raises(MissingRequirementError, match="the SisaEnsemble of the folder"):
        forget(original[1].members["0"], copied)
    other = training(tmp_path / "other", shards=1, slices=1).fit(loader())
    with pytest.raises(StoreMismatchError, match="the ensemble of the training in"):
        forget(other, copied)
    with pytest.raises(UnsupportedStrategyError, match="one process"):
        forget(original[1], copied, trainer={"accelerator": "cpu", "devices": 2})
    with pytest.raises(StoreMismatchError, match="batch_size"):
        forget(original[1], copied, data=loader(batch_size=8))
    with pytest.raises(MissingRequirementError, match="Sisa needs"):
        unlearn(original[1], FORGET, method="sisa", data=loader())
    assert before == ((copied / "sisa.json").read_bytes(), files(copied))


def test_the_ensemble_answers_for_its_members(original, tmp_path):
    model = original[1]
    x, y, _ = dataset()[:]
    assert not model.training
    with torch.no_grad():
        shares = torch.stack([member(x).softmax(1) for member in model.members.values()])
        assert torch.allclose(model(x).exp(), shares.mean(0), atol=1e-6)
        voting = SisaEnsemble(list(model.members.values()), vote="majority").eval()
        assert voting(x).argmax(1).tolist() != []
        averaging = SisaEnsemble(list(model.members.values()), vote="mean").eval()
        assert torch.allclose(averaging(x), torch.stack([member(x) for member in model.members.values()]).mean(0))
        accuracy = MulticlassAccuracy(3, average="micro")(model(x), y)
    assert accuracy > 0.5
    inputs = DataLoader(x, 8)
    predicted = torch.cat(quiet_trainer().predict(model, inputs))
    assert torch.allclose(predicted, model(x), atol=1e-6)
    save_checkpoint(model, tmp_path / "ensemble.ckpt")
    again = SisaEnsemble([Noted(), Noted()])
    again.load_state_dict(torch.load(tmp_path / "ensemble.ckpt", weights_only=True)["state_dict"])
    assert same(again, model)


def test_the_ensemble_is_trained_by_nothing_else(original):
    with pytest.raises(MissingRequirementError, match="SisaEnsemble"):
        unlearn(original[1], FORGET, method=FineTune(max_steps=1), data=loader(), trainer=TRAINER)
    with pytest.raises(UnsupportedStrategyError, match="SisaEnsemble"):
        original[1].training_step(None, 0)
    with pytest.raises(ValueError, match="at least one module"):
        SisaEnsemble([])
