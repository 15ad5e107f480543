"""Requests and plans on stores with known content; the numbers are computed a second time, by hand."""

import dataclasses

import numpy as np
import pytest
import torch

from lightning_unlearn.deltas.accumulate import accumulate
from lightning_unlearn.deltas.plan import PlanThresholds
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.exceptions import (
    DeletionRequestError,
    MissingDeltaError,
    MissingRequirementError,
    StoreMismatchError,
)
from lightning_unlearn.functional.pruning import Pruning
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import ModelState, OptimizerInfo, StepStatus
from lightning_unlearn.utilities.parameters import parameter_norm, weights_digest
from tests.deltas.test_accumulate import by_hand
from tests.helpers.stores import Plain, Steps, make_store, tensor_span

STEPS = Steps(keys=True, ids=200)
N_STEPS = 30


def trained(url, *, ranges=((0, N_STEPS),), momentum=0.9, missing=(), status=StepStatus.OVER_BUDGET, **settings):
    """A recorded store and a module whose weights it knows, a distance of 2 away from the start."""
    store, module = make_store(url, **settings), Plain()
    store.begin_run("fit", [OptimizerInfo("SGD", 0.1, momentum)])
    with store.writer() as writer:
        for step in range(N_STEPS):
            writer.append(**(STEPS.without_delta(step, status) if step in missing else STEPS[step]))
    with torch.no_grad():
        module.d.add_(2.0)
    store.add_state(ModelState(weights_digest(module), ranges, (), 2.0, parameter_norm(module)))
    return DeltaStore.open(url), module


def steps_with(ids, steps=range(N_STEPS)):
    return {
        s: sum(one in ids for one in STEPS[s]["sample_ids"]) for s in steps if set(ids) & set(STEPS[s]["sample_ids"])
    }


ASKED = [STEPS[3]["sample_ids"][0], STEPS[9]["sample_ids"][1]]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "at least one"),
        ([1, "a", 1], "duplicate ids: 1"),
        ([1.5], "integers or strings"),
        ([True], "integers or strings"),
        ([None], "integers or strings"),
        ("user-1", "a collection of ids"),
        (7, "integers or strings"),
    ],
)
def test_bad_requests(ids, message):
    with pytest.raises(DeletionRequestError, match=message):
        DeletionRequest(ids)


def test_good_requests():
    assert DeletionRequest(np.array([3, 1])).sample_ids == (3, 1)
    assert DeletionRequest(one for one in ("b", 2)).sample_ids == ("b", 2)
    assert DeletionRequest([1, "1"]).without([1]) == DeletionRequest(["1"])
    with pytest.raises(DeletionRequestError, match="at least one"):
        DeletionRequest([1]).without([1])


@pytest.mark.parametrize("scale", ["step", "share"])
@pytest.mark.parametrize("keep", [None, 0.05])
def test_the_numbers_of_a_plan(tmp_path, scale, keep):
    store, module = trained(tmp_path / "s", ranges=((0, 5), (8, N_STEPS)))
    plan = DeletionRequest(ASKED).plan(store, module, scale=scale, keep=keep)
    touched = steps_with(ASKED, [*range(5), *range(8, N_STEPS)])
    shares = {step: count / 4 for step, count in touched.items()}
    assert plan.steps.tolist() == list(touched)
    assert dict(plan.amounts) == (shares if scale == "share" else dict.fromkeys(touched, 1.0))
    assert plan.touched_fraction == pytest.approx(len(touched) / (N_STEPS - 3))
    assert plan.mean_share == pytest.approx(np.mean(list(shares.values())))
    total = by_hand(STEPS, plan.amounts, lambda name: 1.0 if keep is None else keep)
    norm = np.sqrt(sum((part**2).sum() for part in total.values()))
    assert plan.relative_norm == pytest.approx(norm / 2.0)
    assert plan.relative_weight_norm == pytest.approx(norm / parameter_norm(module))
    assert plan.collateral_ids == {one for s in touched for one in STEPS[s]["sample_ids"]} - set(ASKED)
    assert (plan.unknown_ids, dict(plan.honoured_ids), dict(plan.missing_steps)) == ((), {}, {})
    assert plan.state.digest == weights_digest(module)
    assert plan.seconds_touched == pytest.approx(sum(0.25 + step for step in touched))
    assert plan.retraining_seconds == pytest.approx(sum(0.25 + s for s in [*range(5), *range(8, N_STEPS)]))
    assert plan.estimated_seconds > 0
    assert plan.remaining_methods == ("FineTune", "Retrain", "PartialAmnesiac")
    assert str(len(touched)) in str(plan)
    assert plan.recommendation in str(plan)


def test_a_plan_says_how_many_weights_change(tmp_path):
    module = trained(tmp_path / "s")[1]
    dense = Steps(keys=True, ids=200, keep=1.0)
    other = make_store(tmp_path / "t", keep=1.0)
    other.begin_run("fit", [OptimizerInfo("SGD", 0.1, 0.9)])
    with other.writer() as writer:
        dense.fill(writer, N_STEPS)
    other.add_state(ModelState(weights_digest(module), ((0, N_STEPS),), (), 2.0, parameter_norm(module)))
    asked, found = [dense[3]["sample_ids"][0], dense[9]["sample_ids"][1]], {}
    for when in ("step", "sum"):
        plan = DeletionRequest(asked).plan(other, module, keep=Pruning(0.1, when))
        change = accumulate(other, plan.amounts, keep=plan.keep)
        found[when] = plan.changed_weights
        assert plan.weights == 373
        assert plan.changed_weights == sum(int((total != 0).sum()) for total in change.values())
        norm = np.sqrt(sum(float((total**2).sum()) for total in change.values()))
        assert plan.relative_norm == pytest.approx(norm / 2.0)
        assert f"{plan.changed_weights:,} of 373" in str(plan)
    assert found["sum"] == 30 + 1 + 7 + 1 < found["step"] <= len(plan.steps) * 39
    with pytest.raises(MissingRequirementError, match="to prune the sum"):
        DeletionRequest(ASKED).plan(trained(tmp_path / "u")[0], keep=Pruning(0.1, "sum"))


def test_without_a_model_the_latest_weights_are_meant(tmp_path):
    store, module = trained(tmp_path / "s")
    assert DeletionRequest(ASKED).plan(store).state == store.state_of(weights_digest(module))


def test_an_earlier_checkpoint_holds_only_the_steps_before_it(tmp_path):
    store, _ = trained(tmp_path / "s")
    early = Plain()
    with torch.no_grad():
        early.d.add_(1.0)
    store.add_state(ModelState(weights_digest(early), ((0, 8),), (), 1.0, 1.0))
    late = STEPS[20]["sample_ids"][0]
    assert not steps_with([late], range(8))
    plan = DeletionRequest([ASKED[0], late]).plan(store, early)
    assert plan.steps.tolist() == list(steps_with([ASKED[0]], range(8)))
    assert plan.unknown_ids == (late,)
    with pytest.raises(DeletionRequestError, match="unknown"):
        plan.check(force=True)


def test_the_initial_weights_hold_nothing(tmp_path):
    store, _ = trained(tmp_path / "s")
    plan = DeletionRequest([ASKED[0]]).plan(store, Plain())
    assert plan.steps.size == 0
    assert plan.relative_norm == 0.0
    assert plan.unknown_ids == (ASKED[0],)
    assert "nothing to subtract" in plan.recommendation


def test_weights_nobody_knows(tmp_path):
    store, module = trained(tmp_path / "s")
    with torch.no_grad():
        module.b.mul_(1.001)
    with pytest.raises(StoreMismatchError, match="weights that the store"):
        DeletionRequest(ASKED).plan(store, module)
    other = Plain()
    other.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(StoreMismatchError, match="extra"):
        DeletionRequest(ASKED).plan(store, other)


def test_missing_deltas(tmp_path):
    touched = list(steps_with(ASKED))
    store, module = trained(tmp_path / "s", missing=touched[:1], keep=1.0)
    plan = DeletionRequest(ASKED).plan(store, module)
    assert dict(plan.missing_steps) == {touched[0]: StepStatus.OVER_BUDGET}
    assert plan.remaining_methods == ("FineTune", "Retrain")
    with pytest.raises(MissingDeltaError, match="size budget"):
        plan.check(force=True)
    assert "Amnesiac" in DeletionRequest([STEPS[20]["sample_ids"][0]]).plan(store, module).remaining_methods


def test_plain_sgd_is_always_warned_of(tmp_path):
    store, module = trained(tmp_path / "s", momentum=0.0)
    mild = PlanThresholds(damage=(10, 20, 30, 40))
    plan = DeletionRequest(ASKED).plan(store, module, thresholds=mild)
    assert plan.plain_sgd
    assert plan.damage == "warn"
    assert "without momentum" in plan.recommendation
    assert DeletionRequest(ASKED).plan(trained(tmp_path / "t")[0], thresholds=mild).damage == "fine"


@pytest.mark.parametrize(
    ("thresholds", "reason"),
    [
        (PlanThresholds(damage=(0, 0, 0, 0), touched=(1, 1)), "because of the damage:"),
        (PlanThresholds(damage=(9, 9, 9, 9), touched=(0, 0), grouped_share=2), "because of the lack of specificity:"),
    ],
)
def test_a_refusal_names_its_reason_and_can_be_forced(tmp_path, thresholds, reason):
    store, module = trained(tmp_path / "s")
    plan = DeletionRequest(ASKED).plan(store, module, thresholds=thresholds)
    assert plan.refuses
    with pytest.raises(DeletionRequestError, match=f"(?s){reason}.*force=True"):
        plan.check()
    plan.check(force=True)


def test_a_fine_plan_passes(tmp_path):
    store, module = trained(tmp_path / "s")
    plan = DeletionRequest(ASKED).plan(store, module, thresholds=PlanThresholds(damage=(9, 9, 9, 9), touched=(1, 1)))
    assert plan.damage == "fine"
    plan.check()


def test_without_a_store():
    plan = DeletionRequest(ASKED).plan(None, Plain())
    assert plan.remaining_methods == ("FineTune", "Retrain")
    assert plan.state is None
    assert "no store" in plan.recommendation
    plan.check()
    assert "FineTune" in str(plan)


def test_steps_whose_ids_were_damaged_are_counted(tmp_path):
    store, module = trained(tmp_path / "s")
    name = store.reader.commits[0].segments[0].name
    path = tmp_path / "s" / "rank-00000" / name
    data = bytearray(path.read_bytes())
    data[tensor_span(path, "seconds")[0] + 8 * 5] ^= 1  # in the head: what it says of this step's ids is not trusted
    path.write_bytes(data)
    store.repair()
    plan = DeletionRequest([STEPS[20]["sample_ids"][0]]).plan(store, module)
    assert plan.lost_steps == 1
    assert "1 damaged steps" in plan.recommendation


def test_an_unknown_scale(tmp_path):
    with pytest.raises(ValueError, match="'step', 'share'"):
        DeletionRequest([1]).plan(trained(tmp_path / "s")[0], scale="half")


def test_lost_ids_are_refused_unless_forced(tmp_path):
    store, module = trained(tmp_path / "s")
    plan = DeletionRequest(ASKED[:1]).plan(store, module)
    plan = dataclasses.replace(plan, lost_steps=2, damage="fine", specificity="note")
    with pytest.raises(DeletionRequestError, match="2 damaged steps whose ids are lost"):
        plan.check()
    plan.check(force=True)
