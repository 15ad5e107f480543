"""The monitor against dense Hessians and formulas written out; and that a training does not notice it."""

import math

import pytest
import torch
from lightning import Callback
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.data import DistributedSampler

from lightning_unlearn.callbacks.penalty import divided_every
from lightning_unlearn.callbacks.standard_deviation_penalty import StandardDeviationPenalty
from lightning_unlearn.callbacks.unlearning_error_monitor import UnlearningErrorMonitor
from lightning_unlearn.callbacks.weight_change_penalty import WeightChangePenalty
from lightning_unlearn.exceptions import MissingRequirementError, UnsupportedStrategyError
from tests.callbacks.penalised import GAMMA, STRENGTH, Plain, deviation, fit, largest_difference
from tests.helpers.models import BoringClassifier, IdDataset, loader, quiet_trainer

EXACT = {"max_iterations": 5000, "tolerance": 1e-12}


class Small(BoringClassifier):
    """A few dozen parameters, BatchNorm, dropout, and a hook on batches that must run once."""

    hook_scale = 1.0

    def __init__(self, optimizer=None):
        super().__init__(optimizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 3))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "x": batch["x"] * self.hook_scale}

    def training_step(self, batch, batch_idx):
        loss = functional.cross_entropy(self.net(batch["x"]), batch["y"])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def dense_hessian(module, loss_of):
    """Of a loss of the flat parameters, in eval mode, without anything of the package."""
    module.eval()
    names = [name for name, one in module.named_parameters() if one.requires_grad]
    shapes = [module.get_parameter(name).shape for name in names]
    flat = torch.cat([module.get_parameter(name).detach().flatten() for name in names]).double()
    buffers = {name: one.double() if one.is_floating_point() else one for name, one in module.named_buffers()}

    def loss(vector):
        pieces = vector.split([math.prod(shape) for shape in shapes])
        weights = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        return loss_of(lambda x: functional_call(module, {**weights, **buffers}, (x,)), vector)

    return torch.autograd.functional.hessian(loss, flat)


class Snapshots(Callback):
    """Weights after every step."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.states.append({name: one.clone() for name, one in pl_module.state_dict().items()})


class ForwardIsNet(Small):
    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("penalised", [False, True])
def test_every_part_equals_the_formula_written_out(penalised):
    data = IdDataset(24)
    held = next(iter(loader(data, batch_size=10, shuffle=False)))
    module, snapshots = ForwardIsNet(plain_sgd), Snapshots()
    module.hook_scale = 2.0
    start = torch.cat([one.detach().flatten() for one in module.parameters()]).double()
    monitor = UnlearningErrorMonitor(3, batch=held, **EXACT)
    penalties = [StandardDeviationPenalty(GAMMA), WeightChangePenalty(STRENGTH)] if penalised else []
    trainer = quiet_trainer(callbacks=[*penalties, snapshots, monitor], precision="64-true")
    trainer.fit(module, loader(data, batch_size=6, shuffle=False))

    def loss_of(net, vector):
        logits = net(held["x"].double() * 2.0)
        loss = functional.cross_entropy(logits, held["y"])
        return loss + GAMMA * deviation(logits) + STRENGTH * (vector - start).square().sum() if penalised else loss

    sigmas = []
    assert [record.step for record in monitor.history] == [1, 4, 7, 8]
    for record in monitor.history:
        module.load_state_dict(snapshots.states[record.step - 1])
        values = torch.linalg.eigvalsh(dense_hessian(module, loss_of))
        top = values[values.abs().argmax()]
        sigmas.append(float(top.abs()))
        assert record.singular_value == pytest.approx(sigmas[-1], rel=1e-5)
        assert record.eigenvalue == pytest.approx(float(top), rel=1e-5)
        assert record.converged
        flat = torch.cat([one.detach().flatten() for one in module.parameters()])
        distance = float((flat - start).norm())
        assert record.distance == pytest.approx(distance, rel=1e-10)
        mean = sum(sigmas) / len(sigmas)
        assert record.mean_singular_value == pytest.approx(mean, rel=1e-5)
        squares = sum((0.1 * 0.9**step) ** 2 for step in range(record.step)) / record.step
        expected = squares * distance * mean * (record.step - 1) / 2
        assert record.unlearning_error == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("callbacks", [list, lambda: [StandardDeviationPenalty(GAMMA), WeightChangePenalty(0.1)]])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_training_is_bitwise_the_same(callbacks, accumulate):
    def train(*more):
        module = Small()
        torch.manual_seed(11)
        modes = []

        class Modes(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                modes.append([part.training for part in pl_module.modules()])

        trainer = quiet_trainer(callbacks=[*callbacks(), *more, Modes()], accumulate_grad_batches=accumulate)
        trainer.fit(module, loader(IdDataset(40)))
        return module, torch.rand(3), modes, trainer.callback_metrics["train_loss"]

    plain, watched = train(), train(UnlearningErrorMonitor(1))
    assert largest_difference(watched[0], plain[0]) == 0.0
    assert torch.equal(watched[1], plain[1])
    assert watched[2] == plain[2]
    assert torch.equal(watched[3], plain[3])


def test_what_is_logged_and_what_it_is_measured_on():
    class Reads(Callback):
        def __init__(self):
            self.values = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.values.append({name: float(one) for name, one in trainer.callback_metrics.items()})

    batches = list(loader(IdDataset(24), shuffle=False))
    histories, reads = {}, Reads()
    for name, batch in (("first", "first"), ("own", batches[0]), ("current", "current"), ("third", batches[2])):
        monitor = UnlearningErrorMonitor(1, batch=batch)
        module = Small()
        module.hook_scale = 1.5
        torch.manual_seed(0)
        more = [reads] if name == "first" else []
        quiet_trainer(callbacks=[monitor, *more], max_epochs=1).fit(module, loader(IdDataset(24), shuffle=False))
        histories[name] = [record.singular_value for record in monitor.history]
        if name == "first":
            for values, record in zip(reads.values, monitor.history, strict=True):
                assert values["unlearning_error"] == pytest.approx(record.unlearning_error, rel=1e-6)
                assert values["unlearning_error_distance"] == pytest.approx(record.distance, rel=1e-6)
                assert values["unlearning_error_singular_value"] == pytest.approx(record.singular_value, rel=1e-6)
                assert 0 < values["unlearning_error_share_of_time"] < 1
                assert record.seconds > 0
    assert histories["first"] == pytest.approx(histories["own"], rel=1e-5)
    assert histories["current"][0] == pytest.approx(histories["first"][0], rel=1e-5)
    assert histories["current"][2] == pytest.approx(histories["third"][2], rel=2e-2)
    assert histories["current"][2] != pytest.approx(histories["first"][2], rel=1e-3)


def test_after_every_epoch_as_well():
    logged = []

    class Reads(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            logged.append(float(trainer.callback_metrics["unlearning_error_distance"]))

    monitor = UnlearningErrorMonitor(3, at_epoch_end=True)
    fit(Small(), monitor, Reads(), max_epochs=3, limit_train_batches=4)
    assert [record.step for record in monitor.history] == [1, 4, 7, 8, 10, 12]
    by_step = {record.step: record.distance for record in monitor.history}
    # What an epoch's end logs is in the metrics a hook later; the last step had been measured as a step.
    assert logged[0] == pytest.approx(by_step[4], rel=1e-6)
    plain = UnlearningErrorMonitor(3)
    fit(Small(), plain, max_epochs=3, limit_train_batches=4)
    assert [record.step for record in plain.history] == [1, 4, 7, 10, 12]


def test_the_estimator_of_the_code():
    paper = UnlearningErrorMonitor(2, **EXACT)
    code = UnlearningErrorMonitor(2, estimator="sqrt_eigenvalue", name="code", **EXACT)
    fit(Small(), paper, code, precision="64-true")
    for ours, theirs in zip(paper.history, code.history, strict=True):
        assert theirs.singular_value == pytest.approx(math.sqrt(ours.singular_value), rel=1e-6)


def test_a_loss_that_curves_downwards():
    class Downwards(Plain):
        def training_step(self, batch, batch_idx):
            return -(self.net.head.bias.square() * torch.tensor([3.0, 1.0, 0.5])).sum()

    monitor = UnlearningErrorMonitor(1, **EXACT)
    fit(Downwards(), monitor, max_epochs=1)
    assert [record.eigenvalue for record in monitor.history] == pytest.approx([-6.0] * 6, rel=1e-4)
    assert [record.singular_value for record in monitor.history] == pytest.approx([6.0] * 6, rel=1e-4)


def test_a_given_rate_and_steps_that_a_scaler_skips():
    monitor = UnlearningErrorMonitor(1, lr=0.5)
    fit(Small(plain_sgd), monitor, accumulate_grad_batches=2)
    assert [record.step for record in monitor.history] == [1, 2, 3, 4, 5, 6]
    last = monitor.history[-1]
    expected = 0.25 * last.distance * last.mean_singular_value * 5 / 2
    assert last.unlearning_error == pytest.approx(expected, rel=1e-9)


def test_a_resumed_training_goes_on_with_the_history(tmp_path):
    held = next(iter(loader(IdDataset(8))))

    def run(module, epochs, ckpt_path=None, save=False):
        monitor = UnlearningErrorMonitor(3, batch=held, **EXACT)
        trainer = quiet_trainer(callbacks=[monitor], max_epochs=epochs)
        trainer.fit(module, loader(IdDataset(32), shuffle=False), ckpt_path=ckpt_path)
        if save:
            trainer.save_checkpoint(tmp_path / "epoch.ckpt")
        return [(one.step, one.distance, one.singular_value, one.unlearning_error) for one in monitor.history]

    class Steady(ForwardIsNet):
        def __init__(self):
            super().__init__(plain_sgd)
            self.net[3] = nn.Identity()  # dropout has a random state that the checkpoint does not hold

    whole = run(Steady(), 4)
    first = run(Steady(), 2, save=True)
    resumed = run(Steady(), 4, tmp_path / "epoch.ckpt")
    # The first part measured its own end as well, which then counts in the mean.
    assert [step for step, *_ in whole] == [1, 4, 7, 10, 13, 16]
    assert [step for step, *_ in resumed] == [1, 4, 7, 8, 10, 13, 16]
    assert resumed[:4] == first
    for ours, theirs in zip([resumed[0], *resumed[4:]], [whole[0], *whole[3:]], strict=True):
        assert ours[1:3] == pytest.approx(theirs[1:3], rel=1e-4)


def test_a_second_fit_begins_anew():
    monitor = UnlearningErrorMonitor(2)
    fit(Small(), monitor, max_epochs=1)
    first = monitor.history
    fit(Small(), monitor, max_epochs=1)
    assert [record.distance for record in monitor.history] == [record.distance for record in first]


class Attention(Small):
    """Fused attention has no second derivative."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.net = nn.Linear(6, 3)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        x = x.unsqueeze(1).repeat(1, 3, 1)
        return self.net(functional.scaled_dot_product_attention(x, x, x) + self.attention(x, x, x)[0]).mean(1)

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch["x"]), batch["y"])


@pytest.mark.parametrize("make", [Small, Attention])
@pytest.mark.parametrize("backend", ["aot_eager", None])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_what_has_no_second_derivative_is_run_in_another_way(make, backend):
    def compiled(module):
        return torch.compile(module, backend=backend) if backend else module

    torch._dynamo.reset()
    monitor, plain = UnlearningErrorMonitor(3), UnlearningErrorMonitor(3)
    fit(make(), monitor, StandardDeviationPenalty(GAMMA), compiled=compiled)
    fit(make(), plain, StandardDeviationPenalty(GAMMA))
    ours, theirs = ([record.singular_value for record in one.history] for one in (monitor, plain))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3)
    torch._dynamo.reset()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(precision):
    half, full = UnlearningErrorMonitor(2), UnlearningErrorMonitor(2)
    fit(ForwardIsNet(), half, StandardDeviationPenalty(GAMMA), precision=precision, max_epochs=1)
    fit(ForwardIsNet(), full, StandardDeviationPenalty(GAMMA), max_epochs=1)
    assert half.history[0].singular_value == pytest.approx(full.history[0].singular_value, rel=0.1)
    assert half.history[0].distance == pytest.approx(full.history[0].distance, rel=0.3)


def test_refusals(monkeypatch):
    module = BoringClassifier()
    module.automatic_optimization = False
    with pytest.raises(UnsupportedStrategyError, match="manual optimization"):
        fit(module, UnlearningErrorMonitor())
    trainer = quiet_trainer()
    monkeypatch.setattr(trainer.strategy, "__class__", FSDPStrategy)
    with pytest.raises(UnsupportedStrategyError, match="FSDPStrategy"):
        UnlearningErrorMonitor().setup(trainer, Small(), "fit")

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient * 2

    class Opaque(Plain):
        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(Once.apply(self(batch["x"])), batch["y"])

    with pytest.raises(UnsupportedStrategyError, match=r"differentiated twice.*leave the monitor out"):
        fit(Opaque(), UnlearningErrorMonitor())

    class Skips(Plain):
        def training_step(self, batch, batch_idx):
            return None if not self.training else super().training_step(batch, batch_idx)

    with pytest.raises(MissingRequirementError, match="giving a loss with a gradient"):
        fit(Skips(), UnlearningErrorMonitor())
    for arguments in ({"every_n_steps": 0}, {"batch": "last"}, {"estimator": "x"}, {"lr": 0.0}, {"tolerance": 0}):
        with pytest.raises(ValueError, match="Expected"):
            UnlearningErrorMonitor(**arguments)


def test_a_schedule_of_a_penalty_is_seen():
    penalty = StandardDeviationPenalty(50.0, schedule=divided_every(1, by=1e6))
    with_it, without = UnlearningErrorMonitor(100), UnlearningErrorMonitor(100)
    fit(ForwardIsNet(), with_it, penalty)
    fit(ForwardIsNet(), without)
    assert with_it.history[0].singular_value > 3 * without.history[0].singular_value


def two_processes(batch):
    """Run inside the pool."""
    monitor = UnlearningErrorMonitor(2, batch=batch, **EXACT)
    module = ForwardIsNet(plain_sgd)
    module.net[1], module.net[3] = nn.Identity(), nn.Identity()
    trainer = quiet_trainer(callbacks=[monitor, WeightChangePenalty(0.01)], strategy="ddp", devices=2)
    # Dealt out in order, so that the batches of both are one batch of the single process.
    data = IdDataset(24)
    sampler = DistributedSampler(data, num_replicas=2, rank=torch.distributed.get_rank(), shuffle=False)
    trainer.fit(module, loader(data, batch_size=4, sampler=sampler))
    return [(one.step, one.distance, one.singular_value, one.unlearning_error) for one in monitor.history]


@pytest.mark.parametrize("batch", ["first", "current", "own"])
def test_two_processes_give_the_figures_of_one(gloo_pool, batch):
    given = next(iter(loader(IdDataset(9, seed=3), batch_size=9))) if batch == "own" else batch
    found = gloo_pool.run(two_processes, given)
    monitor = UnlearningErrorMonitor(2, batch=given, **EXACT)
    module = ForwardIsNet(plain_sgd)
    module.net[1], module.net[3] = nn.Identity(), nn.Identity()
    trainer = quiet_trainer(callbacks=[monitor, WeightChangePenalty(0.01)])
    trainer.fit(module, loader(IdDataset(24), batch_size=8, shuffle=False))
    expected = [(one.step, one.distance, one.singular_value, one.unlearning_error) for one in monitor.history]
    assert found[0] == found[1]
    for ours, theirs in zip(found[0], expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
