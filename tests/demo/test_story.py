"""The demo's words and tables follow the numbers: turned numbers turn the sentences."""

from lightning_unlearn.demo.arm import ARMS, CONTRIBUTORS, PLACEBOS, VARIANTS, ArmResult, Row
from lightning_unlearn.demo.document import build_report
from lightning_unlearn.demo.story import METRICS, story
from lightning_unlearn.results import EvaluationResult

LABELS = ("original", "retrained twin", "independent retraining", *VARIANTS, *PLACEBOS.values())


def arm(seed, placement, forget):
    """An arm in which `forget[label]` of the mislabelled images keep their wrong label."""
    rows = [
        Row(who, label, {name: forget.get(label, 0.3) if name == "forget_accuracy" else 0.9 for name in METRICS})
        for who in CONTRIBUTORS
        for label in LABELS
    ]
    plan = {
        "touched_fraction": 0.04 if placement == "grouped" else 0.6,
        "relative_norm": 0.1,
        "mean_share": 0.3,
        "collateral": 600,
        "placement": placement,
        "damage": "warn",
        "specificity": "specific",
        "recommendation": "Think first.",
    }
    verdict = EvaluationResult((), ("original",), {}, False, "nothing_to_forget", "Nothing to see.")
    judged = dict.fromkeys(VARIANTS, verdict)
    plans, verdicts = dict.fromkeys(CONTRIBUTORS, plan), dict.fromkeys(CONTRIBUTORS, judged)
    return ArmResult(seed, placement, tuple(rows), plans, verdicts, 1.0, 1_000_000)


def arms(seeds=1, **forget):
    names = {"own": "amnesiac + repair", "placebo": "placebo: amnesiac + repair", "only": "fine-tune only"}
    values = {"original": 0.8, "retrained twin": 0.0}
    values |= {names.get(key, key): value for key, value in forget.items()}
    return [arm(seed, placement, values) for seed in range(seeds) for placement in ARMS]


def test_specific_forgetting():
    text = " ".join(story(arms(seeds=2, own=0.0)))
    assert "80 % of the mislabelled" in text
    assert "It memorised them" in text
    assert "the contributor's own steps did the forgetting" in text


def test_the_placebo_forgets_as_well():
    text = " ".join(story(arms(own=0.0, placebo=0.02, only=0.4)))
    assert "not specific" in text
    assert "did the forgetting" not in text


def test_subtraction_adds_nothing():
    assert "added nothing" in " ".join(story(arms(own=0.3, placebo=0.3, only=0.3)))


def test_nothing_memorised():
    assert "little to forget" in story(arms(original=0.05))[0]


def test_report(tmp_path):
    report = build_report(arms(seeds=2, own=0.0), seconds=12.0)
    titles = [section.title for section in report.sections]
    assert len(titles) == 3 + len(CONTRIBUTORS) * len(ARMS) + 1
    for section in report.sections[3:-1]:
        assert [row.label for row in section.tables[0].rows] == list(LABELS)
        assert len(section.figures) == 2
    assert report.to_html(tmp_path / "page.html").read_text().count("<svg") == 8
    assert report.to_json(tmp_path / "page.json").stat().st_size > 1000
