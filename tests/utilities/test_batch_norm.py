import pytest
import torch
from torch import nn

from lightning_unlearn.utilities.batch_norm import frozen_statistics, reestimate_batch_norm, tracking_layers


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4, momentum=None))


def buffers(net):
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_layers_without_running_statistics_are_left_out():
    layers = [nn.BatchNorm1d(2, track_running_stats=False), nn.InstanceNorm1d(2), nn.LayerNorm(2), nn.GroupNorm(1, 2)]
    assert tracking_layers(nn.Sequential(*layers)) == []
    kept = [nn.BatchNorm2d(2), nn.SyncBatchNorm(2), nn.InstanceNorm1d(2, track_running_stats=True)]
    assert tracking_layers(nn.Sequential(*kept)) == kept


@pytest.mark.parametrize("policy", ["running", "batch"])
def test_frozen_statistics_leave_every_bit(policy):
    net = network()
    net(torch.randn(9, 3))
    before, momenta = buffers(net), [layer.momentum for layer in tracking_layers(net)]
    with frozen_statistics(net, policy):
        net(torch.randn(6, 3) * 100)
    assert same(before, buffers(net))
    assert [layer.momentum for layer in tracking_layers(net)] == momenta
    assert all(module.training for module in net.modules())


def test_policies_normalise_as_they_say():
    layer, batch = nn.BatchNorm1d(2), torch.randn(7, 2) + 5
    with frozen_statistics(layer, "batch"):
        torch.testing.assert_close(layer(batch), (batch - batch.mean(0)) / (batch.var(0, False) + layer.eps).sqrt())
    with frozen_statistics(layer, "running"):
        torch.testing.assert_close(layer(batch), batch / (1 + layer.eps) ** 0.5)


def test_frozen_statistics_come_back_after_an_exception():
    net = network()
    before = buffers(net)
    with pytest.raises(ValueError, match="more than 1 value"), frozen_statistics(net, "batch"):
        net(torch.randn(1, 3))
    assert same(before, buffers(net))
    assert tracking_layers(net)[0].momentum == 0.1


def test_estimates_are_the_mean_over_batches():
    net = nn.Sequential(nn.BatchNorm1d(3, dtype=torch.float64))
    batches = [torch.randn(n, 3, dtype=torch.float64) * 2 + 1 for n in (4, 9, 6)]
    net(torch.randn(5, 3, dtype=torch.float64) * 50)
    assert reestimate_batch_norm(net, batches, net)
    torch.testing.assert_close(net[0].running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(net[0].running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert int(net[0].num_batches_tracked) == 3
    assert net[0].momentum == 0.1


def test_instance_norm_is_estimated_as_well():
    layer = nn.InstanceNorm1d(2, track_running_stats=True, dtype=torch.float64)
    batches = [torch.randn(n, 2, 10, dtype=torch.float64) * 2 + 1 for n in (4, 9, 6)]
    assert reestimate_batch_norm(layer, batches, layer)
    torch.testing.assert_close(layer.running_mean, torch.stack([b.mean((0, 2)) for b in batches]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([b.var(2).mean(0) for b in batches]).mean(0))
    assert layer.momentum == 0.1


def test_only_the_norm_layers_train():
    net = network().eval()
    seen = []
    net[2].register_forward_hook(lambda module, inputs, output: seen.append(torch.equal(inputs[0], output)))
    weights = [parameter.clone() for parameter in net.parameters()]
    assert reestimate_batch_norm(net, [torch.randn(8, 3)] * 2, net)
    assert seen == [True, True]  # dropout stayed off
    assert not any(module.training for module in net.modules())
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_at_most_so_many_batches():
    net, drawn = network(), []

    def batches():
        for _ in range(5):
            drawn.append(1)
            yield torch.randn(8, 3)

    assert reestimate_batch_norm(net, batches(), net, max_batches=2)
    assert len(drawn) == 2


@pytest.mark.parametrize("batches", [[], [torch.randn(4, 3), torch.randn(1, 3)]])
def test_a_failure_restores_the_old_statistics(batches):
    net = network()
    net(torch.randn(9, 3))
    before = buffers(net)
    with pytest.raises(ValueError, match=r"at least one batch|more than 1 value"):
        reestimate_batch_norm(net, batches, net)
    assert same(before, buffers(net))
    assert [layer.momentum for layer in tracking_layers(net)] == [0.1, None]


def test_without_such_layers_no_batch_is_drawn():
    def batches():
        raise AssertionError("drawn")
        yield

    assert not reestimate_batch_norm(nn.Linear(2, 2), batches(), lambda batch: None)
