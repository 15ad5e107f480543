import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MeanMetric

from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.modules.probe import probe_loss, reestimate
from lightning_unlearn.modules.unlearning_module import UnlearningModule
from tests.modules.cases import Adversarial, Joint, User, dataset, loader, same, trainer, weights


class Demanding(User):
    """Leans on everything a Trainer gives: itself, optimizers, logging, metrics, lists, counters, random numbers."""

    def __init__(self):
        super().__init__()
        self.noise = nn.Dropout(0.5)
        self.seen, self.count = [], 0
        self.mean = MeanMetric()
        self.register_buffer("ema", torch.zeros(()))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        assert not self.trainer.training
        return [batch[0] + 1, batch[1]]

    def training_step(self, batch, batch_idx):
        x, y = batch
        assert self.trainer.global_step == 0
        self.log("lr", self.optimizers().param_groups[0]["lr"])
        self.seen.append(len(x))
        self.count += 1
        self.mean.update(x)
        self.ema.mul_(0.9).add_(1.0)
        self.log_dict({"a": 1.0}, on_step=True)
        torch.rand(3)
        return functional.cross_entropy(self.net(self.noise(x)), y)


def everything(model):
    return {
        "modes": [module.training for module in model.modules()],
        "keys": set(model.__dict__),
        "lists": (list(model.seen), model.count, model.mean.update_count, model._trainer),
        "rng": torch.get_rng_state().tolist(),
        "grads": [parameter.grad for parameter in model.parameters()],
    }


def expected_loss(model, positions, shift=0.0):
    x, y = (tensor[positions] for tensor in dataset().tensors)
    model.eval()
    with torch.no_grad():
        return float(functional.cross_entropy(model.net(x + shift), y))


def test_loss_is_the_mean_over_all_samples_in_eval_mode_and_nothing_changes():
    model = Demanding()
    model.noise.eval()
    before, state = everything(model), weights(model)
    found = probe_loss(model, loader(batch_size=7))
    assert everything(model) == before
    assert same(weights(model), state)
    assert found == pytest.approx(expected_loss(model, range(40), shift=1.0), rel=1e-6)


def test_at_most_so_many_samples_chosen_by_seed():
    model = Demanding()
    found = [probe_loss(model, loader(batch_size=4), max_samples=10, seed=seed) for seed in (0, 0, 1)]
    chosen = np.random.default_rng(0).permutation(40)[:10]
    assert found[0] == found[1] == pytest.approx(expected_loss(model, chosen, shift=1.0), rel=1e-6)
    assert found[2] != found[0]


def test_it_works_with_a_trainer_still_attached_and_through_a_wrapper():
    model = User()
    fitted = trainer(max_steps=3)
    fitted.fit(model, loader())
    found = probe_loss(model, loader())
    assert model.trainer is fitted
    assert found == probe_loss(UnlearningModule(model, Joint()), loader())
    assert found == pytest.approx(expected_loss(model, range(40)), rel=1e-6)


def test_random_transforms_are_the_same_in_two_probes():
    class Noisy(User):
        def training_step(self, batch, batch_idx):
            return super().training_step([batch[0] + torch.randn_like(batch[0]), batch[1]], batch_idx)["loss"]

    model = Noisy()
    assert probe_loss(model, loader()) == probe_loss(model, loader())


def test_true_half_precision():
    found = probe_loss(User().to(torch.bfloat16), loader())
    assert found == pytest.approx(probe_loss(User(), loader()), rel=0.02)


def test_without_a_loss_there_is_none():
    class Skips(User):
        def training_step(self, batch, batch_idx):
            return None

    assert probe_loss(Adversarial(), loader()) is None
    assert probe_loss(Skips(), loader()) is None


def test_children_that_are_modules_of_lightning_keep_their_trainer():
    class Parent(User):
        def __init__(self):
            super().__init__()
            self.child = User()

    model = Parent()
    assert probe_loss(model, loader()) is not None
    assert model.child._trainer is None


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize("look", [probe_loss, reestimate])
def test_iterable_data_is_refused(look):
    with pytest.raises(UnsupportedStrategyError, match="map-style"):
        look(User(), DataLoader(Stream()))


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_sample_counts_are_checked(value):
    with pytest.raises(ValueError, match="max_samples"):
        probe_loss(User(), loader(), max_samples=value)


# ---- running statistics ----


def moments(model, positions=range(40)):
    """Mean over the data of what enters the norm layer."""
    return model.net[0](dataset().tensors[0][list(positions)]).detach()


def test_statistics_are_those_of_the_data_and_nothing_else_changes():
    model = User()
    model.net[1].running_mean.fill_(100.0)
    parameters = [parameter.clone() for parameter in model.parameters()]
    rng = torch.get_rng_state()
    assert reestimate(model, loader(batch_size=8))
    torch.testing.assert_close(model.net[1].running_mean, moments(model).mean(0))
    assert int(model.net[1].num_batches_tracked) == 5
    assert model.net[1].momentum == 0.1
    assert model.training
    assert model.net[1].training
    assert model._trainer is None
    assert model.acc.update_count == 0
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))


def test_sorted_data_is_shuffled_for_its_variance():
    x = torch.cat([torch.zeros(200, 5), torch.full((200, 5), 10.0)])
    data = TensorDataset(x, torch.zeros(400, dtype=torch.int64))
    model = User()
    assert reestimate(model, DataLoader(data, batch_size=20))
    spread = model.net[0](x).detach().var(0)
    torch.testing.assert_close(model.net[1].running_var, spread, rtol=0.1, atol=1e-4)


def test_a_single_left_over_sample_is_left_out():
    model = User()
    assert reestimate(model, loader(length=17, batch_size=8))
    assert int(model.net[1].num_batches_tracked) == 2


def test_at_most_so_many_batches():
    model = User()
    assert reestimate(model, loader(), max_batches=2)
    assert int(model.net[1].num_batches_tracked) == 2


def test_dropout_stays_off_also_where_the_module_asks_its_own_flag():
    class Functional(User):
        flags: list

        def training_step(self, batch, batch_idx):
            self.flags.append(self.training)
            return super().training_step(batch, batch_idx)

    model = Functional()
    flags = []
    object.__setattr__(model, "flags", FlagList(flags))
    assert reestimate(model, loader())
    assert flags == [False] * 5


class FlagList:
    """Not a list, so the view shares it."""

    def __init__(self, flags):
        self.append = flags.append


def test_manual_steps_run_without_a_weight_moving():
    model = Adversarial()
    model.generator[1].running_mean.fill_(100.0)
    parameters = [parameter.clone() for parameter in model.parameters()]
    assert reestimate(model, loader())
    assert model.generator[1].running_mean.abs().max() < 10
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_manual_steps_that_call_backward_themselves_are_refused_and_restored():
    class Raw(Adversarial):
        def training_step(self, batch, batch_idx):
            functional.cross_entropy(self.generator(batch[0]), batch[1]).backward()

    model = Raw()
    before = weights(model)
    with pytest.raises(UnsupportedStrategyError, match="Keep the running statistics"):
        reestimate(model, loader())
    assert same(before, weights(model))


def test_modules_without_such_layers_say_so():
    assert not reestimate(User(norm=False), loader())
