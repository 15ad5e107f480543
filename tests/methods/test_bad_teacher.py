"""Bad Teacher against a loop in plain torch, its limits, and a teacher that knows nothing."""

import copy

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.methods import BadTeacher
from tests.methods.plain_loops import (
    FORGET,
    YesNo,
    assert_same_weights,
    logits_without_learning,
    plain,
    pretrained,
    run,
    sgd,
)
from tests.modules.cases import dataset, loader, network


def kl(logits, target):
    return (target * (target.log() - logits.log_softmax(1))).sum() / len(logits)


def stranger():
    """A teacher that nobody could take for the original."""
    return torch.nn.Sequential(network(norm=False, seed=11), torch.nn.Sigmoid())


@pytest.mark.parametrize("mix", [0.0, 0.4, 1.0])
def test_the_whole_pass_against_a_loop(mix):
    heat, model, incompetent = 2.0, pretrained(), stranger()
    method = BadTeacher(
        retain_weight=0.7, mix=mix, temperature=heat, teacher_factory=stranger, max_steps=6, optimizer=sgd, stop=None
    )
    mine, seen = run(method, model)
    assert len(seen.batches) == 6
    competent = copy.deepcopy(model).eval()

    def loss_of(student, parts):
        (x, _), (forget, _) = parts["retain"], parts["forget"]
        retain = kl(student.net(x) / heat, (competent.net(x).detach() / heat).softmax(1))
        known, unknown = ((one(forget).detach() / heat).softmax(1) for one in (competent.net, incompetent))
        target = mix * unknown + (1 - mix) * known
        return 0.7 * retain + 0.3 * kl(logits_without_learning(student.net, forget) / heat, target)

    assert_same_weights(mine, plain(model, seen.batches, loss_of))
    assert method._teachers is None


def test_multi_label_targets_are_questions():
    x, y = dataset().tensors
    data = DataLoader(TensorDataset(x, functional.one_hot(y, 3).float()), 8, shuffle=True)
    model, incompetent = pretrained(YesNo), stranger()
    settings = {"teacher_factory": stranger, "max_steps": 4, "optimizer": sgd, "stop": None}
    mine, seen = run(BadTeacher(**settings, retain_weight=0.5), model, data)
    competent = copy.deepcopy(model).eval()

    def loss_of(student, parts):
        (x, _), (forget, _) = parts["retain"], parts["forget"]
        binary = functional.binary_cross_entropy_with_logits  # the divergence and a constant
        retain = binary(student.net(x), competent.net(x).detach().sigmoid())
        return 0.5 * (
            retain + binary(logits_without_learning(student.net, forget), incompetent(forget).detach().sigmoid())
        )

    assert_same_weights(mine, plain(model, seen.batches, loss_of))


def test_a_share_of_nothing_stays_where_the_original_is():
    model = pretrained(norm=False)
    still = {"max_steps": 3, "optimizer": lambda ps: torch.optim.SGD(ps, 1.0), "stop": None}
    kept, _ = run(BadTeacher(mix=0.0, **still), model)
    assert_same_weights(kept, model)
    moved, _ = run(BadTeacher(mix=1.0, **still), model)
    assert not torch.allclose(moved.net[0].weight, model.net[0].weight, atol=1e-2)


def test_the_official_reduction_is_the_textbooks_at_a_rate_divided_by_the_classes():
    rate = {"max_steps": 4, "stop": None, "retain_weight": 0.5}
    official, _ = run(
        BadTeacher(reduction="official", optimizer=lambda ps: torch.optim.SGD(ps, 0.3), **rate), pretrained()
    )
    textbook, _ = run(BadTeacher(optimizer=lambda ps: torch.optim.SGD(ps, 0.1), **rate), pretrained())
    assert_same_weights(official, textbook)
    other, _ = run(BadTeacher(optimizer=lambda ps: torch.optim.SGD(ps, 0.3), **rate), pretrained())
    assert not torch.allclose(other.net[0].weight, textbook.net[0].weight, atol=1e-3)


def test_with_the_whole_weight_on_retain_data_forget_data_play_no_part():
    x, y = (tensor.clone() for tensor in dataset().tensors)
    x[list(FORGET)] = float("nan")
    settings = {"retain_weight": 1.0, "max_steps": 3, "stop": None}
    poisoned, _ = run(BadTeacher(**settings), pretrained(), DataLoader(TensorDataset(x, y), 8, shuffle=True))
    plainly, _ = run(BadTeacher(**settings), pretrained(), loader())
    assert_same_weights(poisoned, plainly, rtol=0, atol=0)


def test_the_default_teacher_is_a_fresh_model_of_the_kind_and_draws_from_nobody():
    taught = []

    class Watched(BadTeacher):
        def prepare(self, host):
            state = torch.get_rng_state()
            super().prepare(host)
            assert torch.equal(torch.get_rng_state(), state)
            taught.append(self._teachers)

    model = pretrained()
    for seed in (0, 0, 1):
        run(Watched(seed=seed, max_steps=1, stop=None), model)
    for incompetent, competent in taught:
        assert type(incompetent) is type(model)
        assert not incompetent.training
        assert not any(parameter.requires_grad for one in (incompetent, competent) for parameter in one.parameters())
        assert_same_weights(competent, model, rtol=0, atol=0)
        assert (incompetent.net[1].running_mean == 0).all()
        assert (incompetent.net[0].weight != model.net[0].weight).all()
    weights = [incompetent.net[0].weight for incompetent, _ in taught]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"retain_weight": 0.0}, "retain_weight"),
        ({"mix": 1.1}, "mix"),
        ({"temperature": -1.0}, "temperature"),
        ({"reduction": "mean"}, "reduction"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        BadTeacher(**settings)
