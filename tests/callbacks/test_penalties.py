"""Both penalty callbacks equal the term written into the user's own step, however the training is set up."""

import copy
import pickle

import pytest
import torch
from lightning import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch.nn import functional

from lightning_unlearn.callbacks.loss_terms import add_loss_term
from lightning_unlearn.callbacks.penalty import divided_every
from lightning_unlearn.callbacks.standard_deviation_penalty import StandardDeviationPenalty
from lightning_unlearn.callbacks.weight_change_penalty import WeightChangePenalty
from lightning_unlearn.exceptions import MissingRequirementError, UnsupportedStrategyError
from tests.callbacks.penalised import (
    GAMMA,
    STRENGTH,
    OwnDeviation,
    OwnDistance,
    Plain,
    deviation,
    fit,
    largest_difference,
)
from tests.helpers.models import BoringClassifier, IdDataset, loader, quiet_trainer

PENALTIES = {
    "deviation": (OwnDeviation, lambda: StandardDeviationPenalty(GAMMA)),
    "deviation-submodule": (OwnDeviation, lambda: StandardDeviationPenalty(GAMMA, logits="net.head")),
    "deviation-module": (OwnDeviation, lambda: StandardDeviationPenalty(GAMMA, logits="")),
    "distance": (OwnDistance, lambda: WeightChangePenalty(STRENGTH)),
}


def scaled():
    """float16 with a gradient scaler, on a CPU."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01, eps=1e-3, fused=True)  # a bias before BatchNorm has gradient zero


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=4, line_search_fn="strong_wolfe")


SETTINGS = {
    "plain": ({}, None),
    "clipped": ({"gradient_clip_val": 0.05}, None),
    "accumulated": ({"accumulate_grad_batches": 3}, None),
    "accumulated-uneven": ({"accumulate_grad_batches": 4}, None),
    "bfloat16": ({"precision": "bf16-mixed"}, None),
    "scaler": (scaled, None),
    "scaler-accumulated-clipped": (lambda: {**scaled(), "accumulate_grad_batches": 3, "gradient_clip_val": 0.5}, None),
    "adam-fused": ({}, adam),
    "adam-fused-scaler": (scaled, adam),
    # A line search makes much of the last digit of a loss.
    "lbfgs": ({"precision": "64-true"}, lbfgs),
    "true-bfloat16": ({"precision": "bf16-true"}, None),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_equals_the_term_in_the_step(penalty, setting):
    own, make = PENALTIES[penalty]
    trainer, optimizer = SETTINGS[setting]
    made = trainer if callable(trainer) else lambda: trainer
    found = fit(Plain(optimizer), make(), **made())
    expected = fit(own(optimizer), **made())
    untouched = fit(Plain(optimizer), **made())
    effect = largest_difference(expected, untouched)
    assert effect > 1e-5
    # The squares are summed in another order than by the formula written out; half precision rounds it all.
    assert largest_difference(found, expected) <= (3e-2 if "bfloat16" in setting else 2e-3) * effect


class Gradients(Callback):
    """What the optimizer is about to use in the first step: scaled back where there is a scaler."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0:
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            self.flat = torch.cat([one.grad.flatten() for one in parameters]).double()


class OwnDistanceElsewhere(OwnDistance):
    """Held to weights that it does not start from, so that the first step has something of it."""

    def on_train_start(self):
        self.start = [one.detach().clone() for one in Plain(seed=5).parameters() if one.requires_grad]


@pytest.mark.parametrize("setting", ["plain", "scaler"])
@pytest.mark.parametrize("penalty", ["deviation", "deviation-submodule", "distance"])
def test_the_gradient_is_that_of_an_explicit_loss(penalty, setting):
    elsewhere = {name: tensor.clone() for name, tensor in Plain(seed=5).state_dict().items()}
    own, make = PENALTIES[penalty]
    if penalty == "distance":
        own, make = OwnDistanceElsewhere, lambda: WeightChangePenalty(STRENGTH, anchor=elsewhere)

    def gradient(module, *callbacks):
        reads = Gradients()
        trainer = SETTINGS[setting][0]
        fit(module, *callbacks, reads, max_steps=1, **(trainer() if callable(trainer) else trainer))
        return reads.flat

    found, explicit, plain = gradient(Plain(), make()), gradient(own()), gradient(Plain())
    assert float((explicit - plain).norm() / plain.norm()) > 1e-2
    assert float((found - explicit).norm() / (explicit - plain).norm()) < 1e-6


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("returns", ["dict", "none"])
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_whatever_the_step_returns(penalty, returns):
    own, make = PENALTIES[penalty]
    seen = []

    class Outputs(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(outputs)

    found, expected = Plain(), own()
    found.returns = expected.returns = returns
    fit(found, make(), Outputs())
    fit(expected)
    assert largest_difference(found, expected) < 1e-6
    if returns == "dict":
        assert all(outputs["logits"].shape == (8, 3) for outputs in seen)
    else:
        assert [bool(outputs) for outputs in seen] == [True, False] * 6


@pytest.mark.parametrize(
    "make",
    [lambda: StandardDeviationPenalty(0.0), lambda: WeightChangePenalty(0.0)],
    ids=["deviation", "distance"],
)
@pytest.mark.parametrize("setting", ["plain", "scaler", "lbfgs"])
def test_with_weight_zero_the_training_is_bitwise_the_same(make, setting):
    trainer, optimizer = SETTINGS[setting]
    made = trainer if callable(trainer) else lambda: trainer
    found, plain = fit(Plain(optimizer), make(), **made()), fit(Plain(optimizer), **made())
    assert largest_difference(found, plain) == 0.0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("what", ["net", "module"])
def test_compiled(penalty, what, backend):
    own, make = PENALTIES[penalty]

    def compiled(module):
        if what == "module":
            return torch.compile(module, backend=backend)
        module.net.compile(backend=backend)
        return module

    torch._dynamo.reset()
    first = fit(Plain(), compiled=compiled)  # so that code is there that was compiled without any hook
    found = fit(Plain(), make(), compiled=compiled)
    assert largest_difference(found, fit(own())) < 1e-5
    assert largest_difference(first, fit(Plain())) < 1e-5
    assert largest_difference(found, first) > 1e-4
    torch._dynamo.reset()


def test_both_together_and_nothing_is_left_behind():
    class Both(OwnDistance):
        def penalised(self, loss, logits):
            return super().penalised(loss, logits) + GAMMA * deviation(logits)

    callbacks = [StandardDeviationPenalty(GAMMA, logits="net.head"), WeightChangePenalty(STRENGTH)]
    for order in (callbacks, callbacks[::-1]):
        module = fit(Plain(), *order)
        assert largest_difference(module, fit(Both())) < 1e-6
        assert "training_step" not in vars(module)
        assert not module.net.head._forward_hooks
        assert not any(vars(callback)["_fit"] for callback in callbacks)


def test_an_exception_leaves_nothing_behind():
    class Broken(Plain):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("deliberately broken")
            return super().training_step(batch, batch_idx)

    module = Broken()
    with pytest.raises(RuntimeError, match="deliberately broken"):
        fit(module, StandardDeviationPenalty(GAMMA, logits="net.head"), WeightChangePenalty(STRENGTH))
    assert "training_step" not in vars(module)
    assert not module.net.head._forward_hooks


def test_a_step_that_stood_on_the_instance_is_put_back():
    module, term = Plain(), StandardDeviationPenalty(1.0)
    mine = module.__dict__["training_step"] = lambda batch, batch_idx: None
    remove = add_loss_term(module, term)
    assert module.training_step is not mine
    remove()
    remove()
    assert module.__dict__["training_step"] is mine


def test_copies_of_a_module_in_training_have_no_penalty():
    copies = []

    class Copies(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 0:
                trainer_of, pl_module._trainer = pl_module._trainer, None
                optimizer, pl_module.make_optimizer = pl_module.make_optimizer, None
                copies[:] = [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]  # noqa: S301
                pl_module._trainer, pl_module.make_optimizer = trainer_of, optimizer

    module = fit(Plain(), StandardDeviationPenalty(GAMMA), Copies(), max_epochs=1)
    batch = next(iter(loader(IdDataset(8))))
    for copied in copies:
        copied.eval()
        with torch.no_grad():
            loss = copied.training_step(batch, 0)
            assert torch.equal(loss, functional.cross_entropy(copied(batch["x"]), batch["y"]))
        assert copied.training_step.__self__ is copied is not module


def test_validation_is_not_penalised_and_the_term_is_logged():
    class Validated(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            loss = functional.cross_entropy(self(batch["x"]), batch["y"])
            self.log("val_loss", loss)
            return loss

    values = []

    class Reads(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            values.append((float(outputs["loss"]), {key: float(one) for key, one in trainer.callback_metrics.items()}))

    module = Validated()
    callbacks = [StandardDeviationPenalty(GAMMA), WeightChangePenalty(STRENGTH, schedule=divided_every(1, by=4.0))]
    trainer = quiet_trainer(callbacks=[*callbacks, Reads()])
    trainer.fit(module, loader(IdDataset(32)), loader(IdDataset(16, seed=1), shuffle=False))
    for loss, logged in values:
        added = logged["standard_deviation_penalty"] + logged["weight_change_penalty"]
        assert loss == pytest.approx(logged["train_loss"] + added, rel=1e-5)
    weights = [logged["weight_change_penalty_weight"] for _, logged in values]
    assert weights == pytest.approx([STRENGTH] * 4 + [STRENGTH / 4] * 4)
    held_out = IdDataset(16, seed=1)
    with torch.no_grad():
        expected = functional.cross_entropy(module.eval()(held_out.x), held_out.y)
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(float(expected), rel=1e-4)


def test_what_validation_runs_through_the_submodule_is_none_of_its_business():
    class Validated(Plain):
        def validation_step(self, batch, batch_idx):
            self.net.head.requires_grad_(True)
            with torch.enable_grad():
                self(batch["x"])

    seen = []

    def select(output):
        seen.append(len(output))
        return output

    penalty = StandardDeviationPenalty(GAMMA, logits="net.head", select=select)
    quiet_trainer(callbacks=[penalty]).fit(Validated(), loader(IdDataset(16)), loader(IdDataset(5), shuffle=False))
    assert seen == [8, 8] * 2


def test_manual_optimization_is_refused_with_the_function_named():
    module = BoringClassifier()
    module.automatic_optimization = False
    for callback, name in (
        (StandardDeviationPenalty(1.0), "standard_deviation_penalty"),
        (WeightChangePenalty(1.0), "weight_change_penalty"),
    ):
        with pytest.raises(UnsupportedStrategyError, match=rf"manual optimization.*functional\.{name}\.{name}`"):
            fit(module, callback)


class TwoViews(Plain):
    """Calls its network twice, and a teacher without gradients, and has a head of another number of classes."""

    calls = None

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.second = torch.nn.Linear(6, 5)

    def training_step(self, batch, batch_idx):
        x, y = batch["x"], batch["y"]
        with torch.no_grad():
            functional.cross_entropy(self(x * 3), y)
        one, two = self(x), self.second(x[:3] + 0.1)
        loss = functional.cross_entropy(one, y) + torch.nn.NLLLoss()(two.log_softmax(1), y[:3])
        if self.calls == "mean":
            loss = loss + GAMMA * (deviation(one) * len(one) + deviation(two) * len(two)) / (len(one) + len(two))
        elif self.calls == "sum":
            loss = loss + GAMMA * (deviation(one) + deviation(two))
        elif self.calls == "last":
            loss = loss + GAMMA * deviation(two)
        return loss


@pytest.mark.parametrize("calls", ["mean", "sum", "last"])
def test_several_sets_of_logits_in_a_step(calls):
    expected = TwoViews()
    expected.calls = calls
    found = fit(TwoViews(), StandardDeviationPenalty(GAMMA, calls=calls))
    assert largest_difference(found, fit(expected)) < 1e-6


def test_a_loss_written_by_hand_needs_a_name():
    class ByHand(Plain):
        own = False

        def training_step(self, batch, batch_idx):
            answer = {"scores": self(batch["x"])}
            loss = -answer["scores"].log_softmax(1).gather(1, batch["y"][:, None]).mean()
            return loss + GAMMA * deviation(answer["scores"]) if self.own else loss

    with pytest.raises(MissingRequirementError, match=r"`logits` .*but got 'none'.*logits='head'"):
        fit(ByHand(), StandardDeviationPenalty(GAMMA))
    expected = ByHand()
    expected.own = True
    named = StandardDeviationPenalty(GAMMA, logits="net.head", select=lambda answer: answer * 1.0)
    assert largest_difference(fit(ByHand(), named), fit(expected)) < 1e-6
    with pytest.raises(MissingRequirementError, match=r"'net.tail'.*There are 'net'"):
        fit(ByHand(), StandardDeviationPenalty(GAMMA, logits="net.tail"))
    with pytest.raises(MissingRequirementError, match=r"what `net\.frozen` gives"):
        fit(ByHand(), StandardDeviationPenalty(GAMMA, logits="net.frozen", select=lambda answer: None))


def test_bad_arguments():
    for arguments in ({"gamma": -1.0}, {"gamma": 1.0, "form": "x"}, {"gamma": 1.0, "calls": "x"}):
        with pytest.raises(ValueError, match="Expected"):
            StandardDeviationPenalty(**arguments)
    with pytest.raises(ValueError, match="`select`"):
        StandardDeviationPenalty(1.0, select=torch.neg)
    for arguments in ({"strength": -1.0}, {"strength": 1.0, "layers": "net"}, {"strength": 1.0, "decay": 0.0}):
        with pytest.raises(ValueError, match="Expected"):
            WeightChangePenalty(**arguments)
    for epochs in (0, 0.5):
        with pytest.raises(ValueError, match="`epochs`"):
            divided_every(epochs, by=2.0)
    with pytest.raises(ValueError, match="`schedule`"):
        fit(Plain(), StandardDeviationPenalty(1.0, schedule=lambda trainer: -1.0))
