import pytest

from lightning_unlearn.tuning.journal import TrialJournal
from lightning_unlearn.tuning.optional import load_optuna


def study_on(journal):
    optuna = load_optuna()
    return optuna.create_study(study_name="one", storage=journal.storage(), load_if_exists=True)


def test_a_journal_that_was_cut_at_any_byte_goes_on(tmp_path):
    path = tmp_path / "journal"
    study = study_on(TrialJournal(path))
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    whole = path.read_bytes()
    study.tell(trial, 0.5)
    told = path.read_bytes()
    assert len(told) > len(whole)
    for cut in range(len(whole), len(told) + 1):
        path.write_bytes(told[:cut])
        again = study_on(TrialJournal(path))
        added = again.ask()
        again.tell(added, 0.25)
        states = [one.state.name for one in study_on(TrialJournal(path)).trials]
        first = "COMPLETE" if told[:cut].count(b"\n") == told.count(b"\n") else "RUNNING"
        assert states == [first, "COMPLETE"]


def test_an_empty_file_is_a_new_journal(tmp_path):
    (tmp_path / "journal").touch()
    assert study_on(TrialJournal(tmp_path / "journal")).trials == []


def test_a_trial_has_one_owner(tmp_path):
    first, second = TrialJournal(tmp_path / "journal"), TrialJournal(tmp_path / "journal")
    lock = first.claim(3)
    assert second.claim(3) is None
    assert second.claim(4) is not None
    first.release(3, lock)
    assert second.claim(3) is not None


def test_without_optuna_it_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    from lightning_unlearn.exceptions import MissingRequirementError

    with pytest.raises(MissingRequirementError, match=r"pip install lightning-unlearn\[tune\]"):
        load_optuna()
