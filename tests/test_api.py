"""The story a user lives through, in two calls: record, plan, unlearn, placebo, retrain, evaluate."""

import copy
import pickle

import pytest
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

import lightning_unlearn
from lightning_unlearn import (
    Amnesiac,
    DeletionLedger,
    DeletionRequest,
    FineTune,
    Retrain,
    SubjectGrouping,
    evaluate,
    placebo_request,
    unlearn,
)
from lightning_unlearn.exceptions import DeletionRequestError, MissingRequirementError
from lightning_unlearn.methods import save_method
from tests.helpers.recorded import BATCH, datasets, record

SUBJECTS = [f"user-{row // 8}" if row < 24 else None for row in range(64)]
KEYS = [subject or f"row-{row}" for row, subject in enumerate(SUBJECTS)]
WRONG = range(8)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*asked for took part in.*:lightning_unlearn.exceptions.UnlearningWarning"
)


class Data(LightningDataModule):
    """A user's datamodule: the first user's labels are wrong."""

    def train_dataloader(self):
        return DataLoader(datasets(wrong=WRONG)[0], BATCH, shuffle=True)

    def test_dataloader(self):
        return DataLoader(datasets(wrong=WRONG)[1], 64)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    grouping = SubjectGrouping(SUBJECTS, max_share=0.5, seed=1)
    train = Data().train_dataloader()
    trained = record(tmp_path_factory.mktemp("api"), callbacks=[grouping], train=train, sample_keys=KEYS, epochs=30)
    settings = {"data": Data(), "store": trained.url, "sample_keys": KEYS, "force": True, "seed": 0, "probe_samples": 0}
    return trained, settings


def test_from_record_to_verdict(story):
    trained, settings = story
    request = DeletionRequest(["user-0"])
    plan = request.plan(trained.store, trained.model)
    assert plan.placement == "grouped"
    repair = FineTune(max_steps=20)
    steps = trained.store.n_steps
    placebo = placebo_request(trained.store, request, trained.model)
    innocent = unlearn(trained.model, placebo, method=Amnesiac(), then=repair, control_for=request, **settings)
    assert innocent.entry_id is None
    assert trained.store.n_steps == steps
    assert not DeletionLedger.open(trained.store).entries
    result = unlearn(trained.model, request, method=Amnesiac(), then=repair, **settings)
    trainer = {"max_epochs": 30, "callbacks": [SubjectGrouping(SUBJECTS, max_share=0.5, seed=1)]}
    twin = unlearn(trained.model, request, method=Retrain(), trainer=trainer, **settings)
    truth = datasets()[0].tensors[1][list(WRONG)]
    verdict = evaluate(
        trained.model, result.model, request, data=Data(), retrained=twin.model, placebo=innocent.model, paired=True,
        true_targets=truth, sample_keys=KEYS,
    )  # fmt: skip
    assert verdict.something_to_forget
    assert verdict.samples == {"forget": 8, "retain": 56, "test": 200}
    assert verdict.value("forget_accuracy", "original") > 0.6
    assert verdict.value("forget_accuracy", "retrained") < 0.4
    assert verdict.outcome in ("forgotten", "partly_forgotten", "not_specific", "not_forgotten", "over_forgotten")
    assert verdict.verdict


def test_a_control_subtracts_the_innocent_and_repairs_without_the_requested(story):
    trained, settings = story
    steps, batches = trained.store.n_steps, []

    class Watching(FineTune):
        def step(self, host, batch, batch_idx):
            batches.append(batch["retain"][0][:, 0])
            return super().step(host, batch, batch_idx)

    result = unlearn(
        trained.model, ["user-2"], method=Amnesiac(), then=Watching(max_epochs=1), control_for=["user-0"], **settings
    )
    x = datasets()[0].tensors[0][:, 0]
    seen = set(torch.cat(batches).tolist())
    assert not seen & set(x[:8].tolist()), "the repair taught the requested samples again"
    assert len(seen & set(x[16:24].tolist())) >= 7, "the innocent ones are retained data like any other"
    assert result.plan.request.sample_ids == ("user-2",)
    assert trained.store.n_steps == steps
    assert result.entry_id is None


def test_evaluate_needs_a_split_and_held_out_data(story):
    trained, _ = story
    other = copy.deepcopy(trained.model)
    with pytest.raises(MissingRequirementError, match="request"):
        evaluate(trained.model, other, data=Data())
    with pytest.raises(MissingRequirementError, match="test data"):
        evaluate(trained.model, other, [1], data=Data().train_dataloader())
    with pytest.raises(DeletionRequestError, match="unknown"):
        evaluate(trained.model, other, ["nobody"], data=Data(), sample_keys=KEYS)
    loaders = {"forget": DataLoader(datasets()[0], 64), "test": Data().test_dataloader()}
    result = evaluate(trained.model, other, data=loaders)
    assert result.samples == {"forget": 64, "test": 200}


def test_methods_by_name_and_wrong_arguments(story):
    trained, settings = story
    assert (
        unlearn(trained.model, ["user-1"], method="partial-amnesiac", record=False, **settings).method
        == "PartialAmnesiac"
    )
    with pytest.raises(ValueError, match="one of Amnesiac"):
        unlearn(trained.model, ["user-1"], method="gradient-magic", **settings)
    with pytest.raises(TypeError, match="FineTune"):
        unlearn(trained.model, ["user-1"], method="Amnesiac", then=Amnesiac(), **settings)
    with pytest.raises(ValueError, match="reestimate"):
        unlearn(trained.model, ["user-1"], method="Amnesiac", batch_norm="forget", **settings)


def test_a_method_from_a_file(story, tmp_path):
    trained, settings = story
    path = tmp_path / "tuned.yaml"
    save_method(FineTune(max_steps=2, lr_scale=1e-5), path, comment="Two small steps.")
    given = {"record": False, "trainer": {"accelerator": "cpu"}, "seed": 1, "probe_samples": 0, **settings}
    expected = unlearn(trained.model, ["user-1"], method=FineTune(max_steps=2, lr_scale=1e-5), **given)
    for method in (path, str(path)):
        result = unlearn(trained.model, ["user-1"], method=method, **given)
        assert result.method == "FineTune"
        for mine, theirs in zip(result.model.parameters(), expected.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        unlearn(trained.model, ["user-1"], method="nowhere.yaml", **settings)
    path.write_text("class_path: lightning_unlearn.FineTune\ninit_args: {max_steps: 0}\n")
    with pytest.raises(ValueError, match=r"`max_steps`.*tuned\.yaml"):
        unlearn(trained.model, ["user-1"], method=path, **settings)


def test_a_result_is_plain(story):
    trained, settings = story
    result = unlearn(trained.model, ["user-1"], method=Amnesiac(), record=False, **settings)
    again = pickle.loads(pickle.dumps(result.model))  # noqa: S301
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), result.model.parameters(), strict=True))


def test_the_front_door():
    assert set(dir(lightning_unlearn)) == set(lightning_unlearn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'forget'"):
        _ = lightning_unlearn.forget
