"""The wrapper and its data in two processes: the pool for DDP and FSDP2, one real `ddp_spawn` from the main process."""

import atexit
import copy
import json
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.methods.loss_method import as_loss
from lightning_unlearn.modules.unlearning_module import UnlearningModule
from tests.modules.cases import Joint, User, dataset, same, trainer, weights

FORGET = [1, 4, 8, 15, 30]
RETAIN = [i for i in range(40) if i not in FORGET]


class WithIds(User):
    """Batches are `(x, y, position)`; keeps the positions of every batch, and logs across ranks."""

    def __init__(self):
        super().__init__()
        self.passes = []

    def training_step(self, batch, batch_idx):
        x, y, positions = batch
        self.passes.append(positions.tolist())
        loss = torch.nn.functional.cross_entropy(self.net(x), y)
        self.log("train_loss", loss, on_epoch=True, sync_dist=True)
        return loss


class Writing(WithIds):
    """Writes what a spawned worker saw, for the main process."""

    def __init__(self, folder):
        super().__init__()
        self.folder = str(folder)

    def on_fit_start(self):
        # A process that ends with its process group aborts now and then, whatever is trained (3 of 40 plain fits).
        atexit.register(dist.destroy_process_group)

    def on_train_end(self):
        with open(f"{self.folder}/rank-{self.global_rank}.json", "w") as file:
            json.dump(self.passes, file)


def data(parts=("forget", "retain"), **kwargs):
    return UnlearningDataModule(loader(**kwargs), FORGET, parts=parts)


def loader(**kwargs):
    tensors = TensorDataset(*dataset().tensors, torch.arange(40))
    return DataLoader(tensors, **{"batch_size": 4, "shuffle": True, **kwargs})


def check_shards(by_rank):
    """`by_rank`: batches in the order forget, retain, forget, retain, ... of each rank, over two epochs."""
    for rank in by_rank:
        assert len(rank) == len(by_rank[0]) == 2 * 2 * 5  # 35 retain samples: 18 a rank, five batches
    retain = [[position for batch in rank[1:10:2] for position in batch] for rank in by_rank]
    assert sorted(set(retain[0]) | set(retain[1])) == RETAIN
    assert len(set(retain[0]) & set(retain[1])) <= 1
    # Five forget samples are three a rank, one batch: the part is cycled, and permuted anew in every pass.
    passes = list(zip(by_rank[0][0:10:2], by_rank[1][0:10:2], strict=True))
    for zero, one in passes:
        assert sorted(set(zero) | set(one)) == FORGET
        assert len(zero) == len(one) == 3
    assert len({tuple(zero) for zero, _ in passes}) > 1


def fit_ddp():
    torch.manual_seed(0)
    # Lightning's notes on its environment differ between machines and say nothing of the wrapper.
    warnings.simplefilter("ignore")
    model = WithIds()
    wrapped = UnlearningModule(model, Joint(max_epochs=2, max_steps=None))
    fitted = trainer(max_epochs=2, strategy="ddp", devices=2)
    fitted.fit(wrapped, datamodule=data())
    assert wrapped.unwrap() is model
    entries = {name for name, value in vars(model).items() if getattr(value, "__self__", None) is not None}
    return {
        "passes": model.passes,
        "weights": {name: value.tolist() for name, value in model.state_dict().items() if "num" not in name},
        "logged": sorted(fitted.callback_metrics),
        "entries": sorted(entries - {"_trainer"}),
        "steps": fitted.global_step,
    }


def test_two_processes_share_out_both_parts_and_agree(gloo_pool):
    zero, one = gloo_pool.run(fit_ddp)
    check_shards([zero["passes"], one["passes"]])
    parameters = {name: value for name, value in zero["weights"].items() if "running" not in name}
    assert parameters == {name: one["weights"][name] for name in parameters}
    assert {"train_loss_epoch", "forget/train_loss_epoch"} <= set(zero["logged"])
    assert zero["steps"] == one["steps"] == 10
    assert zero["entries"] == []  # DDP leaves a bound `forward` of the wrapper behind


class Pairs(Sampler):
    def __iter__(self):
        return iter([[i, i + 1] for i in range(0, 40, 2)])

    def __len__(self):
        return 20


def refused():
    users = data(("retain",), batch_sampler=Pairs(), batch_size=1, shuffle=None)
    warnings.simplefilter("ignore")
    try:
        trainer(max_epochs=1, strategy="ddp", devices=2).fit(UnlearningModule(User(), Joint()), datamodule=users)
    except UnsupportedStrategyError as error:
        return str(error)
    return "accepted"


def test_batches_of_the_users_own_are_refused_in_two_processes(gloo_pool):
    for answer in gloo_pool.run(refused):
        assert "without a batch sampler of its own" in answer


def shard_the_wrapper():
    torch.manual_seed(0)
    model = User(norm=False)
    reference = copy.deepcopy(model)
    method = Joint()
    wrapped = UnlearningModule(model, method)
    kept = list(model.state_dict())
    fully_shard(wrapped)
    assert isinstance(wrapped, UnlearningModule)
    assert list(model.state_dict()) == kept
    x, y = dataset().tensors
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    batch = {"forget": (x[:4], y[:4]), "retain": (x[4:12], y[4:12])}
    wrapped.forward = lambda *parts: as_loss(wrapped.training_step(*parts))  # FSDP gathers around `forward`
    with wrapped.silent():
        wrapped(batch, 0).backward()
        optimizer.step()
    del wrapped.forward
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    alone = UnlearningModule(reference, method)
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    with alone.silent():
        as_loss(alone.training_step(batch, 0)).backward()
    plain.step()
    assert type(wrapped.unwrap()) is User
    differences = [
        float((a.full_tensor() - b).abs().max())
        for a, b in zip(model.parameters(), reference.parameters(), strict=True)
    ]
    return max(differences)


def test_sharded_as_a_whole_the_step_is_the_same(gloo_pool):
    assert max(gloo_pool.run(shard_the_wrapper)) < 1e-6


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_spawned_workers_hand_the_weights_back(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.delenv("MASTER_PORT")  # Lightning sets it in this process; it goes with the test
    model = Writing(tmp_path)
    start = weights(model)
    wrapped = UnlearningModule(model, Joint(max_epochs=2, max_steps=None))
    fitted = trainer(max_epochs=2, strategy="ddp_spawn", devices=2)
    fitted.fit(wrapped, datamodule=data())
    assert wrapped.unwrap() is model
    assert not same(weights(model), start)
    assert int(model.net[1].num_batches_tracked) == 10
    check_shards([json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)])
    assert "forget/train_loss_epoch" in fitted.callback_metrics
