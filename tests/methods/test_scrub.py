"""SCRUB against fine-tuning and a loop in plain torch; how long its passes are, and when it looks."""

import pytest
import torch
from lightning import seed_everything
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.methods import FineTune, Scrub
from lightning_unlearn.modules.unlearning_module import UnlearningModule
from lightning_unlearn.procedures.held_out_stop import HeldOutStop
from lightning_unlearn.procedures.stopping import PassStops
from tests.methods.plain_loops import (
    FORGET,
    YesNo,
    assert_same_weights,
    logits_by_running_statistics,
    logits_without_learning,
    plain,
    pretrained,
    run,
    sgd,
)
from tests.modules.cases import dataset, loader, same, trainer, weights

PASSES = [("forget",), ("retain",), ("forget",), ("retain",), ("retain",)]


def classes(logits, reference, heat):
    p, log_q = (reference / heat).softmax(1), (logits / heat).log_softmax(1)
    return heat**2 * (p * (p.log() - log_q)).sum() / len(logits)


def questions(logits, reference, heat):
    p, q = (reference / heat).sigmoid(), (logits / heat).sigmoid()
    return heat**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()


def test_without_teacher_and_forget_passes_it_is_fine_tuning_bit_for_bit():
    model = pretrained()
    scrub = Scrub(epochs=3, msteps=0, alpha=0.0, gamma=1.0, lr_scale=1 / 3)
    assert scrub.schedule == [("retain",)] * 3
    mine, seen = run(scrub, model)
    tuned, tuner = pretrained(), FineTune(max_epochs=3)
    wrapped = UnlearningModule(tuned, tuner)
    data = UnlearningDataModule(loader(), FORGET, seed=5).with_parts(("retain",), scrub.schedule)
    trainer(max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(wrapped, datamodule=data)
    assert len(seen.batches) == 12
    assert same(weights(mine), weights(wrapped.unwrap()))
    other, _ = run(Scrub(epochs=3, msteps=0, alpha=0.1, gamma=1.0, lr_scale=1 / 3), model)
    assert not same(weights(mine), weights(other))


@pytest.mark.parametrize(("kind", "divergence"), [("classes", classes), ("questions", questions)])
def test_the_whole_pass_against_a_loop(kind, divergence):
    data, model = loader(), pretrained()
    user_loss = functional.cross_entropy
    if kind == "questions":
        x, y = dataset().tensors
        data = DataLoader(TensorDataset(x, functional.one_hot(y, 3).float()), 8, shuffle=True)
        model, user_loss = pretrained(YesNo), functional.binary_cross_entropy_with_logits
    settings = {"alpha": 0.3, "gamma": 0.7, "temperature": 2.0, "max_divergence": None}
    mine, seen = run(Scrub(**settings, optimizer=sgd), model, data)
    assert [tuple(parts) for epoch, parts in seen.batches] == [
        one for one in PASSES for _ in range(2 if one == ("forget",) else 4)
    ]
    teacher = pretrained(type(model)).eval()

    def loss_of(student, parts):
        if "forget" in parts:
            x, _ = parts["forget"]
            return -divergence(logits_by_running_statistics(student.net, x), teacher.net(x).detach(), 2.0)
        x, y = parts["retain"]
        loss = user_loss(student.net(x), y)
        return 0.7 * loss + 0.3 * divergence(logits_without_learning(student.net, x), teacher.net(x).detach(), 2.0)

    assert_same_weights(mine, plain(model, seen.batches, loss_of))
    assert not torch.allclose(mine.net[0].weight, model.net[0].weight, atol=0.01)


def test_the_first_forget_pass_starts_where_nothing_pulls_unless_batches_normalise():
    model, still = pretrained(), lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    settings = {"epochs": 1, "msteps": 1, "optimizer": still, "max_divergence": None}
    _, seen = run(Scrub(**settings), model)
    first, before = seen.weights[0], model.state_dict()
    assert all((first[name] - before[name]).abs().max() < 1e-5 for name in before)
    _, seen = run(Scrub(**settings, forget_statistics="batch"), model)
    first = seen.weights[0]
    assert max((first[name] - before[name]).abs().max() for name in before) > 1e-3
    assert torch.equal(first["net.1.running_mean"], before["net.1.running_mean"])


@pytest.mark.parametrize(("bound", "steps"), [(None, [2, 4, 2, 4, 4]), (1e-6, [1, 4, 1, 4, 4])])
def test_a_forget_pass_ends_once_far_enough_and_the_others_go_on(bound, steps):
    _, seen = run(Scrub(max_divergence=bound, forget_statistics="batch"), pretrained())
    assert [sum(epoch == one for epoch, _ in seen.batches) for one in range(5)] == steps


def test_the_stop_looks_after_passes_over_retain_data_only():
    data = UnlearningDataModule({"train": loader(), "val": DataLoader(dataset(12, seed=3), 4)}, FORGET)
    (stop,) = [one for one in PassStops(Scrub(), data).callbacks if isinstance(one, HeldOutStop)]
    assert (stop._every, stop._epochs) == (None, [1, 3, 4])
    assert not [one for one in PassStops(Scrub(stop=None), data).callbacks if isinstance(one, HeldOutStop)]


def test_the_teacher_goes_with_the_pass():
    seed_everything(0, verbose=False)
    method = Scrub()
    run(method, pretrained())
    assert method._teacher is None
    assert "_teacher" not in method.settings
    assert method.settings["max_divergence"] == 1.0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"epochs": 1, "msteps": 2}, "msteps"),
        ({"epochs": 0, "msteps": 0}, "epochs"),
        ({"alpha": -1.0}, "alpha"),
        ({"temperature": 0.0}, "temperature"),
        ({"max_divergence": 0.0}, "max_divergence"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        Scrub(**settings)
