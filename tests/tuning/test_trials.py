"""The book-keeping of trials, without any training."""

import pytest
import torch

from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.methods import L1Sparse, NegGradPlus
from lightning_unlearn.methods.search_space import Choices, FloatRange
from lightning_unlearn.tuning.candidates import Candidates
from lightning_unlearn.tuning.journal import TrialJournal
from lightning_unlearn.tuning.objective import ErrorRates, Objective
from lightning_unlearn.tuning.optional import load_optuna
from lightning_unlearn.tuning.trial_task import Outcome
from lightning_unlearn.tuning.trials import TrialStudy
from tests.tuning.blobs import Finite


def study(tmp_path, methods=("l1-sparse", "neg-grad-plus"), **settings):
    objective = settings.pop("objective", Objective("privacy"))
    about = settings.pop("about", {"model": "m"})
    return TrialStudy(TrialJournal(tmp_path / "journal"), Candidates(methods), objective, about=about, **settings)


def outcome(validation=0.25, forget=0.0):
    return Outcome(ErrorRates(forget, validation, 0.25), 0.5, ("said",))


def test_defaults_come_first_and_the_budget_is_kept(tmp_path):
    one = study(tmp_path)
    claimed = []
    while (trial := one.claim(7)) is not None:
        claimed.append(trial)
        one.tell(trial, outcome(0.1 * len(claimed)))
    assert [(trial.label, trial.is_default) for trial in claimed[:2]] == [("L1Sparse", True), ("NegGradPlus", True)]
    assert claimed[0].settings == {name: L1Sparse().settings[name] for name in L1Sparse.search_space}
    assert claimed[1].settings == {name: NegGradPlus().settings[name] for name in NegGradPlus.search_space}
    assert not any(trial.is_default for trial in claimed[2:])
    records = one.records()
    assert [record["number"] for record in records] == list(range(7))
    assert [record["rates"].validation for record in records] == pytest.approx([0.1 * place for place in range(1, 8)])
    assert {tuple(record["notes"]) for record in records} == {("said",)}
    assert study(tmp_path).claim(7) is None  # also for who comes later
    assert study(tmp_path).claim(8) is not None


def test_what_is_being_tried_counts(tmp_path):
    one, other = study(tmp_path), study(tmp_path, worker=1)
    taken = [one.claim(4), other.claim(4), one.claim(4), other.claim(4)]
    assert len({trial.trial.number for trial in taken}) == 4
    assert one.claim(4) is None
    assert other.claim(4) is None


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_no_settings_are_tried_twice_and_a_small_space_is_exhausted(tmp_path, sampler):
    one = study(tmp_path, Finite(), sampler=sampler)
    tried = []
    while (trial := one.claim(100)) is not None:
        tried.append(tuple(trial.settings.items()))
        one.tell(trial, outcome())
    assert len(tried) == len(set(tried)) == 4
    assert len(one.records()) == 4


def test_a_resumed_study_draws_other_candidates(tmp_path):
    found = []
    for _ in range(3):
        one = study(tmp_path, "l1-sparse", sampler="random", seed=5)
        trial = one.claim(3)
        found.append(trial.settings["alpha"])
        one.tell(trial, outcome())
    assert len(set(found)) == 3


def test_one_worker_draws_the_same_again(tmp_path):
    drawn = []
    for place in ("a", "b"):
        one = study(tmp_path / place, seed=5)
        drawn.append([])
        while (trial := one.claim(14)) is not None:
            drawn[-1].append((trial.label, trial.settings))
            one.tell(trial, outcome(0.01 * len(drawn[-1])))
    assert drawn[0] == drawn[1]


def test_a_trial_whose_process_died_is_begun_again(tmp_path):
    one = study(tmp_path, "l1-sparse")
    default, lost = one.claim(3), one.claim(3)
    one.tell(default, outcome())
    lost.lock.release()  # as the system does for a dead process
    again = study(tmp_path, "l1-sparse")
    retried = again.claim(3)
    assert retried.settings == lost.settings
    assert retried.trial.number != lost.trial.number
    again.tell(retried, outcome())
    last = again.claim(3)
    again.tell(last, outcome())
    assert again.claim(3) is None
    assert [record["number"] for record in again.records()] == [0, retried.trial.number, last.trial.number]


def test_a_trial_that_kills_its_process_every_time_is_given_up(tmp_path):
    one = study(tmp_path, "l1-sparse")
    one.tell(one.claim(2), outcome())
    settings = []
    for _ in range(3):
        trial = study(tmp_path, "l1-sparse").claim(2)
        settings.append(trial.settings)
        trial.lock.release()
    assert settings[0] == settings[1] == settings[2]
    assert study(tmp_path, "l1-sparse").claim(2) is None
    record = one.records()[-1]
    assert (record["status"], record["notes"]) == ("failed", ("its process ended before it did",))


def test_defaults_are_never_given_up(tmp_path):
    for _ in range(5):
        trial = study(tmp_path, "l1-sparse").claim(1)
        assert trial.is_default
        trial.lock.release()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"about": {"model": "another"}}, "model"),
        ({"methods": NegGradPlus(retain_weight=0.8)}, "methods"),
        ({"methods": "fine-tune"}, "methods"),
    ],
)
def test_another_study_is_refused(tmp_path, changed, named):
    study(tmp_path, methods=NegGradPlus())
    with pytest.raises(StoreMismatchError, match=f"study with the same {named}, but got"):
        study(tmp_path, **{"methods": NegGradPlus(), **changed})


def test_hopeless_trials_are_ended_and_defaults_are_not(tmp_path):
    pruner = load_optuna().pruners.PercentilePruner(75.0, n_startup_trials=4)
    one = study(tmp_path, "l1-sparse", pruner=pruner)
    bad, good = ErrorRates(0.0, 0.9, 0.1), ErrorRates(0.1, 0.1, 0.1)
    default = one.claim(20)
    assert not one.look(default, 25, bad)
    one.tell(default, outcome())
    for _ in range(4):
        trial = one.claim(20)
        assert not one.look(trial, 25, good)
        one.tell(trial, outcome())
    trial = one.claim(20)
    assert one.look(trial, 25, bad)
    one.tell(trial, Outcome(None, 0.0, ("ended",)))
    assert one.records()[-1]["status"] == "ended"


def test_a_factory_is_told_by_its_name(tmp_path):
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    study(tmp_path, NegGradPlus(optimizer=sgd))
    study(tmp_path, NegGradPlus(optimizer=sgd))
    with pytest.raises(StoreMismatchError, match="methods"):
        study(tmp_path, NegGradPlus(optimizer=torch.optim.Adam))


def test_labels_and_spaces():
    two = Candidates({"a": NegGradPlus(), "b": NegGradPlus(stop=None)}, {"a": {"retain_weight": FloatRange(0.5, 1.0)}})
    assert list(two.of["a"].space) == ["retain_weight"]
    assert two.read(two.parameters("a", {"retain_weight": 0.75})) == ("a", {"retain_weight": 0.75})
    assert two.of["b"].varied({"retain_weight": 0.75}).stop is None
    with pytest.raises(ValueError, match="mapping of labels"):
        Candidates([NegGradPlus(), NegGradPlus(stop=None)])
    with pytest.raises(ValueError, match="mapping of labels"):
        Candidates([])
    with pytest.raises(ValueError, match="declare what to vary"):
        Candidates("retrain")
    with pytest.raises(ValueError, match="first that is tried"):
        Candidates(NegGradPlus(lr_scale=100.0))
    with pytest.raises(ValueError, match="first that is tried"):
        Candidates(NegGradPlus(), {"NegGradPlus": {"stop": Choices(("retain", None))}})
    with pytest.raises(ValueError, match="`spaces`"):
        Candidates(NegGradPlus(), {"Scrub": {}})
