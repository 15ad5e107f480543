"""Fine-tuning by adapters: only the trainable few are recorded, and the base model is not in the store."""

import pytest
import torch
from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from lightning_unlearn.api import unlearn
from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.deltas.ledger import DeletionLedger
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.exceptions import StoreCorruptedError, StoreMismatchError, UnlearningWarning
from lightning_unlearn.methods.amnesiac import Amnesiac
from lightning_unlearn.methods.retrain import Retrain
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.parameters import parameter_distance, weights_digest
from tests.helpers.models import BoringClassifier, loader, quiet_trainer
from tests.helpers.replay import assert_leads_to, replayed, same_weights

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}
WORDS, LENGTH, WIDTH, RANK, ROWS = 50, 6, 64, 2, 32


class Adapter(nn.Module):
    """A frozen linear layer plus a trainable product of two thin matrices (Hu et al., 2021, arXiv:2106.09685)."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value = Adapter(nn.Linear(WIDTH, WIDTH)), Adapter(nn.Linear(WIDTH, WIDTH))
        self.key, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        y = self.first(x)
        x = x + self.out(functional.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y)))
        return x + self.mlp(self.second(x))


class Rows(Dataset):
    """A sequence, its label, and its own index."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.words = torch.randint(0, WORDS, (ROWS, LENGTH), generator=generator)

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return {"words": self.words[index], "y": self.words[index, 0] % 3, "index": index}


class Transformer(LightningModule):
    """Two blocks with adapters; everything else is frozen, and the optimizer is given all of it, as people do."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(WORDS, WIDTH)
            self.blocks = nn.Sequential(Block(), Block())
            self.head = nn.Linear(WIDTH, 3)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(".down." in name or ".up." in name)
        self.seen = []

    def forward(self, words):
        return self.head(self.blocks(self.embedding(words)).mean(1))

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["index"].tolist())
        return functional.cross_entropy(self(batch["words"]), batch["y"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def rows():
    return DataLoader(Rows(), batch_size=8, shuffle=True)


def fit(store=None, *callbacks, module=None, epochs=2, recorder=None):
    torch.manual_seed(5)
    module = module or Transformer()
    recorder = [] if store is None else [recorder or DeltaRecorder(store)]
    quiet_trainer(callbacks=[*callbacks, *recorder], max_epochs=epochs).fit(module, rows())
    return module


def trainable(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_adapters_are_recorded_wholly_and_the_base_model_not_at_all(tmp_path):
    plain = fit()
    recorder = DeltaRecorder(tmp_path / "s")
    module = fit(tmp_path / "s", recorder=recorder)
    assert same_weights(plain, module)
    store = DeltaStore.open(tmp_path / "s")
    assert (store.settings.keep, store.settings.value_dtype) == (1.0, "float32")
    assert recorder.settings == store.settings
    few = trainable(module)
    assert set(load_file(tmp_path / "s" / store.initial_file)) == set(store.initial_weights()) == few
    assert set(store.frozen) == {name for name, _ in module.named_parameters()} - few
    # In the first step only `up` gets a gradient, because it is zero; AdamW decays the others all the same.
    assert all(set(store.read(step)) <= few for step in range(store.n_steps))
    initial = store.initial_weights()
    weights = replayed(store)
    for name in few:
        assert float((weights[name] - module.get_parameter(name).detach().double()).abs().max()) <= 1e-7
    assert store.tip.travel == pytest.approx(parameter_distance(module, initial))
    count = sum(module.get_parameter(name).numel() for name in few)
    total = sum(parameter.numel() for parameter in module.parameters())
    assert 0.005 < count / total < 0.05
    segments = list((tmp_path / "s" / "rank-00000").glob("segment-*"))
    per_step = sum(path.stat().st_size for path in segments) / store.n_steps
    assert 4 * count <= per_step <= 4 * count + 4096
    weights_on_disk = (tmp_path / "s" / store.initial_file).stat().st_size
    assert weights_on_disk < 4 * total / 10
    assert store.verify().ok


def test_the_defaults_are_the_usual_ones_where_much_is_trained_and_what_is_said_counts(tmp_path):
    recorder = DeltaRecorder(tmp_path / "much")
    quiet_trainer(callbacks=[recorder]).fit(BoringClassifier(), loader())
    store = DeltaStore.open(tmp_path / "much")
    assert (store.settings.keep, store.settings.value_dtype) == (0.1, "scaled_float16")
    # A frozen layer of a model that is mostly trained is in the initial weights: it may be a running average.
    assert not store.frozen
    assert "net.frozen.weight" in store.initial_weights()
    fit(tmp_path / "said", recorder=DeltaRecorder(tmp_path / "said", keep=0.3, value_dtype="bfloat16"))
    settings = DeltaStore.open(tmp_path / "said").settings
    assert (settings.keep, settings.value_dtype) == (0.3, "bfloat16")


def test_what_was_chosen_is_kept_by_later_fits_whatever_they_train(tmp_path):
    module = fit(tmp_path / "s")
    for parameter in module.parameters():
        parameter.requires_grad_()
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    fit(tmp_path / "s", module=module, epochs=1)
    store = DeltaStore.open(tmp_path / "s")
    assert (store.settings.keep, store.settings.value_dtype) == (1.0, "float32")
    initial = store.initial_weights()
    assert set(initial) == set(start)
    assert all(torch.equal(initial[name], start[name]) for name in store.frozen)
    assert_leads_to(store, module)
    assert store.tip.ranges == ((0, 12),)


class WithBackbone(Transformer):
    @property
    def backbone(self):
        return self.blocks

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)
        self.head.requires_grad_(True)


def test_a_backbone_that_is_unfrozen_later_comes_into_the_store_then(tmp_path):
    module = WithBackbone()
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    known = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            known.append(set(DeltaStore.open(tmp_path / "s").initial_weights()))

    fit(tmp_path / "s", BackboneFinetuning(unfreeze_backbone_at_epoch=1), Look(), module=module)
    assert known[0] == {"head.weight", "head.bias"}
    assert known[1] == {"head.weight", "head.bias", *(name for name in start if name.startswith("blocks."))}
    store = DeltaStore.open(tmp_path / "s")
    assert all(torch.equal(tensor, start[name]) for name, tensor in store.initial_weights().items())
    weights = replayed(store)
    for name, tensor in weights.items():
        assert float((tensor - module.get_parameter(name).detach().double()).abs().max()) <= 2e-7
    assert torch.equal(module.embedding.weight, start["embedding.weight"])
    report = store.verify()
    assert report.ok
    assert report.orphans == ()


class Meddles(Callback):
    """Changes a frozen weight while nobody trains it."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            pl_module.blocks[0].key.weight.data[0, 0] += 1e-3


def test_a_frozen_weight_that_changes_anyway_is_said_and_refused_where_its_start_is_needed(tmp_path):
    with pytest.warns(UnlearningWarning, match=r"changed 'blocks\.0\.key\.weight' after step"):
        module = fit(tmp_path / "one", Meddles(2))
    store = DeltaStore.open(tmp_path / "one")
    assert [state.drifted for state in store.lineage.states][-1]
    assert store.state_of(weights_digest(module)).ranges == ((0, store.n_steps),)
    trainer = {"max_epochs": 1, **QUIET}
    with pytest.raises(StoreMismatchError, match="Load the base model"):
        unlearn(module, [3], method=Retrain(), store=store, data=rows(), trainer=trainer, probe_samples=0)
    refused = pytest.raises(StoreMismatchError, match=r"other values of 'blocks\.0\.key\.weight'")
    with pytest.warns(UnlearningWarning, match="Something other"), refused:
        fit(tmp_path / "two", BackboneFinetuning(unfreeze_backbone_at_epoch=1), Meddles(4), module=WithBackbone())
    assert set(DeltaStore.open(tmp_path / "two").initial_weights()) == {"head.weight", "head.bias"}


class Merges(Callback):
    """Adds the adapters to the base weights for validation and takes them out again, which leaves roundings."""

    def merge(self, module, sign):
        for layer in module.modules():
            if isinstance(layer, Adapter):
                layer.base.weight.data += sign * layer.up.weight.data @ layer.down.weight.data

    def on_validation_start(self, trainer, pl_module):
        self.merge(pl_module, 1)

    def on_validation_end(self, trainer, pl_module):
        self.merge(pl_module, -1)


class Validated(Transformer):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", functional.cross_entropy(self(batch["words"]), batch["y"]))


def test_adapters_merged_for_validation_are_recorded_forgotten_and_brought_back(tmp_path):
    torch.manual_seed(5)
    module = Validated()
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    fitted = quiet_trainer(callbacks=[Merges(), DeltaRecorder(tmp_path / "s")], max_epochs=2, limit_val_batches=1)
    with pytest.warns(UnlearningWarning, match=r"weight' after step"):
        fitted.fit(module, rows(), DataLoader(Rows(), batch_size=8))
    store = DeltaStore.open(tmp_path / "s")
    assert any(not torch.equal(module.get_parameter(name), start[name]) for name in store.frozen)
    request = DeletionRequest([3])
    plan = request.plan(store, module)
    assert plan.outside_edits == 1
    outcome = unlearn(module, request, method=Amnesiac(), store=store, data=rows(), probe_samples=0, force=True)
    ledger = DeletionLedger.open(store)
    (entry,) = ledger.entries
    assert store.state_of(entry.after).drifted
    ledger.undo(entry.entry_id, outcome.model)
    for name, parameter in outcome.model.named_parameters():
        assert float((parameter - module.get_parameter(name)).detach().abs().max()) <= 2e-7


def test_another_base_model_is_refused_where_training_starts_again(tmp_path):
    module = fit(tmp_path / "s", epochs=1)
    store = DeltaStore.open(tmp_path / "s")
    other = Transformer(seed=1)
    with pytest.raises(StoreMismatchError, match="other values of"):
        store.check_frozen(other)
    store.check_frozen(module)


def test_adapters_forget_by_subtraction_and_are_retrained_from_their_own_start(tmp_path):
    module = fit(tmp_path / "s")
    store = DeltaStore.open(tmp_path / "s")
    request = DeletionRequest([3])
    plan = request.plan(store, module)
    wanted = replayed(store)
    for step in plan.amounts:
        for name, delta in store.read(step).items():
            flat = wanted[name].reshape(-1)
            if delta.indices is None:
                flat -= delta.values.double()
            else:
                flat[delta.indices] -= delta.values.double()
    outcome = unlearn(module, request, method=Amnesiac(), store=store, data=rows(), probe_samples=0, force=True)
    for name, parameter in outcome.model.named_parameters():
        if name in wanted:
            assert float((parameter.detach().double() - wanted[name]).abs().max()) <= 2e-7
        else:
            assert torch.equal(parameter, module.get_parameter(name))
    trainer = {"max_epochs": 1, **QUIET}
    retrained = unlearn(
        module, request, method=Retrain(), store=store, data=rows(), trainer=trainer, probe_samples=0
    ).model
    for name in store.frozen:
        assert torch.equal(retrained.get_parameter(name), module.get_parameter(name))
    assert 3 not in {index for batch in retrained.seen[len(module.seen) :] for index in batch}


def test_retraining_on_another_base_model_is_refused(tmp_path):
    module = fit(tmp_path / "s", epochs=1)
    module.embedding.weight.data += 1e-3
    store = DeltaStore.open(tmp_path / "s")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(StoreMismatchError):
        unlearn(
            module, [3], method=Retrain(), store=store, data=rows(), trainer={"max_epochs": 1, **QUIET}, probe_samples=0
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("background", [True, "auto"])
def test_a_start_that_fails_on_a_damaged_file_gives_the_store_back(tmp_path, background):
    fit(tmp_path / "s")
    path = tmp_path / "s" / DeltaStore.open(tmp_path / "s").initial_file
    intact = path.read_bytes()
    path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    with pytest.raises(StoreCorruptedError, match=path.name):
        fit(tmp_path / "s", recorder=DeltaRecorder(tmp_path / "s", background=background))
    path.write_bytes(intact)
    fit(tmp_path / "s")
