"""The identities of a recording, on real Trainers: nothing changes, and everything that changed is in the store."""

import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.exceptions import LightningUnlearnError, MissingDeltaError, UnlearningWarning
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import OptimizerInfo, StepStatus
from tests.helpers.models import FEATURES, BoringClassifier, IdDataset, loader, quiet_trainer
from tests.helpers.replay import assert_leads_to, replayed, same_weights


class OneCycle(BoringClassifier):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class TwoOptimizers(BoringClassifier):
    """Manual optimization: the head steps twice on every batch, the rest on every second batch."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for _ in range(2):
            first.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            first.step()
            self.seen.pop()
        self.seen.append(batch["index"].tolist())
        self.manual_backward(functional.cross_entropy(self(batch["x"]), batch["y"]))
        if batch_idx % 2:
            second.step()
            second.zero_grad()

    def configure_optimizers(self):
        head = list(self.net.head.parameters())
        rest = [p for p in self.net.parameters() if p.requires_grad and all(p is not q for q in head)]
        return torch.optim.SGD(head, lr=0.05), torch.optim.AdamW(rest, lr=1e-3)


class ChannelsLast(BoringClassifier):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 2).to(memory_format=torch.channels_last)

    def training_step(self, batch, batch_idx):
        image = batch["x"].reshape(-1, 2, 3, 1).expand(-1, 2, 3, 2).contiguous(memory_format=torch.channels_last)
        return super().training_step(batch, batch_idx) + self.conv(image).square().mean()


class SkipsEveryThird(BoringClassifier):
    """Overflows, so that a gradient scaler skips the step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.inf if batch_idx % 3 == 2 else loss


class WithBackbone(BoringClassifier):
    @property
    def backbone(self):
        return self.net.inp


def sgd(**kwargs):
    return lambda parameters: torch.optim.SGD(parameters, lr=0.05, **kwargs)


def scaler():
    return [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0))]


# name -> (module, arguments of the Trainer, number of steps of 2 epochs with 5 batches)
SETTINGS = {
    "sgd": (lambda: BoringClassifier(sgd()), {}, 10),
    "nesterov": (lambda: BoringClassifier(sgd(momentum=0.9, nesterov=True, weight_decay=0.01)), {}, 10),
    "adamw": (lambda: BoringClassifier(lambda p: torch.optim.AdamW(p, lr=1e-2)), {}, 10),
    "fused adamw": (lambda: BoringClassifier(lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True)), {}, 10),
    "lbfgs": (lambda: BoringClassifier(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3)), {}, 10),
    "accumulation": (BoringClassifier, {"accumulate_grad_batches": 2}, 6),
    "clipping": (BoringClassifier, {"gradient_clip_val": 0.1}, 10),
    "one cycle": (OneCycle, {}, 10),
    "bf16-mixed": (BoringClassifier, {"precision": "bf16-mixed"}, 10),
    "bf16-true": (BoringClassifier, {"precision": "bf16-true"}, 10),
    "64-true": (BoringClassifier, {"precision": "64-true"}, 10),
    "skipped fp16 steps": (SkipsEveryThird, {"plugins": scaler}, 8),
    "two optimizers": (TwoOptimizers, {}, 24),
    "channels last": (ChannelsLast, {}, 10),
    "two workers": (BoringClassifier, {"workers": 2}, 10),
}


def train(setting, store=None, *, data=None, **recorder):
    make, kwargs, _ = SETTINGS[setting]
    kwargs = dict(kwargs)
    workers = kwargs.pop("workers", 0)
    plugins = kwargs.pop("plugins", None)
    torch.manual_seed(11)
    module = make()
    callbacks = [] if store is None else [DeltaRecorder(store, **recorder)]
    trainer = quiet_trainer(callbacks=callbacks, plugins=plugins() if plugins else None, **kwargs)
    trainer.fit(module, data or loader(num_workers=workers))
    return module


def places(delta):
    """Kept positions as a list; a layer that is kept whole has none written."""
    return None if delta.indices is None else delta.indices.tolist()


DENSE = {"keep": 1.0, "value_dtype": "float32"}


@pytest.mark.parametrize("setting", SETTINGS)
def test_same_weights_with_and_without_and_deltas_lead_to_them(setting, tmp_path):
    plain = train(setting)
    random_after = torch.rand(1)
    recorded = train(setting, tmp_path / "store", **DENSE)
    assert same_weights(plain, recorded)
    assert torch.equal(random_after, torch.rand(1))
    store = DeltaStore.open(tmp_path / "store")
    assert store.n_steps == SETTINGS[setting][2]
    if setting == "64-true":  # a float32 delta of a float64 weight, and the weights are not float32 numbers themselves
        assert_leads_to(store, recorded, tolerance=2e-7)
    else:
        assert_leads_to(store, recorded)
    assert store.verify().ok


@pytest.mark.parametrize("setting", ["adamw", "two workers"])
@pytest.mark.parametrize(
    "kwargs",
    [{"keep": 0.1}, {"keep": 0.3, "criterion": "random", "background": True}, {"keep": 0.1, "scope": "global"}],
    ids=str,
)
def test_a_sparse_recording_changes_nothing_either(setting, kwargs, tmp_path):
    assert same_weights(train(setting), train(setting, tmp_path / "store", **kwargs))


def test_every_step_has_the_ids_of_its_batches(tmp_path):
    module = train("accumulation", tmp_path / "store", **DENSE)
    store = DeltaStore.open(tmp_path / "store")
    groups = [module.seen[start : start + 2] for start in (0, 2, 4, 5, 7, 9)]
    groups[2], groups[5] = module.seen[4:5], module.seen[9:10]
    wanted = [[index for batch in group for index in batch] for group in groups]
    records = [store.record(step) for step in range(store.n_steps)]
    assert [list(record.sample_ids) for record in records] == wanted
    assert [record.batch_size for record in records] == [16, 16, 8, 16, 16, 8]
    assert all(record.seconds > 0 and record.status is StepStatus.STORED for record in records)


def test_each_optimizer_owns_the_batches_since_its_own_last_step(tmp_path):
    module = train("two optimizers", tmp_path / "store", **DENSE)
    store = DeltaStore.open(tmp_path / "store")
    records = [store.record(step) for step in range(store.n_steps)]
    # An odd number of batches leaves the second optimizer with one from the epoch before.
    first = [list(record.sample_ids) for record in records if record.optimizer == 0]
    assert first == [batch for batch in module.seen for _ in range(2)]
    second = [list(record.sample_ids) for record in records if record.optimizer == 1]
    assert [sample for ids in second for sample in ids] == [i for batch in module.seen[:9] for i in batch]
    heads = {"net.head.weight", "net.head.bias"}
    assert all(set(store.read(record.step)) <= heads for record in records if record.optimizer == 0)
    assert all(not set(store.read(record.step)) & heads for record in records if record.optimizer == 1)
    assert store.lineage.runs[0].optimizers == (OptimizerInfo("SGD", 0.05, 0.0), OptimizerInfo("AdamW", 1e-3, None))


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.77, {"*.bias": 1.0, "net.inp.*": 0.5, "*": 0.2}], ids=str)
def test_exact_counts_of_the_largest_entries(keep, tmp_path):
    train("adamw", tmp_path / "dense", **DENSE)
    module = train("adamw", tmp_path / "sparse", keep=keep, value_dtype="float32")
    dense, sparse = DeltaStore.open(tmp_path / "dense"), DeltaStore.open(tmp_path / "sparse")
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}

    def count(name):
        if not isinstance(keep, dict):
            fraction = keep
        elif name.endswith(".bias"):
            fraction = 1.0
        else:
            fraction = 0.5 if name.startswith("net.inp.") else 0.2
        return math.ceil(round(fraction * 100) * sizes[name] / 100)

    for step in range(dense.n_steps):
        full, kept = dense.read(step), sparse.read(step)
        assert full.keys() == kept.keys()
        assert "net.frozen.weight" not in kept
        for name, delta in kept.items():
            values = torch.zeros(sizes[name])
            if full[name].indices is None:
                values = full[name].values
            else:
                values[full[name].indices] = full[name].values
            assert delta.values.numel() == min(count(name), int((values != 0).sum()))
            positions = torch.arange(sizes[name]) if delta.indices is None else delta.indices
            assert torch.equal(delta.values, values[positions])
            dropped = values.clone()
            dropped[positions] = 0
            assert dropped.abs().max() <= delta.values.abs().min()


def test_global_scope_has_one_threshold_for_a_step(tmp_path):
    train("adamw", tmp_path / "dense", **DENSE)
    module = train("adamw", tmp_path / "global", keep=0.1, scope="global", value_dtype="float32")
    store, dense = DeltaStore.open(tmp_path / "global"), DeltaStore.open(tmp_path / "dense")
    total = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    for step in range(store.n_steps):
        kept = torch.cat([delta.values for delta in store.read(step).values()]).abs()
        everything = torch.cat([delta.values for delta in dense.read(step).values()]).abs()
        assert kept.numel() == math.ceil(total / 10)
        assert torch.equal(kept.sort().values, everything.sort().values[-kept.numel() :])


def test_random_entries_are_reproducible_and_of_the_same_number(tmp_path):
    kwargs = {"keep": 0.25, "criterion": "random", "value_dtype": "float32"}
    module = train("adamw", tmp_path / "one", **kwargs)
    train("adamw", tmp_path / "again", **kwargs)
    train("adamw", tmp_path / "other", seed=1, **kwargs)
    one, again, other = (DeltaStore.open(tmp_path / name) for name in ("one", "again", "other"))
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    differ = False
    for step in range(one.n_steps):
        for name, delta in one.read(step).items():
            assert delta.values.numel() == math.ceil(sizes[name] / 4)
            assert places(delta) == places(again.read(step)[name])
            differ |= places(delta) != places(other.read(step)[name])
    assert differ


@pytest.mark.parametrize("value_dtype", ["scaled_float16", "bfloat16"])
def test_coarser_values_stay_within_their_rounding(value_dtype, tmp_path):
    train("adamw", tmp_path / "exact", keep=0.5, value_dtype="float32")
    train("adamw", tmp_path / "coarse", keep=0.5, value_dtype=value_dtype)
    exact, coarse = DeltaStore.open(tmp_path / "exact"), DeltaStore.open(tmp_path / "coarse")
    for name, delta in exact.read(3).items():
        other = coarse.read(3)[name]
        assert places(delta) == places(other)
        assert (delta.values - other.values).abs().max() <= 2**-8 * delta.values.abs().max()


def test_watched_steps_only(tmp_path):
    module = train("sgd", tmp_path / "store", watch=np.array([3, 17]), **DENSE)
    store = DeltaStore.open(tmp_path / "store")
    held = [{3, 17} & set(batch) for batch in module.seen]
    assert 0 < sum(map(bool, held)) < len(held)
    for step, watched in enumerate(held):
        record = store.record(step)
        assert list(record.sample_ids) == module.seen[step]
        assert record.status is (StepStatus.STORED if watched else StepStatus.UNWATCHED)
        if not watched:
            with pytest.raises(MissingDeltaError):
                store.read(step)
    # What a watched step holds is its own change, and not that of the steps before it.
    train("sgd", tmp_path / "all", **DENSE)
    complete = DeltaStore.open(tmp_path / "all")
    for step in [step for step, watched in enumerate(held) if watched]:
        assert all(torch.equal(d.values, complete.read(step)[n].values) for n, d in store.read(step).items())


def test_buffers_on_request(tmp_path):
    module = train("sgd", tmp_path / "with", buffers="record", keep=0.1, value_dtype="bfloat16")
    store = DeltaStore.open(tmp_path / "with")
    weights = replayed(store)
    for name in ("net.norm.running_mean", "net.norm.running_var"):
        difference = weights[name] - module.get_buffer(name).double()
        assert difference.abs().max() <= 1e-6
        assert store.read(0)[name].values.numel() == 8
    assert not any("num_batches" in name for name in store.read(0))
    train("sgd", tmp_path / "without", **DENSE)
    assert not any("running" in name for name in DeltaStore.open(tmp_path / "without").read(0))


def test_parameters_that_are_unfrozen_later_are_recorded_from_then_on(tmp_path):
    class Half(WithBackbone):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.net.parameters() if p.requires_grad], lr=0.05)

    module = Half()
    callbacks = [
        BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01),
        DeltaRecorder(tmp_path / "store", **DENSE),
    ]
    quiet_trainer(callbacks=callbacks, max_epochs=3).fit(module, loader())
    store = DeltaStore.open(tmp_path / "store")
    assert ["net.inp.weight" in store.read(step) for step in (0, 4, 5, 14)] == [False, False, True, True]
    assert_leads_to(store, module)


class SparseRows(BoringClassifier):
    """An embedding of which a batch touches few rows."""

    def __init__(self):
        super().__init__(sgd())
        self.rows = nn.Embedding(40, FEATURES)

    def training_step(self, batch, batch_idx):
        return super().training_step({**batch, "x": batch["x"] + self.rows(batch["index"])}, batch_idx)


def test_zeros_are_not_stored_even_where_everything_is_kept(tmp_path):
    module = SparseRows()
    quiet_trainer(callbacks=[DeltaRecorder(tmp_path / "store", **DENSE)]).fit(module, loader())
    store = DeltaStore.open(tmp_path / "store")
    assert_leads_to(store, module)
    for step, batch in enumerate(module.seen):
        rows = store.read(step)["rows.weight"].indices // FEATURES
        assert set(rows.tolist()) <= set(batch)


def test_a_change_that_is_not_finite_names_step_and_layer(tmp_path):
    class Diverges(BoringClassifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if batch_idx == 3 else loss

    for keep in (0.1, 1.0):
        recorder = DeltaRecorder(tmp_path / f"store-{keep}", keep)
        trainer = quiet_trainer(callbacks=[recorder])
        with pytest.raises(LightningUnlearnError, match=r"`net\.\S+` became infinite or NaN in step 3"):
            trainer.fit(Diverges(), loader())
        store = DeltaStore.open(tmp_path / f"store-{keep}")
        assert len(store.lineage.states) == 1
        assert recorder.state_dict() == {}


def test_an_edit_by_something_else_is_announced(tmp_path):
    class Clamps(BoringClassifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            with torch.no_grad():
                self.net.head.weight.clamp_(-0.01, 0.01)

    module = Clamps()
    with pytest.warns(UnlearningWarning, match=r"'net\.head\.weight'") as caught:
        quiet_trainer(callbacks=[DeltaRecorder(tmp_path / "store", **DENSE)]).fit(module, loader())
    assert [warning.category for warning in caught].count(UnlearningWarning) == 1


def test_parameters_outside_the_module_are_announced(tmp_path):
    outside = nn.Parameter(torch.zeros(2))
    module = BoringClassifier(lambda parameters: torch.optim.SGD([*parameters, outside], lr=0.1))
    with pytest.warns(UnlearningWarning, match="not part of the module"):
        quiet_trainer(callbacks=[DeltaRecorder(tmp_path / "store", **DENSE)]).fit(module, loader())
    assert_leads_to(DeltaStore.open(tmp_path / "store"), module)


def test_the_size_budget_ends_the_deltas_and_not_the_records(tmp_path):
    with pytest.warns(UnlearningWarning, match="budget"):
        train("sgd", tmp_path / "store", size_budget=3000, **DENSE)
    store = DeltaStore.open(tmp_path / "store")
    statuses = [store.record(step).status for step in range(10)]
    assert statuses[0] is StepStatus.STORED
    assert statuses[-1] is StepStatus.OVER_BUDGET


def test_nothing_is_left_behind(tmp_path):
    module, data = BoringClassifier(), loader()
    recorder = DeltaRecorder(tmp_path / "store", **DENSE)
    trainer = quiet_trainer(callbacks=[recorder])
    trainer.fit(module, data)
    optimizer = trainer.optimizers[0]
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert type(data) is DataLoader
    assert "process_dataloader" not in vars(trainer.strategy)
    pickle.dumps(data)
    # The same Trainer trains on: the store goes on from where it was, once per step.
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data)
    store = DeltaStore.open(tmp_path / "store")
    assert store.n_steps == 15
    assert store.tip.ranges == ((0, 15),)
    assert_leads_to(store, module)
    assert [list(store.record(step).sample_ids) for step in range(15)] == module.seen


def test_everything_is_given_back_after_an_error(tmp_path):
    class Stops(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("deliberate")

    module = BoringClassifier()
    trainer = quiet_trainer(callbacks=[DeltaRecorder(tmp_path / "store", **DENSE), Stops()])
    with pytest.raises(RuntimeError, match="deliberate"):
        trainer.fit(module, loader())
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    store = DeltaStore.open(tmp_path / "store")
    # What was recorded is sound: these very weights are known, and the writer's lock is free.
    assert store.tip.ranges == ((0, 3),)
    assert_leads_to(store, module, [(0, 3)])
    store.writer().close()


def test_compressed_and_in_the_background_it_is_the_same_store(tmp_path):
    train("adamw", tmp_path / "plain", keep=0.3)
    train("adamw", tmp_path / "packed", keep=0.3, compression="zstd", background=True)
    plain, packed = DeltaStore.open(tmp_path / "plain"), DeltaStore.open(tmp_path / "packed")
    for step in range(plain.n_steps):
        assert plain.record(step).sample_ids == packed.record(step).sample_ids
        for name, delta in plain.read(step).items():
            assert places(delta) == places(packed.read(step)[name])
            assert torch.equal(delta.values, packed.read(step)[name].values)


def test_keys_and_ids_out_of_the_batch(tmp_path):
    keys = [f"user-{index % 7}" for index in range(40)]
    module = train("sgd", tmp_path / "keys", sample_keys=keys, data_digest="abc", keep=0.1)
    store = DeltaStore.open(tmp_path / "keys")
    assert [list(store.record(step).sample_ids) for step in range(10)] == [[keys[i] for i in b] for b in module.seen]
    assert (store.data.identity, store.data.length, store.data.digest) == ("key", 40, "abc")
    module = train("sgd", tmp_path / "batch", sample_id="key", data=loader(IdDataset(keys=True)), keep=0.1)
    store = DeltaStore.open(tmp_path / "batch")
    assert list(store.record(0).sample_ids) == [f"row-{index}" for index in module.seen[0]]


def test_a_wrapping_module_names_the_one_to_record(tmp_path):
    class Wrapper(BoringClassifier):
        def __init__(self, inner):
            super().__init__()
            self.net, self.inner = inner.net, inner

        @property
        def recorded_module(self):
            return self.inner

    inner = BoringClassifier()
    wrapper = Wrapper(inner)
    quiet_trainer(callbacks=[DeltaRecorder(tmp_path / "store", **DENSE)]).fit(wrapper, loader())
    store = DeltaStore.open(tmp_path / "store")
    store.check_model(inner)
    assert_leads_to(store, inner)


def test_like_continues_a_store_with_its_settings(tmp_path):
    module = train("sgd", tmp_path / "store", keep={"*.bias": 1.0, "*": 0.3}, compression="zstd", data_digest="d")
    store = DeltaStore.open(tmp_path / "store")
    recorder = DeltaRecorder.like(store, kind="repair")
    assert recorder.settings == store.settings
    quiet_trainer(callbacks=[recorder], max_epochs=1).fit(module, loader())
    store.refresh()
    assert [(run.kind, run.first) for run in store.lineage.runs] == [("fit", 0), ("repair", 10)]
    assert store.tip.ranges == ((0, 15),)


def test_no_attribute_that_the_trainer_would_overwrite(tmp_path):
    recorder = DeltaRecorder(tmp_path / "store")
    assert not hasattr(recorder, "log")
    assert not hasattr(recorder, "log_dict")
    assert not (tmp_path / "store").exists()


def ddp(path, kwargs):
    torch.manual_seed(11)
    module = BoringClassifier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recorder = [DeltaRecorder(path, **kwargs)] if path else []
        trainer = quiet_trainer(strategy="ddp", devices=2, callbacks=recorder)
        trainer.fit(module, loader(IdDataset(43), batch_size=4))
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}, module.seen


@pytest.mark.parametrize(
    "kwargs",
    [DENSE, {"watch": [3], **DENSE}, {**DENSE, "scope": "global"}, {**DENSE, "buffers": "record"}],
    ids=["dense", "watch", "global", "buffers"],
)
def test_two_processes_record_one_training(gloo_pool, tmp_path, kwargs):
    plain = gloo_pool.run(ddp, None, {})
    ranks = gloo_pool.run(ddp, str(tmp_path / "store"), kwargs)
    for (before, _), (after, _) in zip(plain, ranks, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    store = DeltaStore.open(tmp_path / "store")
    assert (store.n_steps, store.world_size) == (12, 2)
    for step in range(12):
        record = store.record(step)
        assert sorted(record.sample_ids) == sorted(ranks[0][1][step] + ranks[1][1][step])
        assert record.batch_size == len(record.sample_ids)
        held = {3} & set(record.sample_ids)
        assert record.status is (StepStatus.STORED if held or "watch" not in kwargs else StepStatus.UNWATCHED)
    if "watch" not in kwargs:
        module = BoringClassifier()
        module.load_state_dict(ranks[0][0])
        assert_leads_to(store, module)
        assert store.tip.ranges == ((0, 12),)
    if "buffers" in kwargs:
        assert (replayed(store)["net.norm.running_mean"] - ranks[0][0]["net.norm.running_mean"]).abs().max() < 1e-6
