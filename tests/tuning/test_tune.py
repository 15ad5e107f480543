"""Real passes, real processes."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_unlearn.api import unlearn
from lightning_unlearn.exceptions import (
    LightningUnlearnError,
    MissingRequirementError,
    SealedDataError,
    UnlearningWarning,
    UnsupportedStrategyError,
)
from lightning_unlearn.methods import L1Sparse, NegGradPlus, PartialAmnesiac, Scrub
from lightning_unlearn.tuning import ErrorRates, Objective, plot_pareto, tune
from tests.helpers.models import quiet_trainer
from tests.tuning.blobs import FORGET, TRAINER, Blobs, Noting, noted, study, trained


@pytest.fixture(scope="module")
def model():
    return trained()


def errors(module, data):
    """Independent of the package's split: the rows are picked by hand."""
    rates = []
    for x, y in ([one[FORGET] for one in data.train_set.tensors], data.val_set.tensors):
        with torch.no_grad():
            rates.append(float((module(x).argmax(1) != y).double().mean()))
    return rates


def test_trials_are_what_unlearn_does_and_the_best_is_chosen(model, tmp_path):
    before = {name: one.clone() for name, one in model.state_dict().items()}
    data = Blobs()
    objective = Objective("bias_removal", lambda_=0.6)
    result = tune(
        model, FORGET, methods=[NegGradPlus(stop=None, max_steps=20), Scrub()], data=data, objective=objective,
        trials=9, trainer=TRAINER, seed=3,
    )  # fmt: skip
    assert len(result.trials) == 9
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert data.trainer is None
    original = errors(model, data)[1]
    for trial in result.trials:
        if trial.rates is None:
            continue
        again = unlearn(
            model, FORGET, method=trial.method, data=Blobs(), trainer=TRAINER, seed=3, record=False, probe_samples=0
        )
        forget, validation = errors(again.model, data)
        assert trial.rates == ErrorRates(pytest.approx(forget), pytest.approx(validation), pytest.approx(original))
        assert trial.value == pytest.approx(0.6 * (1 - forget) + 0.4 * validation)
    assert result.default.settings == {"lr_scale": 1 / 3, "max_steps": 20, "retain_weight": 0.9, "stop": None}
    ended = [trial for trial in result.trials if trial.rates is not None]
    assert result.best.value == min(trial.value for trial in ended)
    assert result.chosen(Objective("bias_removal", 0.0)).rates.validation == min(t.rates.validation for t in ended)
    front = result.pareto_front()
    assert all(
        not (other.goal_error <= one.goal_error and other.rates.validation < one.rates.validation)
        for one in front
        for other in ended
    )
    assert {trial.number for trial in front} >= {result.with_objective(Objective("bias_removal", 1.0)).best.number}
    plot_pareto(result).savefig(tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 5000


def test_the_winner_is_a_config_that_unlearn_takes(model, tmp_path):
    result = tune(
        model,
        FORGET,
        methods="l1-sparse",
        data=Blobs(),
        objective="privacy",
        trials=4,
        trainer=TRAINER,
        sampler="random",
    )
    path = tmp_path / "tuned.yaml"
    result.save(path)
    assert "privacy with lambda 0.5" in path.read_text()
    settings = {"data": Blobs(), "trainer": TRAINER, "seed": 0, "record": False}
    from_file = unlearn(model, FORGET, method=path, **settings)
    direct = unlearn(model, FORGET, method=result.best.method, **settings)
    assert from_file.settings == direct.settings
    for one, other in zip(from_file.model.parameters(), direct.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_trial_that_would_read_test_data_raises(model, tmp_path):
    call = {"methods": Noting(peeks=True, max_steps=5), "data": Blobs(), "objective": "privacy", "trainer": TRAINER}
    with pytest.raises(SealedDataError, match="test_dataloader"):
        tune(model, FORGET, trials=3, storage=tmp_path / "journal", **call)
    with pytest.raises(SealedDataError):  # nor does it count as tried
        tune(model, FORGET, trials=3, storage=tmp_path / "journal", **call)


def test_a_trial_that_fails_is_put_down_and_defaults_that_fail_are_an_error(model):
    call = {"data": Blobs(), "objective": "privacy", "trainer": TRAINER, "sampler": "random", "seed": 1}
    with pytest.warns(UnlearningWarning, match="failed: too large a rate"):
        result = tune(model, FORGET, methods=Noting(breaks_above=0.34, max_steps=5), trials=8, **call)
    failed = [trial for trial in result.trials if trial.status == "failed"]
    assert failed
    assert all(trial.settings["lr_scale"] > 0.34 for trial in failed)
    assert result.best.status == "complete"
    assert result.reasons() == ["ArithmeticError: too large a rate"]
    with pytest.raises(ArithmeticError):
        tune(model, FORGET, methods=Noting(breaks_above=0.1, max_steps=5), trials=8, **call)


def test_validation_data_are_needed_and_must_be_unseen(model):
    data = Blobs()
    call = {"methods": "l1-sparse", "objective": "privacy", "trainer": TRAINER}
    train, val = data.train_dataloader(), data.val_dataloader()
    with pytest.raises(MissingRequirementError, match="validation data"):
        tune(model, FORGET, data=train, **call)
    with pytest.raises(ValueError, match="in both val and test"):
        tune(model, FORGET, data={"train": train, "val": val, "test": val}, **call)
    with pytest.raises(ValueError, match="in both retain and val"):
        tune(model, FORGET, data={"train": train, "val": DataLoader(data.train_set, 40)}, **call)


class Elsewhere(Blobs):
    """Test data that are on another machine."""

    def setup(self, stage):
        if stage == "test":
            raise FileNotFoundError("test.csv")


def test_data_that_cannot_be_compared_are_said(model):
    call = {"methods": "l1-sparse", "objective": "privacy", "trainer": TRAINER, "trials": 1}
    with pytest.warns(UnlearningWarning, match=r"was not checked: FileNotFoundError: test\.csv"):
        assert len(tune(model, FORGET, data=Elsewhere(), **call).trials) == 1


def test_what_cannot_work_is_refused(model):
    call = {"data": Blobs(), "objective": "privacy"}
    with pytest.raises(ValueError, match="every trial needs a fresh one"):
        tune(model, FORGET, methods="l1-sparse", trainer=quiet_trainer(), **call)
    with pytest.raises(MissingRequirementError, match="PartialAmnesiac needs"):
        tune(model, FORGET, methods=PartialAmnesiac(), **call)
    trainer = {**TRAINER, "devices": 2, "strategy": "ddp_fork"}
    with pytest.raises(UnsupportedStrategyError, match="of one process for a trial"):
        tune(model, FORGET, methods="l1-sparse", trainer=trainer, **call)
    with pytest.raises(ValueError, match="something that pickles"):
        tune(model, FORGET, methods="l1-sparse", trainer=lambda **k: quiet_trainer(**k), workers=2, **call)


def test_no_trial_that_ended_is_no_result(model):
    result = tune(model, FORGET, methods=L1Sparse(), data=Blobs(), objective="privacy", trials=1, trainer=TRAINER)
    with pytest.raises(LightningUnlearnError, match="came to their end"):
        result.chosen(Objective("privacy"), label="Scrub")


def test_repeats_are_averaged(model):
    data = Blobs()
    result = tune(
        model, FORGET, methods=NegGradPlus(stop=None), data=data, objective="privacy", trials=1, trainer=TRAINER,
        repeats=3, seed=5,
    )  # fmt: skip
    singles = [
        unlearn(
            model, FORGET, method=NegGradPlus(stop=None), data=data, trainer=TRAINER, seed=seed, record=False,
            probe_samples=0,
        ).model
        for seed in (5, 6, 7)
    ]  # fmt: skip
    found = [errors(one, data) for one in singles]
    assert result.best.rates.forget == pytest.approx(sum(one[0] for one in found) / 3)
    assert result.best.rates.validation == pytest.approx(sum(one[1] for one in found) / 3)


def test_two_workers_never_evaluate_a_trial_twice(tmp_path):
    log = tmp_path / "log"
    result = study(tmp_path / "journal", log, company=2, trials=12, workers=2)
    tried = noted(log)
    assert len(tried) == len(set(tried)) == len(result.trials) == 12
    assert sorted(tried) == sorted((repr(t.settings["lr_scale"]), str(t.settings["max_steps"])) for t in result.trials)
    study(tmp_path / "journal", log, trials=12)
    assert noted(log) == tried


def test_a_killed_study_goes_on(tmp_path):
    log, journal = tmp_path / "log", tmp_path / "journal"
    command = [sys.executable, "-m", "tests.tuning.blobs", str(journal), str(log), "3", "8"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # noqa: S603
    try:
        while process.poll() is None and not (log.exists() and len(noted(log)) >= 1):
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.wait()
    assert process.returncode == -signal.SIGKILL
    (killed,) = noted(log)
    result = study(journal, log, trials=4)
    assert len(result.trials) == 4
    assert noted(log)[:2] == [killed, killed]  # begun again, with the same settings
    assert len(noted(log)) == 5
    assert result.default.number == result.trials[0].number
