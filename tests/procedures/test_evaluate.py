"""Evaluation of really trained models: what memorised, what never saw the samples, and what says so."""

import copy
import dataclasses
import json
import statistics

import numpy as np
import pytest
import torch
from lightning import LightningModule
from scipy import stats
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.procedures.evaluate import evaluate
from tests.helpers.models import quiet_trainer

FORGET, CLASSES = 20, 4


class Classifier(LightningModule):
    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def blobs(count, seed):
    """Four groups in twelve dimensions, so far apart that no sample is atypical and need be memorised."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    x = torch.eye(12)[y] * 7 + torch.randn(count, 12, generator=generator)
    return x, y


def loader(x, y, **kwargs):
    return DataLoader(TensorDataset(x, y), batch_size=64, **kwargs)


def trained(x, y, seed, epochs=40):
    model = Classifier(seed)
    torch.manual_seed(seed)
    quiet_trainer(max_epochs=epochs).fit(model, loader(x, y, shuffle=True))
    return model


@pytest.fixture(scope="module")
def world():
    """A poisoned and a clean original, three retrained models, and the data of all of them."""
    x, y = blobs(220, 1)
    wrong = y.clone()
    wrong[:FORGET] = (y[:FORGET] + 1) % CLASSES
    test = blobs(300, 2)
    retrained = [trained(x[FORGET:], y[FORGET:], seed) for seed in (10, 11, 12)]
    poisoned, clean = trained(x, wrong, 3), trained(x, y, 3)

    def data(labels, **kwargs):
        return {
            "forget": loader(x[:FORGET], labels[:FORGET], **kwargs),
            "retain": loader(x[FORGET:], y[FORGET:]),
            "test": loader(*test),
        }

    return {
        "poisoned": poisoned,
        "clean": clean,
        "retrained": retrained,
        "poisoned_data": data(wrong),
        "clean_data": data(y),
        "shuffled_data": data(wrong, shuffle=True),
        "true": y[:FORGET],
    }


def full(world, **changes):
    arguments = {
        "original": world["poisoned"],
        "unlearned": world["retrained"][1],
        "retrained": world["retrained"][0],
        "placebo": world["poisoned"],
        "references": world["retrained"][2:],
        "data": world["poisoned_data"],
        "true_targets": world["true"],
    }
    return evaluate(**{**arguments, **changes})


def test_a_model_that_never_saw_the_samples_has_forgotten_them(world):
    result = full(world)
    assert result.something_to_forget is True
    assert result.outcome == "forgotten", result.verdict
    assert result.removed > 0.9
    assert result.value("forget_accuracy", "original") > 0.6
    assert result.value("forget_accuracy") < 0.2
    assert result.value("true_label_accuracy") > 0.8
    assert result.value("test_accuracy") > 0.9


def test_an_untouched_model_has_not(world):
    result = full(world, unlearned=copy.deepcopy(world["poisoned"]))
    assert result.outcome == "not_forgotten", result.verdict
    assert result.removed == pytest.approx(0.0)
    assert result.value("forget_kl") == result.value("forget_kl", "original") > 1


def test_what_a_placebo_does_as_well_is_not_specific(world):
    assert full(world, placebo=world["retrained"][2]).outcome == "not_specific"


def test_without_a_placebo_nobody_claims_that_it_was_forgotten(world):
    result = full(world, placebo=None)
    assert result.outcome == "unconfirmed"
    assert any("No placebo" in warning for warning in result.warnings)
    assert result.models == ("original", "unlearned", "retrained")


def test_clean_samples_leave_nothing_to_forget(world):
    arguments = {"original": world["clean"], "placebo": world["clean"], "data": world["clean_data"]}
    for unlearned in (world["clean"], world["retrained"][1]):
        result = full(world, unlearned=unlearned, true_targets=None, **arguments)
        assert result.something_to_forget is False
        assert result.outcome == "nothing_to_forget", result.verdict
        assert "No measurable memorisation" in result.verdict


def test_a_destroyed_model_is_called_damaged_though_it_forgot(world):
    destroyed = copy.deepcopy(world["poisoned"])
    with torch.no_grad():
        for parameter in destroyed.parameters():
            parameter.mul_(-1)
    result = full(world, unlearned=destroyed)
    assert result.value("forget_accuracy") < 0.5
    assert result.outcome == "damaged"


def test_a_model_that_answers_nan_is_called_damaged(world):
    broken = copy.deepcopy(world["poisoned"])
    with torch.no_grad():
        broken.net[2].bias[0] = torch.nan
    result = full(world, unlearned=broken)
    assert result.outcome == "damaged"
    assert "membership_auroc" not in result.metrics()
    json.dumps(result.to_dict(), allow_nan=False)


def test_parameter_distance_decides_nothing(world):
    """Weights next to the retrained model's with other answers, and far ones with the same answers."""
    far = copy.deepcopy(world["retrained"][0])
    with torch.no_grad():
        # ReLU lets a scale pass from one layer to the next: other weights, the same function.
        far.net[0].weight.mul_(64)
        far.net[0].bias.mul_(64)
        far.net[2].weight.div_(64)
    result = full(world, unlearned=far)
    assert result.value("verification_error") > 10 * result.value("verification_error", "original")
    assert result.outcome == "forgotten"


def test_held_out_reference_without_a_retrained_model(world):
    result = full(world, retrained=None, references=())
    assert result.something_to_forget is True
    assert result.outcome == "forgotten", result.verdict
    assert "held-out samples" in " ".join(result.warnings)
    assert not {"forget_kl", "verification_error"} & set(result.metrics())
    assert result.row("test_accuracy")["unlearned"].reference is None
    clean = evaluate(world["clean"], world["clean"], data=world["clean_data"])
    assert clean.outcome == "nothing_to_forget"
    row = clean.row("forget_accuracy")["unlearned"]
    assert row.reference == clean.value("test_accuracy")
    assert clean.row("membership_auroc")["unlearned"].reference == 0.5


def test_values_equal_independent_implementations(world):
    result = full(world)
    x, y = world["poisoned_data"]["forget"].dataset.tensors
    test_x, test_y = world["poisoned_data"]["test"].dataset.tensors
    with torch.no_grad():
        for role, model in (("original", world["poisoned"]), ("unlearned", world["retrained"][1])):
            p, q = (model(part).double().softmax(1) for part in (x, test_x))
            assert result.value("forget_accuracy", role) == pytest.approx((p.argmax(1) == y).double().mean().item())
            assert result.value("forget_loss", role) == pytest.approx(log_loss(y, p, labels=range(CLASSES)), rel=1e-4)
            truth = torch.cat([torch.ones(len(y)), torch.zeros(len(test_y))])
            scores = torch.cat([p[range(len(y)), y].log(), q[range(len(test_y)), test_y].log()])
            assert result.value("membership_auroc", role) == pytest.approx(roc_auc_score(truth, scores), abs=1e-3)
            g = world["retrained"][0](x).double().softmax(1)
            kl = (g * (g / p).log()).sum(1).mean().item()
            assert result.value("forget_kl", role) == pytest.approx(kl, rel=1e-3)
    distance = torch.cat(
        [
            (a - b).detach().double().flatten()
            for a, b in zip(world["retrained"][1].parameters(), world["retrained"][0].parameters(), strict=True)
        ]
    ).norm()
    assert result.value("verification_error") == pytest.approx(distance.item())
    assert result.value("forget_kl", "retrained") == 0
    assert result.value("verification_error", "retrained") == 0


def test_new_rows_equal_independent_implementations(world):
    result = full(world)
    models = {"original": world["poisoned"], "unlearned": world["retrained"][1], "retrained": world["retrained"][0]}
    probabilities = {
        split: {
            role: model(loader_.dataset.tensors[0]).detach().double().softmax(1).numpy()
            for role, model in models.items()
        }
        for split, loader_ in world["poisoned_data"].items()
    }
    labels = {split: loader_.dataset.tensors[1].numpy() for split, loader_ in world["poisoned_data"].items()}

    def accuracies(role):
        return [(probabilities[split][role].argmax(1) == labels[split]).mean() for split in labels]

    def entropy(role, split):
        """Song and Mittal's formula, sample by sample."""
        return [
            -(1 - p[y]) * np.log(p[y]) - sum(p[k] * np.log(1 - p[k]) for k in range(CLASSES) if k != y)
            for p, y in zip(probabilities[split][role], labels[split], strict=True)
        ]

    truth = [1] * FORGET + [0] * 300
    for role in models:
        p, g = probabilities["forget"][role], probabilities["forget"]["retrained"]
        js = (jensenshannon(p, g, axis=1) ** 2).mean()
        assert result.value("forget_js", role) == pytest.approx(js, rel=1e-3, abs=1e-12)
        distance = np.linalg.norm(p - g, axis=1).mean()
        assert result.value("forget_activation_distance", role) == pytest.approx(distance, rel=1e-4)
        gaps = [abs(a - b) for a, b in zip(accuracies(role), accuracies("retrained"), strict=True)]
        assert result.value("average_gap", role) == pytest.approx(sum(gaps) / 3)
        assert result.value("tug_of_war", role) == pytest.approx((1 - gaps[0]) * (1 - gaps[1]) * (1 - gaps[2]))
        scores = -np.array([*entropy(role, "forget"), *entropy(role, "test")])
        auroc = result.value("modified_entropy_auroc", role)
        assert auroc == pytest.approx(roc_auc_score(truth, scores), abs=1e-3)
        loss_auroc = result.value("membership_auroc", role)
        assert result.value("confidence_auroc", role) == pytest.approx(loss_auroc, abs=1e-3)
    assert result.value("tug_of_war", "original") < 0.6 < result.value("tug_of_war")
    assert list(result.metrics()) == [
        "forget_accuracy",
        "retain_accuracy",
        "test_accuracy",
        "forget_loss",
        "forget_confidence",
        "true_label_accuracy",
        "tug_of_war",
        "average_gap",
        "forget_kl",
        "forget_js",
        "forget_activation_distance",
        "test_kl",
        "membership_auroc",
        "confidence_auroc",
        "modified_entropy_auroc",
        "verification_error",
    ]


def test_intervals_equal_hand_computation(world):
    result = full(world)
    x, y = world["poisoned_data"]["forget"].dataset.tensors
    p = world["poisoned"](x).detach().double().softmax(1)
    confidences = p[range(FORGET), y].numpy()
    expected = stats.t.interval(0.95, FORGET - 1, confidences.mean(), stats.sem(confidences))
    row = result.row("forget_confidence")["original"]
    assert row.interval == pytest.approx(expected, rel=1e-4)
    assert row.interval[0] < row.value < row.interval[1]
    correct = int((p.argmax(1) == y).sum())
    share = (correct + 2) / (FORGET + 4)
    half = 1.959964 * (share * (1 - share) / (FORGET + 4)) ** 0.5
    row = result.row("forget_accuracy")["original"]
    assert row.interval == pytest.approx((max(share - half, 0), min(share + half, 1)))
    assert row.interval[0] <= row.value <= row.interval[1]
    row = result.row("membership_auroc")["original"]
    assert row.interval == pytest.approx((row.value - 1.959964 * row.spread, min(row.value + 1.959964 * row.spread, 1)))
    for name in ("tug_of_war", "average_gap", "verification_error"):
        assert all(row.interval is None for row in result.row(name).values()), "no error over samples is known"
    assert "Student's for means" in " ".join(result.notes)


def test_a_noise_floor_takes_two_numbers_of_retrained_models(world):
    alone = full(world, references=())
    assert all(row.noise_floor is None for row in alone.rows)
    assert "much two retrainings differ was not measured" in " ".join(alone.warnings)
    pair = full(world, references=world["retrained"][1:2])
    x, y = world["poisoned_data"]["test"].dataset.tensors
    accuracies = [float((model(x).argmax(1) == y).double().mean()) for model in world["retrained"]]
    floor = pair.row("test_accuracy")["original"].noise_floor
    assert floor.count == 2
    assert floor.mean == pytest.approx(statistics.mean(accuracies[:2]))
    assert floor.spread == pytest.approx(statistics.stdev(accuracies[:2]))
    distances = ("tug_of_war", "average_gap", "forget_kl", "forget_js", "test_kl", "verification_error")
    assert all(row.noise_floor is None for name in distances for row in pair.row(name).values()), "one distance only"
    three = full(world, references=world["retrained"][1:])
    assert three.row("test_accuracy")["unlearned"].noise_floor.mean == pytest.approx(statistics.mean(accuracies))
    assert three.row("true_label_accuracy")["unlearned"].noise_floor.count == 3
    assert three.row("membership_auroc")["unlearned"].noise_floor.count == 3
    first, *others = (torch.cat([w.flatten() for w in model.parameters()]) for model in world["retrained"])
    lengths = [float((other - first).detach().double().norm()) for other in others]
    for row in three.row("verification_error").values():
        assert row.noise_floor.mean == pytest.approx(statistics.mean(lengths), rel=1e-5)
        assert row.noise_floor.spread == pytest.approx(statistics.stdev(lengths), rel=1e-4)
        assert row.noise_floor.count == 2
    assert "Between trainings: " in three.row("forget_kl")["unlearned"].verdict
    plain = json.loads(json.dumps(three.to_dict(), allow_nan=False))["rows"][0]
    assert plain["noise_floor"]["count"] == 3
    assert len(plain["interval"]) == 2


def test_rows_show_value_reference_gap_and_words(world):
    result = full(world)
    for row in result.rows:
        assert row.verdict
        assert row.gap == pytest.approx(row.value - row.reference)
    assert {row.model for row in result.rows} == {"original", "unlearned", "retrained", "placebo"}
    accuracy = result.row("forget_accuracy")
    assert accuracy["unlearned"].reference == accuracy["retrained"].value
    assert "above" in accuracy["original"].verdict
    assert 0.02 < result.row("membership_auroc")["original"].spread < 0.12
    floor = result.row("forget_kl")["unlearned"].reference
    assert floor > 0, "two retrainings differ, and the row says by how much"
    assert "another retraining" in result.row("forget_kl")["unlearned"].verdict
    assert "(unpaired)" in result.row("verification_error")["unlearned"].label
    assert "(unpaired)" not in full(world, paired=True).row("verification_error")["unlearned"].label
    with pytest.raises(KeyError, match="forget_accuracy"):
        result.row("mia")


def test_costs_samples_and_json(world):
    result = full(world, unlearning_seconds=2.0, retraining_seconds=10.0, store_bytes=1234)
    assert result.costs == {
        "unlearning_seconds": 2.0,
        "retraining_seconds": 10.0,
        "store_bytes": 1234.0,
        "speedup": 5.0,
    }
    assert result.samples == {"forget": FORGET, "retain": 200, "test": 300}
    assert result.seconds > 0
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["outcome"] == result.outcome
    assert len(plain["rows"]) == len(result.rows)
    assert plain["rows"][0].keys() == {field.name for field in dataclasses.fields(result.rows[0])}


def test_retain_is_optional_and_few_samples_are_named(world):
    data = {key: world["poisoned_data"][key] for key in ("forget", "test")}
    x, y = world["poisoned_data"]["forget"].dataset.tensors
    data["forget"] = loader(x[:4], y[:4])
    result = full(world, data=data, true_targets=world["true"][:4])
    assert result.outcome == "unknown"
    assert result.something_to_forget is None
    assert not {"retain_accuracy", "tug_of_war", "average_gap"} & set(result.metrics())
    assert "membership_auroc" not in result.metrics()
    assert any("No membership attack: 4 members" in warning for warning in result.warnings)


def test_a_shuffling_loader_changes_no_value(world):
    first = full(world, true_targets=None)
    second = full(world, data=world["shuffled_data"], true_targets=None)
    for left, right in zip(first.rows, second.rows, strict=True):
        assert left.value == pytest.approx(right.value, rel=1e-5, abs=1e-7), left.name


def test_models_are_left_as_they_were(world):
    models = [world["poisoned"], world["retrained"][1]]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    modes = [model.training for model in models]
    full(world)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [model.training for model in models] == modes


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"data": {"forget": []}}, MissingRequirementError, "loader for test"),
        ({"data": {"test": []}}, MissingRequirementError, "loader for forget"),
        ({"data": {"forget": [], "test": [], "train": []}}, ValueError, "'train'"),
        ({"retrained": None}, ValueError, "references"),
        ({"unlearning_seconds": -1.0}, ValueError, "at least 0"),
        ({"retraining_seconds": float("inf")}, ValueError, "finite and at least 0"),
        ({"true_targets": torch.zeros(3, dtype=torch.long)}, ValueError, "20 integer class numbers"),
    ],
)
def test_refuses_what_cannot_be_compared(world, change, error, match):
    with pytest.raises(error, match=match):
        full(world, **change)


def test_refuses_true_targets_in_an_unknown_order(world):
    dataset = world["poisoned_data"]["forget"].dataset
    batches = BatchSampler(RandomSampler(dataset), batch_size=5, drop_last=False)
    hidden = {**world["poisoned_data"], "forget": DataLoader(dataset, batch_sampler=batches)}
    for data in (world["shuffled_data"], hidden):
        with pytest.raises(ValueError, match="fixed order"):
            full(world, data=data)
