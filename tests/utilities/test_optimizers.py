import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_unlearn.utilities.optimizers import base_learning_rate, configured_optimizers, scaled_optimizers


def sgd(lr=0.3):
    return SGD([torch.nn.Parameter(torch.zeros(2))], lr=lr, momentum=0.9)


def warm_up(optimizer):
    return LambdaLR(optimizer, lambda step: (step + 1) / 100)


def one_cycle(optimizer):
    return OneCycleLR(optimizer, max_lr=0.3, total_steps=10)


FORMS = {
    "single": lambda o: o,
    "list": lambda o: [o],
    "tuple": lambda o: (o,),
    "dict": lambda o: {"optimizer": o},
    "dict with scheduler": lambda o: {"optimizer": o, "lr_scheduler": warm_up(o)},
    "dict with config": lambda o: {
        "optimizer": o,
        "lr_scheduler": {"scheduler": warm_up(o), "interval": "step", "frequency": 2},
    },
    "dict with plateau": lambda o: {"optimizer": o, "lr_scheduler": ReduceLROnPlateau(o), "monitor": "val_loss"},
    "two lists": lambda o: ([o], [StepLR(o, 1)]),
    "two lists with config": lambda o: ([o], [{"scheduler": one_cycle(o), "interval": "step"}]),
    "list of dicts": lambda o: [{"optimizer": o, "lr_scheduler": {"scheduler": warm_up(o)}}],
    "one cycle": lambda o: ([o], [one_cycle(o)]),
}


@pytest.mark.parametrize("form", FORMS)
def test_base_rates_are_scaled_and_schedules_dropped_in_every_form(form):
    optimizer = sgd()
    scaled = scaled_optimizers(FORMS[form](optimizer), 1 / 3, keep_schedulers=False)
    assert scaled == [optimizer]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert not {"initial_lr", "max_lr", "min_lr"} & optimizer.param_groups[0].keys()


def test_every_group_is_scaled_from_its_own_rate():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = AdamW([{"params": parameters[:1], "lr": 0.2}, {"params": parameters[1:]}], lr=0.4)
    [scaled] = scaled_optimizers([optimizer], 0.5, keep_schedulers=False)
    assert [group["lr"] for group in scaled.param_groups] == [0.1, 0.2]


def test_several_optimizers():
    first, second = sgd(0.2), sgd(0.4)
    forms = [
        [first, second],
        ([first, second], [warm_up(first)]),
        ({"optimizer": first, "lr_scheduler": warm_up(first)}, {"optimizer": second}),
    ]
    for form in forms:
        assert configured_optimizers(form)[0] == [first, second]


def test_a_rate_in_a_tensor_stays_that_tensor():
    rate = torch.tensor(0.3)
    optimizer = sgd(rate)
    scaled_optimizers(optimizer, 0.5, keep_schedulers=False)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.15)


SCHEDULES = {
    "warm-up": warm_up,
    "step": lambda o: StepLR(o, 2, gamma=0.5),
    "cosine": lambda o: CosineAnnealingLR(o, 8),
    "one cycle": one_cycle,
    "sequential": lambda o: SequentialLR(o, [warm_up(o), StepLR(o, 1)], milestones=[3]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_kept_schedules_give_the_scaled_rates_at_every_step(name):
    plain, scaled = sgd(), sgd()
    schedules = [SCHEDULES[name](optimizer) for optimizer in (plain, scaled)]
    configured = ([scaled], [{"scheduler": schedules[1], "interval": "step"}])
    optimizers, kept = scaled_optimizers(configured, 0.25, keep_schedulers=True)
    assert optimizers == [scaled]
    assert kept[0]["scheduler"] is schedules[1]
    for _ in range(8):
        for optimizer, schedule in zip((plain, scaled), schedules, strict=True):
            optimizer.step()
            schedule.step()
        assert scaled.param_groups[0]["lr"] == pytest.approx(0.25 * plain.param_groups[0]["lr"], rel=1e-6)


def test_without_schedulers_only_the_optimizers_come_back():
    optimizer = sgd()
    assert scaled_optimizers({"optimizer": optimizer}, 0.5, keep_schedulers=True) == [optimizer]


@pytest.mark.parametrize("configured", [None, [], {}, "sgd", [1, 2], {"lr_scheduler": 1}])
def test_anything_else_is_refused(configured):
    with pytest.raises(TypeError, match="returning optimizers in one of Lightning's forms"):
        configured_optimizers(configured)


def test_the_base_rate_is_the_peak_then_the_initial_then_the_current():
    assert base_learning_rate({"lr": 1.0, "initial_lr": 2.0, "max_lr": 3.0}) == 3.0
    assert base_learning_rate({"lr": 1.0, "initial_lr": 2.0}) == 2.0
    assert base_learning_rate({"lr": 1.0}) == 1.0
