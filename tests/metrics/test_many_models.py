"""Metrics of two groups of models: what goes into them, in which order, and what is refused."""

import pytest
import torch

from lightning_unlearn.functional.forgetting_score import forgetting_score
from lightning_unlearn.functional.klom import klom
from lightning_unlearn.functional.margins import margins
from lightning_unlearn.functional.membership import membership_auroc
from lightning_unlearn.functional.u_lira import u_lira, u_lira_accuracy
from lightning_unlearn.metrics import KLOM, ForgettingScore, ULiRA

TARGETS = torch.arange(12) % 3
METRICS = {"KLOM": KLOM, "ULiRA": ULiRA, "ForgettingScore": ForgettingScore}


def outputs(models=8, shift=0.0):
    generator = torch.Generator().manual_seed(models)
    logits = torch.randn(models, 12, 3, generator=generator, dtype=torch.float64)
    return logits + shift * torch.nn.functional.one_hot(TARGETS, 3)


def filled(metric, groups, order=lambda calls: calls):
    metric.set_dtype(torch.float64)
    calls = [(logits, group, model) for group, several in groups.items() for model, logits in enumerate(several)]
    for logits, group, model in order(calls):
        metric.update(logits, TARGETS, group=group, model=model)
    return metric


def stacked(groups):
    return [torch.stack([margins(logits, TARGETS) for logits in groups[name]]) for name in ("unlearned", "retrained")]


@pytest.fixture
def groups():
    return {"retrained": outputs(9), "unlearned": outputs(8, shift=1.0)}


def test_values_are_those_of_the_functions(groups):
    pair = stacked(groups)
    metric = filled(KLOM(bins=6), groups)
    torch.testing.assert_close(metric.compute(), klom(*pair, bins=6).mean())
    torch.testing.assert_close(metric.compute_per_sample(), klom(*pair, bins=6))
    torch.testing.assert_close(
        filled(ForgettingScore(resolution=20), groups).compute(), forgetting_score(*pair, resolution=20)
    )
    scores = u_lira(*pair, folds=4)
    value = filled(ULiRA(folds=4), groups).compute()
    torch.testing.assert_close(value["u_lira_accuracy"], u_lira_accuracy(*scores).mean())
    torch.testing.assert_close(value["u_lira_auroc"], membership_auroc(-scores[0].flatten(), -scores[1].flatten()))
    assert 0.5 < value["u_lira_auroc"] < 0.9, (
        "unlearned models are the positive class, and here they are the surer ones"
    )
    assert value["u_lira_tpr_at_1e-2_fpr"] >= value["u_lira_tpr_at_1e-3_fpr"]


@pytest.mark.parametrize("name", METRICS)
def test_the_order_of_models_does_not_matter(name, groups):
    torch.testing.assert_close(
        filled(METRICS[name](), groups).compute(), filled(METRICS[name](), groups, lambda calls: calls[::-1]).compute()
    )


@pytest.mark.parametrize("targets", [TARGETS.flip(0), TARGETS[:9]])
def test_other_targets_are_refused_here_and_from_other_processes(targets):
    metric, other = KLOM(), KLOM()
    metric.update(torch.randn(12, 3), TARGETS, group="retrained", model=0)
    metric.update(torch.randn(12, 3), TARGETS.int(), group="unlearned", model=0)
    with pytest.raises(ValueError, match=r"the same for every model.*shuffle"):
        metric.update(torch.randn(len(targets), 3), targets, group="unlearned", model=1)
    assert len(metric.rows) == len(metric.models) == 2, "what was refused is not kept"
    other.update(torch.randn(len(targets), 3), targets, group="unlearned", model=1)
    metric.merge_state(other)
    with pytest.raises(ValueError, match="the same for every model"):
        metric.compute()


def test_a_model_counts_once():
    metric = KLOM()
    for model in (0, 3, 3):
        metric.update(torch.randn(12, 3), TARGETS, group="retrained", model=model)
    metric.update(torch.randn(12, 3), TARGETS, group="unlearned", model=3)
    with pytest.raises(ValueError, match=r"new in 'retrained', but got \[3\]"):
        metric.compute()


@pytest.mark.parametrize(
    ("keywords", "match"),
    [({"group": "original", "model": 0}, "group"), ({"group": "retrained", "model": -1}, "model")],
)
def test_refuses_unclear_updates(keywords, match):
    metric = KLOM()
    with pytest.raises(ValueError, match=match):
        metric.update(torch.randn(12, 3), TARGETS, **keywords)
    assert not metric.rows


@pytest.mark.filterwarnings("ignore:.*was called before the ``update`` method.*")
def test_nothing_and_half_have_no_value():
    with pytest.raises(ValueError, match="both groups"):
        KLOM().compute()
    metric = KLOM()
    metric.update(torch.randn(12, 3), TARGETS, group="unlearned", model=0)
    with pytest.raises(ValueError, match="`retrained` to be a group of at least one model"):
        metric.compute()
