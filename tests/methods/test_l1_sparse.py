"""L1-sparse fine-tuning against fine-tuning and against a plain loop."""

import pytest
import torch

from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.methods import FineTune, L1Sparse
from lightning_unlearn.modules.unlearning_module import UnlearningModule
from tests.methods.passes import Answering, assert_close, cross_entropy, plain, run
from tests.modules.cases import Adversarial, same, weights


@pytest.mark.parametrize("limit", [{"max_steps": 7}, {"max_epochs": 2}, {"max_epochs": 2, "no_l1_epochs": 2}])
def test_without_a_coefficient_it_is_fine_tuning_bit_for_bit(limit):
    tuned, _ = run(FineTune(**{key: value for key, value in limit.items() if key != "no_l1_epochs"}))
    for alpha, equal in ((0.0, True), (1e-3, False)):
        sparse, _ = run(L1Sparse(alpha=alpha, **limit))
        assert same(weights(tuned), weights(sparse)) is equal


@pytest.mark.parametrize(
    ("limit", "coefficients"),
    [
        ({"max_epochs": 4, "no_l1_epochs": 1}, [1.0, 2 / 3, 1 / 3, 0.0]),
        ({"max_epochs": 2}, [1.0, 0.5]),
        ({"max_epochs": 2, "no_l1_epochs": 2}, [1.0, 1.0]),
        ({"max_steps": 6}, None),
    ],
    ids=["epochs", "no-rest", "constant", "steps"],
)
def test_the_pass_is_a_plain_loop(limit, coefficients):
    model, alpha = Answering(), 0.02
    module, seen = run(L1Sparse(alpha=alpha, **limit), model)

    def loss(twin, batch, step):
        share = 1 - step / 6 if coefficients is None else coefficients[seen.epochs[step]]
        penalty = sum(float(alpha) * share * parameter.abs().sum() for parameter in twin.net.parameters())
        return cross_entropy(twin, batch["retain"]) + penalty

    assert_close(module, plain(model, seen.batches, loss, model.hparams.lr / 3))


def test_more_of_it_leaves_less():
    norms, sparsities = [], []
    for alpha in (0.0, 0.01, 0.1):
        module, _ = run(L1Sparse(alpha=alpha, max_epochs=30), Answering(norm=False))
        entries = torch.cat([one.detach().flatten() for one in module.parameters()]).abs()
        norms.append(float(entries.sum()))
        sparsities.append(float(entries.lt(0.02).float().mean()))
    assert norms[0] > norms[1] > norms[2]
    assert sparsities[0] < sparsities[1] < sparsities[2]


def test_frozen_weights_do_not_count():
    model = Answering()
    model.net[0].requires_grad_(False)
    before = model.net[0].weight.clone()
    module, seen = run(L1Sparse(alpha=0.05, max_steps=4), model)
    assert torch.equal(module.net[0].weight, before)

    def loss(twin, batch, step):
        trainable = [one for one in twin.net.parameters() if one.requires_grad]
        penalty = 0.05 * (1 - step / 4) * sum(one.abs().sum() for one in trainable)
        return cross_entropy(twin, batch["retain"]) + penalty

    assert_close(module, plain(model, seen.batches, loss, model.hparams.lr / 3))


def test_manual_optimization_has_no_loss_to_add_to():
    with pytest.raises(UnsupportedStrategyError, match="L1Sparse"):
        UnlearningModule(Adversarial(), L1Sparse())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"no_l1_epochs": 1}, "no_l1_epochs"),
        ({"no_l1_epochs": 3, "max_epochs": 2}, "no_l1_epochs"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        L1Sparse(**settings)
