"""The comparison of several methods: which rows, which numbers, which words."""

import dataclasses
import statistics

import pytest

from lightning_unlearn.report import results_section, say_and_do_not_say
from lightning_unlearn.report.sections import outcome_words
from tests.report.evaluations import seeds


def test_references_come_once_and_a_placebo_beside_its_method():
    table = results_section("Results", seeds()).tables[0]
    assert [(row.label, row.kind) for row in table.rows] == [
        ("original", "reference"),
        ("retrained", "reference"),
        ("amnesiac", "method"),
        ("placebo of amnesiac", "control"),
        ("fine-tune", "method"),
    ]


def test_cells_are_means_and_spreads_over_seeds():
    table = results_section("Results", seeds()).tables[0]
    rows = {row.label: row.cells for row in table.rows}
    cell = rows["amnesiac"]["forget_accuracy"]
    assert cell.mean == pytest.approx(0.1)
    assert cell.spread == pytest.approx(statistics.stdev([0.0, 0.1, 0.2]))
    assert rows["original"]["forget_accuracy"].mean == pytest.approx(0.81)
    assert rows["placebo of amnesiac"]["forget_kl"].mean == 0.5
    assert [column.name for column in table.columns] == ["forget_accuracy", "test_accuracy", "forget_kl", "own_metric"]
    assert table.columns[-1].title == "own_metric" or "later release" in table.columns[-1].title
    assert "3 seeds" in table.note


def test_one_run_has_no_spread_and_says_so():
    table = results_section("Results", {name: found[:1] for name, found in seeds().items()}).tables[0]
    assert all(cell.spread is None for row in table.rows for cell in row.cells.values())
    assert "One run" in table.note


def test_conclusions_are_counted():
    section = results_section("Results", seeds())
    assert outcome_words(seeds()["amnesiac"]) == "forgotten (2 of 3), partly forgotten (1 of 3)"
    assert outcome_words(seeds()["amnesiac"][:1]) == "partly forgotten"
    assert (
        "amnesiac: forgotten (2 of 3), partly forgotten (1 of 3); fine-tune: unconfirmed (3 of 3)."
        in section.paragraphs
    )
    verdicts = {row.label: row.cells for row in section.tables[1].rows}
    assert verdicts["amnesiac"]["seconds"].mean == 2.0
    assert "removed_by_placebo" not in verdicts["fine-tune"]
    assert section.remarks[0] == "amnesiac (first seed): Verdict partly_forgotten."


def test_says_first_when_there_was_nothing_to_forget():
    def nothing(result):
        return dataclasses.replace(result, something_to_forget=False, removed=None)

    everywhere = {name: [nothing(result) for result in found] for name, found in seeds().items()}
    assert results_section("Results", everywhere).paragraphs[0].startswith("The original had not measurably memorised")
    once = {**seeds(), "fine-tune": [nothing(result) for result in seeds()["fine-tune"]]}
    assert results_section("Results", once).paragraphs[0].startswith("In 3 of 6 comparisons")


def test_every_warning_is_shown_once():
    section = say_and_do_not_say(seeds())
    assert section.remarks == ("A warning.", "A note.")


def test_figures_show_all_rows_and_mark_the_retrained_model():
    dots, bars = results_section("Results", seeds()).figures
    assert "Forget accuracy, % (target 0)" in dots.description
    assert "Test accuracy, % (target 99)" in dots.description
    assert "placebo of amnesiac 60" in dots.description
    assert "amnesiac 0.1" in bars.description
    assert "retrained " not in bars.description.removeprefix("KL(retrained || model)")


def test_own_words_replace_the_conclusions():
    assert results_section("Results", seeds(), paragraphs=["Mine."]).paragraphs == ("Mine.",)


@pytest.mark.parametrize("arms", [{}, {"amnesiac": []}])
def test_refuses_nothing_to_compare(arms):
    with pytest.raises(ValueError, match="at least one evaluation"):
        results_section("Results", arms)
    with pytest.raises(ValueError, match="at least one evaluation"):
        say_and_do_not_say(arms)
