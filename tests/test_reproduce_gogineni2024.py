"""The study on layer-wise partial unlearning: every kind of job at its smallest, and going on where it was stopped."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "examples" / "reproduce"))  # where the script finds its parts

import gogineni2024
import gogineni2024_analysis as analysis
import gogineni2024_runs as runs
import gogineni2024_settings as settings
import gogineni2024_training as training

from lightning_unlearn import Amnesiac, DeltaRecorder, FineTune
from lightning_unlearn.utilities.parameters import weights_digest
from tests.helpers.studies import run_in_two_goes, write_mnist


@pytest.fixture
def root(tmp_path):
    write_mnist(tmp_path / "data", train=300, test=200, noise=60)
    return tmp_path / "data"


def test_a_study_is_written_and_goes_on_where_it_was_stopped(root, tmp_path):
    output = tmp_path / "study"

    def study():
        return gogineni2024.study("smoke", root, output, workers=1)

    everything = settings.jobs_of(settings.PRESETS["smoke"])
    path = tmp_path / "study.json"
    document = run_in_two_goes(gogineni2024, study, path, everything, lambda job: job.kind == "updates")
    jobs = document["jobs"]
    rows = {(job.kind, job.task, job.placement, job.seed): jobs[job.key]["rows"] for job in everything}
    for placement in settings.PLACEMENTS:
        subtracted = analysis.chosen(rows["amnesiac", "MNIST", placement, 0], set="class", role="own", repaired=False)
        steps = {(row["way"], row["keep"]): row["relative_norm"] for row in subtracted}
        assert steps["amnesiac", 1.0] > steps["step, magnitude", 0.1] > steps["step, random", 0.1] > 0
        assert all(row["changed"] <= 0.12 for row in subtracted if row["way"] == "sum, magnitude")
    placed = [rows["amnesiac", "MNIST", placement, 0][2]["share"] for placement in settings.PLACEMENTS]
    assert placed[0] < placed[1]  # grouped, the class makes up more of its batches
    for (kind, *_), found in rows.items():
        for row in analysis.chosen(found, way="retrained"):
            assert row["verification_error"] == 0
        if kind == "updates":
            assert {row["form"] for row in found if "form" in row} == {"naive", "smaller rate", "magnitude"}
        if kind == "storage":
            sizes = {row["keep"]: row["bytes_on_disk"] for row in found}
            assert sizes[0.1] < sizes[1.0]
            assert all(row["bytes"] == row["bytes_on_disk"] for row in found)

    pictures = sorted(path.name for path in tmp_path.glob("study-*.png"))
    assert {"study-storage.png", "study-mnist-keep.png", "study-mnist-fraction-samples.png"} <= set(pictures)
    page = (tmp_path / "study.md").read_text()
    assert all(f"]({name})" in page for name in pictures)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gogineni2024, "draw_figures", lambda rows, tasks, stem: [])  # the slow part
        assert study() == 0


@pytest.mark.filterwarnings("ignore::lightning_unlearn.exceptions.UnlearningWarning")
def test_the_repair_afterwards_is_that_of_the_pass(root, tmp_path):
    preset = settings.PRESETS["smoke"]
    setting = training.prepare(preset.tasks[0], root, settings.Job("amnesiac", "MNIST", 0), "cpu")
    recorder = DeltaRecorder(tmp_path / "store", 1.0, value_dtype="float32", watch=setting.watched)
    study, one = runs.Study(setting, preset, setting.fit(recorder)), setting.sets[0]
    placebo = training.ForgetSet(one.name, one.placebo, ())
    for asked, control_for in ((one, None), (placebo, list(one.rows))):
        arguments = {"store": tmp_path / "store", "control_for": control_for}
        edited = study.unlearn(asked, Amnesiac(), **arguments).model
        chained = study.unlearn(asked, Amnesiac(), then=FineTune(max_steps=preset.repair_steps), **arguments).model
        assert weights_digest(study.repair(one, edited).model) == weights_digest(chained) != weights_digest(edited)


def test_a_partial_form_is_compared_with_the_reference_that_forgot_as_much():
    def row(way, forget, test, seed=0):
        return {"way": way, "seed": seed, "forget_accuracy": forget, "test_accuracy": test}

    rows = [row("untouched", 1.0, 0.9), row("reference", 0.0, 0.5), row("reference", 0.0, 0.3)]
    rows += [row("partial", 0.5, 0.8), row("partial", 1.1, 0.9)]
    found = analysis.at_equal_forgetting(rows, lambda one: one["way"] == "reference")
    assert found == pytest.approx([0.1])  # the line is at 0.7 there; what forgot less than untouched is left out


def test_forgetting_is_told_from_damage_by_the_placebo():
    rows = [
        {"seed": seed, "role": role, "forget_accuracy": accuracy}
        for seed, own in enumerate((0.2, 0.57))
        for role, accuracy in (("own", own), ("placebo", 0.6))
    ]
    assert analysis.own_forgets_more(rows) == "1 of 2"
