"""Whether two recorded runs, each in a folder of its own, are the same bit for bit."""

from collections import Counter

import torch

from lightning_unlearn.store.delta_store import DeltaStore


def content(url):
    """What a store holds of the training, step by step: how often each id occurred, and every delta."""
    store = DeltaStore.open(url)
    assert store.verify().ok
    repairs = [run.first for run in store.lineage.runs if run.kind == "repair"]
    return [
        (Counter(store.record(step).sample_ids), {name: delta.values for name, delta in store.read(step).items()})
        for step in range(min([store.n_steps, *repairs]))
    ]


def assert_same(one, other):
    """Two folders with the same steps in `store` and the same weights in `trained.ckpt`."""
    left, right = content(one / "store"), content(other / "store")
    assert len(left) == len(right) > 10
    for number, ((ids, deltas), (other_ids, other_deltas)) in enumerate(zip(left, right, strict=True)):
        assert ids == other_ids, f"step {number}"
        assert deltas.keys() == other_deltas.keys()
        assert deltas
        assert all(torch.equal(deltas[layer], other_deltas[layer]) for layer in deltas), f"step {number}"
    weights, others = (torch.load(folder / "trained.ckpt", weights_only=False)["state_dict"] for folder in (one, other))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
