"""Methods that compare the entries of whole layers refuse a module whose layers are in pieces on two processes."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.methods import FineTune, PartialUpdates, RetentionMasking, SalUn
from lightning_unlearn.modules.unlearning_module import UnlearningModule
from tests.methods.passes import Answering

METHODS = {
    "SalUn": SalUn(),
    "RetentionMasking": RetentionMasking(),
    "PartialUpdates": FineTune().with_updates(PartialUpdates(0.5)),
}


def first_masks(wrapped, method):
    method.prepare(wrapped)
    return method.update_masks(wrapped, 0)


def refused(name):
    """What a method says of a sharded module, and whether a weight changed."""
    torch.manual_seed(0)
    method = METHODS[name]
    wrapped = UnlearningModule(Answering(), method)
    fully_shard(wrapped)
    for parameter in wrapped.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.full_tensor().clone() for parameter in wrapped.parameters()]
    with pytest.raises(UnsupportedStrategyError) as raised:
        first_masks(wrapped, method)
    pairs = zip(before, wrapped.parameters(), strict=True)
    same = all(isinstance(one, DTensor) and torch.equal(old, one.full_tensor()) for old, one in pairs)
    return str(raised.value), same


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_sharded_layer_is_refused_by_name(gloo_pool, name):
    for message, unchanged in gloo_pool.run(refused, name):
        assert "net.0.weight" in message
        assert "a sharded parameter" in message
        assert "DDP or one device" in message
        assert unchanged


def test_with_everything_salient_there_is_nothing_to_compare(gloo_pool):
    assert gloo_pool.run(accepted) == [True, True]


def accepted():
    method = SalUn(density=1.0)
    wrapped = UnlearningModule(Answering(), method)
    fully_shard(wrapped)
    return first_masks(wrapped, method) == {}
