import json

import pytest

from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.functional.pruning import Pruning
from lightning_unlearn.store.lineage import LedgerEntry, Lineage, Run, lineage_from_dict, lineage_to_dict
from lightning_unlearn.types import ModelState, OptimizerInfo

START = ModelState("d0", (), (), 0.0, 1.0)


def state(digest, *ranges, edits=()):
    return ModelState(digest, ranges, edits, 1.0, 2.0)


def entry(entry_id, amounts, before="d0", after="d1", **changes):
    plain = {"created": "now", "method": "m", "scale": "share", "keep": None, "id_hashes": ("aa",)}
    return LedgerEntry(entry_id=entry_id, amounts=amounts, before=before, after=after, **{**plain, **changes})


def test_json_round_trip():
    lineage = Lineage(
        runs=(Run("fit", 0, (OptimizerInfo("SGD", 0.1, 0.9), OptimizerInfo("AdamW", 1e-3))), Run("repair", 7, ())),
        states=(START, state("d1", (0, 3), (5, 7), edits=("e",))),
        entries=(
            entry("e", {5: 0.1, 3: 1.0}, keep={"*.bias": 1.0, "*": 0.1}),
            entry("f", {}, keep=0.3, purged="purging", undone=True),
            entry("g", {}, keep=Pruning({"*.bias": 1.0, "*": 0.1}, "sum", "random", 3)),
            entry("h", {}, keep=Pruning(0.2, "sum")),
        ),
        key_check="k",
    )
    again = lineage_from_dict(json.loads(json.dumps(lineage_to_dict(lineage), sort_keys=True)))
    assert again == lineage
    assert [list(again.entries[0].keep), list(again.entries[2].keep.keep)] == [
        ["*.bias", "*"]
    ] * 2  # the first match wins, so the order matters


def test_states_are_recognised_by_their_weights():
    lineage = Lineage(states=(START,)).with_state(state("d1", (0, 3))).with_state(state("d1", (0, 4)))
    assert lineage.state_of("d1").ranges == ((0, 4),)
    assert lineage.shortest_state_of("d1").ranges == ((0, 3),)  # step 3 moved no weight
    assert lineage.state_of("other") is lineage.shortest_state_of("other") is None
    again = lineage.with_state(state("d1", (0, 3)))
    assert len(again.states) == 3
    assert again.states[-1].ranges == ((0, 3),)
    twice = Lineage().with_state(state("d1", (0, 3))).with_state(state("d1", (3, 6)))
    assert twice.shortest_state_of("d1").ranges == ((3, 6),)  # the same training once more: the latest
    honoured = state("d1", (0, 5), edits=("e",))
    assert lineage.with_state(honoured).shortest_state_of("d1") == honoured  # an edit of nothing is an edit


def test_runs():
    fit, later = Run("fit", 0, ()), Run("fit", 10, ())
    lineage = Lineage().with_run(fit, resumed=False).with_run(later, resumed=False)
    assert lineage.runs == (fit, later)
    resumed = lineage.with_run(Run("fit", 15, (OptimizerInfo("SGD", 0.1),)), resumed=True)
    assert resumed.runs == (fit, Run("fit", 10, (OptimizerInfo("SGD", 0.1),)))
    assert lineage.with_run(Run("repair", 10, ()), resumed=False).runs == (fit, Run("repair", 10, ()))


def test_subtracted_adds_up_and_stops_at_one():
    lineage = Lineage(entries=(entry("e", {1: 0.25, 2: 0.75}), entry("f", {2: 0.5, 3: 1.0}), entry("g", {1: 1.0})))
    assert lineage.subtracted(["e", "f"]) == {1: 0.25, 2: 1.0, 3: 1.0}
    assert lineage.subtracted([]) == {}


FIT = Lineage(runs=(Run("fit", 0, ()),), states=(START, state("d1", (0, 5)), state("d2", (0, 9))))


def test_truncation_drops_what_contains_the_steps():
    assert FIT.truncated(9) == FIT
    cut = FIT.truncated(5)
    assert [one.digest for one in cut.states] == ["d0", "d1"]
    assert cut.runs == FIT.runs
    assert [one.digest for one in FIT.truncated(0).states] == ["d0"]


def test_truncation_drops_a_later_run_that_led_nowhere():
    lineage = FIT.with_run(Run("fit", 9, ()), resumed=False)
    assert lineage.truncated(9).runs == FIT.runs
    assert lineage.truncated(7).runs == FIT.runs


@pytest.mark.parametrize("n_steps", [5, 9])
def test_truncation_under_a_later_run_is_refused(n_steps):
    lineage = FIT.with_run(Run("repair", 9, ()), resumed=False).with_state(state("d3", (0, 12)))
    with pytest.raises(StoreMismatchError, match="repair run from step 9"):
        lineage.truncated(n_steps)
    assert lineage.truncated(12) == lineage


def test_truncation_under_an_edit_is_refused():
    lineage = FIT.with_entry(entry("e", {7: 1.0}, "d2", "d3")).with_state(state("d3", (0, 9), edits=("e",)))
    with pytest.raises(StoreMismatchError, match="'e'"):
        lineage.truncated(5)
    undone = lineage.with_entry(entry("e", {7: 1.0}, "d2", "d3", undone=True))
    assert [one.digest for one in undone.truncated(5).states] == ["d0", "d1"]
    assert len(undone.entries) == 1
