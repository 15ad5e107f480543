"""Evaluation on two processes, of whole models and of models in pieces, equals evaluation on one."""

import json
import math
import re

import pytest
import torch
from lightning import LightningModule
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_unlearn.exceptions import LightningUnlearnError, MissingRequirementError, UnsupportedStrategyError
from lightning_unlearn.procedures.compare import compare_models
from lightning_unlearn.procedures.evaluate import evaluate
from lightning_unlearn.procedures.relearn import relearn_time
from lightning_unlearn.report.decision_regions import decision_plane
from lightning_unlearn.report.unlearning_report import UnlearningReport

ROLES = ("original", "unlearned", "retrained", "placebo", "first", "second")
SIZES = {"forget": 21, "retain": 40, "test": 33}
TOLERANCE = 1e-5
"""Of numbers around one: two processes may add up in another order."""


class Classifier(LightningModule):
    """Seven hidden units do not split evenly; BatchNorm and dropout have to be in eval mode."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(0.5), nn.Linear(7, 3, bias=False)
            )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def samples(split):
    generator = torch.Generator().manual_seed(SIZES[split])
    x = torch.randn(SIZES[split], 6, generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (SIZES[split],), generator=generator))


def loaders(shuffle=False):
    return {split: DataLoader(samples(split), batch_size=8, shuffle=shuffle) for split in SIZES}


def models(sharded=()):
    found = {role: Classifier(seed).train() for seed, role in enumerate(ROLES)}
    for role in sharded:
        for layer in (found[role].net[0], found[role].net[4], found[role].net):
            fully_shard(layer)
    return found


def evaluated(sharded=(), data=None):
    made = models(sharded)
    first, second = made.pop("first"), made.pop("second")
    result = evaluate(**made, data=data or loaders(), references=[first, second], unlearning_seconds=1.0)
    for role in sharded:
        model = {**made, "first": first, "second": second}[role]
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert all(part.training for part in model.modules())
    rows = {(row.name, row.model): row for row in result.rows}
    compared = compare_models(made, data or loaders(), reference="retrained")
    return result, rows, compared


def numbers(row):
    spread, interval = row.spread, row.interval or (None, None)
    return [row.value, row.reference, row.gap, spread, *interval, row.noise_floor and row.noise_floor.mean]


def close(found, wanted, tolerance):
    if found is None or wanted is None:
        return found is wanted
    return math.isclose(found, wanted, rel_tol=tolerance, abs_tol=tolerance)


@pytest.mark.parametrize("sharded", [(), ROLES, ("unlearned", "second")], ids=["whole", "in pieces", "mixed"])
def test_every_process_gets_the_result_of_one(gloo_pool, sharded):
    result, rows, compared = evaluated()
    assert len(rows) > 40
    tolerance = TOLERANCE if sharded else 0.0
    for other, found, side_by_side in gloo_pool.run(evaluated, sharded):
        assert found.keys() == rows.keys()
        for key, row in rows.items():
            pairs = list(zip(numbers(found[key]), numbers(row), strict=True))
            assert all(close(*pair, tolerance) for pair in pairs), (key, pairs)
        assert (other.outcome, other.verdict, other.samples) == (result.outcome, result.verdict, result.samples)
        for role, values in compared.items():
            assert all(close(side_by_side[role][name], value, tolerance) for name, value in values.items())


def attempt(kind):
    """Inside the pool: what each process is told where the data of the second are not those of the first."""
    rank, data = torch.distributed.get_rank(), loaders()
    if (kind == "labels" and rank) or kind == "labels of both":
        x, y = samples("test").tensors
        data["test"] = DataLoader(TensorDataset(x, y + 5), batch_size=8)
    elif kind == "shorter" and rank:
        data["retain"] = DataLoader(torch.utils.data.Subset(samples("retain"), range(16)), batch_size=8)
    elif kind == "sampler":
        sampler = DistributedSampler(samples("forget"), 2, rank)
        data["forget"] = DataLoader(samples("forget"), batch_size=8, sampler=sampler)
    elif kind == "broken" and rank:
        data["test"] = broken()
    adapter = failing_adapter if kind == "adapter" else None
    made = models(ROLES)
    given = {role: made[role] for role in ("original", "unlearned", "retrained")}
    try:
        evaluate(**given, data=data, adapter=adapter)
    except Exception as error:
        return type(error), str(error)
    return None, ""


def broken():
    yield from list(loaders()["test"])[:2]
    raise OSError("the disk of this process is gone")


def failing_adapter(module, batch):
    logits = module(batch[0])
    if torch.distributed.get_rank():
        raise KeyError("after the forward pass")
    return logits, batch[1]


@pytest.mark.parametrize(
    ("kind", "errors", "match"),
    [
        ("labels", (UnsupportedStrategyError, UnsupportedStrategyError), "the same batches.*got 'different ones'"),
        ("labels of both", (MissingRequirementError, MissingRequirementError), "class numbers from 0 to 2"),
        ("shorter", (UnsupportedStrategyError, UnsupportedStrategyError), "no more of them on process 1"),
        ("sampler", (UnsupportedStrategyError, UnsupportedStrategyError), "no distributed sampler"),
        ("broken", (LightningUnlearnError, OSError), "the disk of this process is gone"),
        ("adapter", (LightningUnlearnError, KeyError), "after the forward pass"),
    ],
)
def test_what_one_process_cannot_do_all_refuse(gloo_pool, kind, errors, match):
    found = gloo_pool.run(attempt, kind)
    for (raised, message), kind_of_error in zip(found, errors, strict=True):
        assert raised is kind_of_error
        assert re.search(match, message), message


def relearn():
    model = models(("original",))["original"]
    try:
        relearn_time(model, loaders()["forget"])
    except UnsupportedStrategyError as error:
        return str(error)
    return ""


def test_relearning_a_model_in_pieces_is_refused_by_name(gloo_pool):
    for message in gloo_pool.run(relearn):
        assert "`model` to be" in message
        assert "full state dict" in message


def relearn_whole():
    return relearn_time(Classifier(0), loaders()["forget"], retrained=Classifier(1), setting="scrub")


def test_relearning_a_whole_model_is_the_same_on_every_process(gloo_pool):
    expected = relearn_whole()
    for found in gloo_pool.run(relearn_whole):
        assert (found.model, found.retrained) == (expected.model, expected.retrained)


def reported(folder):
    """Inside the pool: both processes make the report of the same models in pieces, and write it to the same files."""
    made = models(ROLES)
    result = evaluate(**{role: made[role] for role in ("original", "unlearned", "retrained")}, data=loaders())
    report = UnlearningReport.from_results("Request 1", {"method": [result]}, asked="Asked.", done="Done.")
    return report.to_json(f"{folder}/deep/report.json"), report.to_html(f"{folder}/deep/report.html"), report.to_dict()


def test_every_process_makes_the_same_report(gloo_pool, tmp_path):
    (_, _, first), (_, _, second) = gloo_pool.run(reported, str(tmp_path))
    assert first == second
    assert json.loads((tmp_path / "deep" / "report.json").read_text()) == json.loads(json.dumps(first))
    assert (tmp_path / "deep" / "report.html").read_text().rstrip().endswith("</html>")
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"report.json", "report.html"}


def asked_on_a_plane(sharded):
    made = models(sharded)
    corners = samples("forget").tensors[0][:3]
    plane = decision_plane({role: made[role] for role in ("original", "unlearned")}, *corners, resolution=9)
    for role in sharded:
        assert all(isinstance(parameter, DTensor) for parameter in made[role].parameters())
    return plane


def test_decision_regions_of_models_in_pieces(gloo_pool):
    expected = asked_on_a_plane(())
    for found in gloo_pool.run(asked_on_a_plane, ROLES):
        assert found.changed == expected.changed
        for role, confidences in expected.confidences.items():
            torch.testing.assert_close(found.confidences[role], confidences, rtol=TOLERANCE, atol=TOLERANCE)
