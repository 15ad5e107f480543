"""An independent reading of a store: initial weights and deltas, added up in float64 and nothing else."""

import torch


def replayed(store, ranges=None, *, initial=None):
    """Initial weights + all deltas of the half-open ranges of steps (all of them unless given), by name, in float64."""
    weights = {name: tensor.double() for name, tensor in (initial or store.initial_weights()).items()}
    for start, stop in ranges if ranges is not None else [(0, store.n_steps)]:
        for step in range(start, stop):
            for name, delta in store.read(step).items():
                flat = weights[name].reshape(-1).clone()
                values = delta.values.double()
                if delta.indices is None:
                    flat += values
                else:
                    flat[delta.indices] += values
                weights[name] = flat.reshape(weights[name].shape)
    return weights


def assert_leads_to(store, module, ranges=None, *, tolerance=1e-7):
    """Initial + deltas = the module's parameters, within `tolerance` of the largest weight."""
    weights = replayed(store, ranges)
    largest = max(float(parameter.detach().abs().max()) for parameter in module.parameters())
    for name, parameter in module.named_parameters():
        error = float((weights[name] - parameter.detach().double()).abs().max())
        assert error <= tolerance * largest, f"{name}: {error:.2e} against {tolerance * largest:.2e}"


def same_weights(first, second):
    """Whether two modules agree bit for bit, buffers included."""
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
