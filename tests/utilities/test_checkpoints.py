"""A checkpoint that two processes wrote in shards is loaded whole by one, and nothing in it is run."""

import pickle
import warnings

import pytest
import torch
from lightning import LightningModule
from torch import nn
from torch.distributed.checkpoint import save

from lightning_unlearn.utilities.checkpoints import load_weights
from lightning_unlearn.utilities.whole_weights import named_buffers, whole_tensors
from tests.callbacks.sharded_training import Cut, data_of, trainer_of


class WithBuffers(Cut):
    """Statistics, a counter, and something of its own in the checkpoint."""

    def __init__(self, kind="alone"):
        super().__init__(kind)
        self.norm = nn.BatchNorm1d(6, affine=False)
        self.read = None

    def forward(self, x):
        return super().forward(self.norm(x))

    def on_save_checkpoint(self, checkpoint):
        checkpoint["own"] = {"level": 3}

    def on_load_checkpoint(self, checkpoint):
        self.read = checkpoint.get("own")


def save_sharded(kind, path):
    warnings.simplefilter("ignore")
    options = {"state_dict_type": "sharded"} if kind == "fsdp1" else {"save_distributed_checkpoint": True}
    module = WithBuffers(kind)
    trainer = trainer_of(kind, strategy=options, max_steps=2)
    trainer.fit(module, data_of(kind))
    trainer.save_checkpoint(path)
    parameters = {name: one.tolist() for name, one in whole_tensors(module).parameters.items()}
    return parameters | {name: one.tolist() for name, one in named_buffers(module).items()}


def load_in_a_group(path):
    model = WithBuffers()
    load_weights(model, path)
    return {name: value.tolist() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "tensor"])
def test_a_folder_of_shards_is_loaded_whole(gloo_pool, tmp_path, kind):
    path = tmp_path / "last.ckpt"
    saved = gloo_pool.run(save_sharded, kind, str(path))
    assert path.is_dir()
    model = WithBuffers("alone8" if kind == "tensor" else "alone")
    load_weights(model, path)
    found = {name: value.tolist() for name, value in model.state_dict().items()}
    assert found.keys() == saved[0].keys()
    # Statistics are those of one of the processes, as torch chooses.
    assert all(value in (saved[0][name], saved[1][name]) for name, value in found.items())
    assert model.read == {"level": 3}
    assert int(model.norm.num_batches_tracked) == 2
    if kind == "fsdp2":
        assert gloo_pool.run(load_in_a_group, str(path)) == [found, found]


class Extra(LightningModule):
    """Has a state that is no tensor."""

    def __init__(self, extra):
        super().__init__()
        self.layer, self.extra = nn.Linear(2, 1), extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def save_alone(content, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no process group
        save(content, checkpoint_id=path)


class Harmful:
    def __reduce__(self):
        return print, ("run",)


def test_extra_state_is_loaded_where_nothing_has_to_be_run(tmp_path, capsys):
    save_alone({"state_dict": Extra({"a": [1, {"b": 2}]}).state_dict()}, tmp_path / "plain")
    model = Extra(None)
    load_weights(model, tmp_path / "plain")
    assert model.extra == {"a": [1, {"b": 2}]}
    save_alone({"state_dict": Extra(Harmful()).state_dict()}, tmp_path / "harmful")
    with pytest.raises(ValueError, match="weights_only"):
        load_weights(model, tmp_path / "harmful")
    assert model.extra == {"a": [1, {"b": 2}]}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("payload", [Harmful(), {"a": Harmful()}, b"".join])
def test_nothing_that_the_list_of_shards_names_is_run(tmp_path, capsys, payload):
    save_alone({"state_dict": nn.Linear(2, 1).state_dict()}, tmp_path / "shards")
    (tmp_path / "shards" / ".metadata").write_bytes(pickle.dumps(payload))
    with pytest.raises(ValueError, match=r"a list of shards.*it holds a builtins\.|a list of shards"):
        load_weights(Extra(None), tmp_path / "shards")
    assert capsys.readouterr().out == ""


def test_what_is_no_checkpoint_of_this_module_is_refused(tmp_path):
    model = Cut("alone")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_alone({"state_dict": nn.Linear(2, 1).state_dict()}, tmp_path / "other")
    with pytest.raises(ValueError, match="that of a Cut with these arguments"):
        load_weights(model, tmp_path / "other")
    save_alone({"weights": model.state_dict()}, tmp_path / "named")
    with pytest.raises(ValueError, match="under `state_dict` or `model`"):
        load_weights(model, tmp_path / "named")
    save_alone({"state_dict": model.state_dict()}, tmp_path / "half")
    for shard in (tmp_path / "half").glob("*.distcp"):
        shard.unlink()
    with pytest.raises(ValueError, match=r"with all of its shards.*No such file"):
        load_weights(model, tmp_path / "half")
    with pytest.raises(ValueError, match="a folder without it"):
        load_weights(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="Expected `checkpoint` to be the path"):
        load_weights(model, tmp_path / "nowhere")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
