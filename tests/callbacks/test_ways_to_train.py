"""Every way people train: the same weights with and without a recorder, and deltas that lead to them.

The oracle of each row is the same training without the recorder (bitwise), and initial + sum of deltas, to which what
something else did to the weights is added where anything did.
"""

import copy
from collections import Counter

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LambdaCallback,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.exceptions import UnlearningWarning
from lightning_unlearn.store.delta_store import DeltaStore
from tests.helpers.models import BoringClassifier, IdDataset, loader, quiet_trainer
from tests.helpers.replay import assert_leads_to, replayed, same_weights

DENSE = {"keep": 1.0, "value_dtype": "float32"}


class Plateau(BoringClassifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}


class Checkpointed(BoringClassifier):
    def forward(self, x):
        hidden = checkpoint(self.net.inp, x, use_reentrant=False)
        return self.net.head(checkpoint(self.net.mix, self.net.scale * hidden, use_reentrant=False))


class Validating(BoringClassifier):
    def validation_step(self, batch, batch_idx):
        self.log("val", functional.cross_entropy(self(batch["x"]), batch["y"]))


class GAN(BoringClassifier):
    """Manual optimization: three optimizers, of which one steps on every batch, one on every 2nd, one on every 3rd."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for every, optimizer in enumerate(self.optimizers(), 1):
            if batch_idx % every == 0:
                self.toggle_optimizer(optimizer)
                loss = functional.cross_entropy(self(batch["x"]), batch["y"])
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                self.untoggle_optimizer(optimizer)
        self.seen.append(batch["index"].tolist())

    def configure_optimizers(self):
        net = self.net
        return (
            torch.optim.SGD(net.head.parameters(), lr=0.05),
            torch.optim.AdamW([*net.mix.parameters(), net.scale], lr=1e-2),
            torch.optim.RMSprop([*net.inp.parameters(), *net.norm.parameters()], lr=1e-3),
        )


class SharedParameter(BoringClassifier):
    """Two optimizers hold the same weight."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(functional.cross_entropy(self(batch["x"]), batch["y"]))
            optimizer.step()
        self.seen.append(batch["index"].tolist())

    def configure_optimizers(self):
        head = [*self.net.head.parameters()]
        return torch.optim.SGD([*head, self.net.scale], lr=0.05), torch.optim.SGD([self.net.scale], lr=0.02)


class Subclass(torch.optim.SGD):
    """Its step calls that of its base class, for which torch calls the hooks again if anyone has made an SGD before."""

    def step(self, closure=None):
        loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.99)
        super().step()
        return loss


def subclass(parameters):
    torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    return Subclass(parameters, lr=0.05, momentum=0.9)


def compiled(module):
    return torch.compile(module, backend="eager")


def compiled_inside(module):
    module.compile(backend="eager")
    return module


# name -> (module, what is handed to `fit`, arguments of the Trainer, number of steps of 2 epochs with 5 batches)
WAYS = {
    "clipping by value": (BoringClassifier, None, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, 10),
    "clipping by norm": (BoringClassifier, None, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "norm"}, 10),
    "plateau": (Plateau, None, {}, 10),
    "gradient checkpointing": (Checkpointed, None, {}, 10),
    "three optimizers": (GAN, None, {}, 2 * (5 + 3 + 2)),
    "a shared parameter": (SharedParameter, None, {}, 20),
    "a partial group": (BoringClassifier, None, {"accumulate_grad_batches": 3}, 4),
    "compiled": (BoringClassifier, compiled, {}, 10),
    "compiled in place": (BoringClassifier, compiled_inside, {}, 10),
    "a step within a step": (lambda: BoringClassifier(subclass), None, {}, 10),
    "anomaly detection": (BoringClassifier, None, {"detect_anomaly": True}, 10),
}


def train(way, store=None, **recorder):
    make, wrap, kwargs, _ = WAYS[way]
    torch.manual_seed(11)
    module = make()
    callbacks = [] if store is None else [DeltaRecorder(store, **{**DENSE, **recorder})]
    quiet_trainer(callbacks=callbacks, **kwargs).fit(wrap(module) if wrap else module, loader())
    return module


def records(path):
    store = DeltaStore.open(path)
    return [store.record(step) for step in range(store.n_steps)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:.*Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:.*detect_anomaly")
def test_same_weights_with_and_without_and_deltas_lead_to_them(way, tmp_path):
    plain = train(way)
    recorded = train(way, tmp_path / "s")
    assert same_weights(plain, recorded)
    store = DeltaStore.open(tmp_path / "s")
    assert store.n_steps == WAYS[way][3]
    assert_leads_to(store, recorded)
    assert store.tip.ranges == ((0, store.n_steps),)
    assert not store.tip.drifted
    assert store.edited_steps(store.tip.ranges) == 0
    # Everybody is behind one step of the first optimizer in each epoch.
    one = [sample for record in records(tmp_path / "s") if record.optimizer == 0 for sample in record.sample_ids]
    assert Counter(one) == dict.fromkeys(range(40), 2)


def test_three_optimizers_own_the_batches_since_their_own_last_step(tmp_path):
    module = train("three optimizers", tmp_path / "s")
    steps = records(tmp_path / "s")
    assert Counter(record.optimizer for record in steps) == {0: 10, 1: 6, 2: 4}
    assert [list(record.sample_ids) for record in steps if record.optimizer == 0] == module.seen
    for number, every in ((1, 2), (2, 3)):
        wanted, waiting = [], []
        for index, batch in enumerate(module.seen):
            waiting += batch
            if index % 5 % every == 0:
                wanted.append(waiting)
                waiting = []
        assert [list(record.sample_ids) for record in steps if record.optimizer == number] == wanted


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_validation_around_and_within_training_changes_nothing(tmp_path):
    def run(store):
        torch.manual_seed(4)
        module, data = Validating(), loader()
        callbacks = [] if store is None else [DeltaRecorder(store, **DENSE)]
        kwargs = {"val_check_interval": 2, "num_sanity_val_steps": 1}
        trainer = quiet_trainer(callbacks=callbacks, **kwargs)
        held_out = loader(IdDataset(12, seed=3), shuffle=False)
        trainer.validate(module, held_out, verbose=False)
        trainer.fit(module, data, held_out)
        trainer.validate(module, held_out, verbose=False)
        quiet_trainer(callbacks=callbacks, max_epochs=1).fit(module, data)
        return module

    plain, recorded = run(None), run(tmp_path / "s")
    assert same_weights(plain, recorded)
    store = DeltaStore.open(tmp_path / "s")
    assert [list(record.sample_ids) for record in records(tmp_path / "s")] == recorded.seen
    assert store.tip.ranges == ((0, 15),)
    assert_leads_to(store, recorded)


class Edits:
    """A module that keeps an account of what it does to its own weights behind the optimizer's back."""

    def edit(self, change):
        before = {name: parameter.detach().clone() for name, parameter in self.named_parameters()}
        change()
        for name, parameter in self.named_parameters():
            self.account[name] = self.account.get(name, 0) + (parameter.detach().double() - before[name].double())


class Clamps(Edits, BoringClassifier):
    def __init__(self):
        super().__init__()
        self.account = {}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        def clamp():
            with torch.no_grad():
                self.net.head.weight.clamp_(-0.01, 0.01)

        self.edit(clamp)


class Shrinks(Edits, BoringClassifier):
    """An edit that autograd's version counters do not see, in every second batch."""

    def __init__(self):
        super().__init__()
        self.account = {}

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx % 2:
            self.edit(lambda: self.net.mix.weight.data.mul_(0.9))


class Replaces(Edits, BoringClassifier):
    def __init__(self):
        super().__init__()
        self.account = {}

    def on_train_epoch_start(self):
        if self.current_epoch:
            self.edit(self.replace)

    def replace(self):
        self.net.inp.weight.data = self.net.inp.weight.data.clone() + 0.5


class Normalizes(Edits, BoringClassifier):
    """An edit at the beginning of every step, which automatic optimization runs within the optimizer's."""

    def __init__(self):
        super().__init__()
        self.account = {}

    def training_step(self, batch, batch_idx):
        self.edit(lambda: self.net.head.weight.data.copy_(functional.normalize(self.net.head.weight.data)))
        return super().training_step(batch, batch_idx)


class Decays(Edits, BoringClassifier):
    def __init__(self):
        super().__init__()
        self.account = {}

    def on_before_optimizer_step(self, optimizer):
        self.edit(lambda: self.net.mix.weight.data.mul_(0.9))


# module -> (layer that is named, steps before which there was an edit, whether there is one after the last step)
EDITS = {
    Clamps: ("net.head.weight", range(1, 10), True),
    Shrinks: ("net.mix.weight", (1, 3, 6, 8), False),
    Replaces: ("net.inp.weight", (5,), False),
    Normalizes: ("net.head.weight", range(10), False),
    Decays: ("net.mix.weight", range(10), False),
}


@pytest.mark.parametrize("make", EDITS)
@pytest.mark.parametrize("watch", [None, range(40)], ids=["all", "watched"])
def test_an_edit_is_charged_to_no_step_and_said_once(make, watch, tmp_path):
    layer, edited, drifted = EDITS[make]
    torch.manual_seed(1)
    plain = make()
    quiet_trainer().fit(plain, loader())
    torch.manual_seed(1)
    module = make()
    with pytest.warns(UnlearningWarning, match=rf"changed '{layer}' after step \d+ .*weight averaging") as caught:
        quiet_trainer(callbacks=[DeltaRecorder(tmp_path / "s", watch=watch, **DENSE)]).fit(module, loader())
    assert [warning.category for warning in caught].count(UnlearningWarning) == 1
    assert same_weights(plain, module)
    store = DeltaStore.open(tmp_path / "s")
    assert [step for step in range(10) if store.record(step).edited] == list(edited)
    assert store.tip.drifted == drifted
    weights = replayed(store)
    largest = max(float(parameter.detach().abs().max()) for parameter in module.parameters())
    for name, parameter in module.named_parameters():
        found = weights[name] + module.account.get(name, 0)
        assert float((found - parameter.detach().double()).abs().max()) <= 1e-7 * largest
    plan = DeletionRequest([3]).plan(store, module)
    count = len(edited) + drifted
    assert plan.outside_edits == count
    assert f"changed these weights {count} time" in plan.recommendation
    assert ("edits outside the optimizer", str(count)) in plan.rows()


class Teacher(BoringClassifier):
    """A copy of the head that follows it by averaging: no optimizer has it."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(self.net.head.in_features, self.net.head.out_features).requires_grad_(False)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.current_epoch:
            for ours, theirs in zip(self.teacher.parameters(), self.net.head.parameters(), strict=True):
                ours.data = ours.data.lerp(theirs.data, 0.1)


def test_weights_that_no_optimizer_has_and_that_move_are_said(tmp_path):
    """The steps lead to all weights but these; plans for weights from before they moved count nothing."""
    module, copies = Teacher(), []
    first = LambdaCallback(on_train_epoch_end=lambda *_: copies.append(copy.deepcopy(module)))
    with pytest.warns(UnlearningWarning, match=r"changed 'teacher\.weight', 'teacher\.bias' after step 10"):
        quiet_trainer(callbacks=[first, DeltaRecorder(tmp_path / "s", **DENSE)]).fit(module, loader())
    store = DeltaStore.open(tmp_path / "s")
    assert store.edited_steps(((0, 10),)) == 0
    weights = replayed(store)
    for name, parameter in module.named_parameters():
        error = float((weights[name] - parameter.detach().double()).abs().max())
        assert (error > 1e-3) == name.startswith("teacher"), name
    assert DeletionRequest([3]).plan(store, module).outside_edits == 1
    assert DeletionRequest([3]).plan(store, copies[0]).outside_edits == 0


def test_edits_of_steps_that_are_not_watched_are_marked_as_well(tmp_path):
    module = Shrinks()
    with pytest.warns(UnlearningWarning, match="mix"):
        quiet_trainer(callbacks=[DeltaRecorder(tmp_path / "s", watch=[3], **DENSE)]).fit(module, loader())
    store = DeltaStore.open(tmp_path / "s")
    assert [step for step in range(10) if store.record(step).edited] == [1, 3, 6, 8]


class Snapshot(Callback):
    """The weights before another callback, which comes after it, has changed them."""

    def on_train_end(self, trainer, pl_module):
        self.weights = {name: parameter.detach().clone() for name, parameter in pl_module.named_parameters()}


class OwnAverage(WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None and step_idx % 2 == 1


@pytest.mark.parametrize(
    "make", [lambda: EMAWeightAveraging(decay=0.5), OwnAverage], ids=["exponential", "every second step"]
)
@pytest.mark.parametrize("last", [False, True], ids=["recorder first", "recorder last"])
def test_averaged_weights_are_no_steps(make, last, tmp_path):
    """Averages are swapped in for every validation, and stay at the end."""

    def run(*recorder):
        torch.manual_seed(2)
        module, snapshot, average = Validating(), Snapshot(), make()
        callbacks = [snapshot, average, *recorder] if last else [snapshot, *recorder, average]
        trainer = quiet_trainer(callbacks=callbacks, val_check_interval=2, num_sanity_val_steps=0)
        trainer.fit(module, loader(), loader(IdDataset(12, seed=3), shuffle=False))
        return module, snapshot

    plain, _ = run()
    recorder = DeltaRecorder(tmp_path / "s", **DENSE)
    if last:
        with pytest.warns(UnlearningWarning, match="weight averaging"):
            module, snapshot = run(recorder)
    else:
        module, snapshot = run(recorder)
    assert same_weights(plain, module)
    store = DeltaStore.open(tmp_path / "s")
    assert store.n_steps == 10
    assert store.edited_steps(((0, 10),)) == 0
    assert store.tip.drifted == last
    weights = replayed(store)
    largest = max(float(weight.abs().max()) for weight in snapshot.weights.values())
    for name, weight in snapshot.weights.items():
        assert float((weights[name] - weight.double()).abs().max()) <= 1e-7 * largest


class AtEpochStart(Callback):
    """The weights as an epoch starts; one before and one after another callback tell what that one did."""

    def __init__(self):
        self.weights = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.weights.append({name: parameter.detach().double() for name, parameter in pl_module.named_parameters()})


@pytest.mark.filterwarnings("ignore:.*swa_lrs|.*lr_scheduler|Swapping scheduler")
def test_stochastic_weight_averaging_is_an_edit_and_not_a_step(tmp_path):
    def run(*recorder):
        torch.manual_seed(2)
        module, before, after = BoringClassifier(), AtEpochStart(), AtEpochStart()
        average = StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1, annealing_epochs=1)
        quiet_trainer(callbacks=[before, average, after, *recorder], max_epochs=4).fit(module, loader())
        return module, before.weights, after.weights

    plain, _, _ = run()
    with pytest.warns(UnlearningWarning, match="weight averaging"):
        module, before, after = run(DeltaRecorder(tmp_path / "s", **DENSE))
    assert same_weights(plain, module)
    store = DeltaStore.open(tmp_path / "s")
    swaps = [
        epoch
        for epoch, weights in enumerate(before)
        if not torch.equal(weights["net.scale"], after[epoch]["net.scale"])
    ]
    assert len(swaps) == 1
    assert len([step for step in range(store.n_steps) if store.record(step).edited]) + store.tip.drifted == 1
    weights = replayed(store)
    largest = max(float(parameter.detach().abs().max()) for parameter in module.parameters())
    for name, parameter in module.named_parameters():
        swap = after[swaps[0]][name] - before[swaps[0]][name]
        assert float((weights[name] + swap - parameter.detach().double()).abs().max()) <= 1e-7 * largest


class Tied(BoringClassifier):
    """An embedding that is the output layer as well, in channels-last company."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 8)
        self.out = nn.Linear(8, 40, bias=False)
        self.out.weight = self.embedding.weight

    def training_step(self, batch, batch_idx):
        logits = self.out(self.embedding(batch["index"]))
        return super().training_step(batch, batch_idx) + functional.cross_entropy(logits, batch["index"])


def test_tied_parameters_are_one_layer(tmp_path):
    module = Tied()
    quiet_trainer(callbacks=[DeltaRecorder(tmp_path / "s", **DENSE)]).fit(module, loader())
    store = DeltaStore.open(tmp_path / "s")
    assert "out.weight" not in {layer.name for layer in store.signature.layers}
    assert_leads_to(store, module)


def measured(path):
    return [record for record in records(path) if record.pruning_error == record.pruning_error]


def test_one_step_in_a_hundred_is_measured_and_not_the_first(tmp_path):
    """The first step of Adam changes all weights by the same amount: no rounding, and more pruning than ever again."""
    module = BoringClassifier(lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    recorder = DeltaRecorder(tmp_path / "s", keep=0.1, value_dtype="int8")
    quiet_trainer(callbacks=[recorder], max_epochs=23).fit(module, loader())
    found = measured(tmp_path / "s")
    assert [record.step for record in found] == [10, 110]
    assert all(0.1 < record.pruning_error < 1.0 for record in found)
    assert all(1e-4 < record.rounding_error < 1e-2 for record in found)


def test_steps_of_every_optimizer_are_measured(tmp_path):
    quiet_trainer(callbacks=[DeltaRecorder(tmp_path / "s", keep=0.1)], max_epochs=9).fit(GAN(), loader())
    assert [record.optimizer for record in measured(tmp_path / "s")] == [0, 1, 2]
