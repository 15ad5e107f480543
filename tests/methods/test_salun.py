"""The saliency mask against plain autograd, and what real optimizers leave of the entries outside it."""

import copy
import warnings

import pytest
import torch
from lightning import seed_everything
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_unlearn.api import unlearn
from lightning_unlearn.methods import CEFineTune, PartialUpdates, PushingMethod, SalUn
from tests.methods.passes import (
    FORGET,
    Answering,
    Drawn,
    answers_without_statistics,
    assert_close,
    cross_entropy,
    run,
)
from tests.modules.cases import dataset, same, weights

OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.3),
}


def slopes(model, size=8):
    """Gradients of every forget batch in eval mode, by name, in order."""
    module = copy.deepcopy(model).eval()
    x, y = dataset().tensors
    rows = list(FORGET)
    found = []
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        loss = functional.cross_entropy(module.net(x[chunk]), y[chunk])
        parameters = dict(module.net.named_parameters())
        found.append(dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)))
    return found


def mask_of(scores, density):
    """Name -> mask of the largest scores of all layers together, by sorting."""
    ranked = sorted(
        (
            (-abs(value), name, place)
            for name, one in scores.items()
            for place, value in enumerate(one.flatten().tolist())
        )
    )
    masks = {name: torch.zeros(one.numel(), dtype=torch.bool) for name, one in scores.items()}
    for _, name, place in ranked[: int(density * len(ranked))]:
        masks[name][place] = True
    return {f"net.{name}": mask.view(scores[name].shape) for name, mask in masks.items()}


def salient(model, density):
    return mask_of({name: sum(one[name] for one in slopes(model)) for name in slopes(model)[0]}, density)


def test_all_weights_salient_is_ce_fine_tuning_bit_for_bit():
    flipped, _ = run(CEFineTune(max_steps=6, labels="any", alpha=1.0, lr_scale=1 / 3))
    assert same(weights(flipped), weights(run(SalUn(max_steps=6, density=1.0, lr_scale=1 / 3))[0]))
    assert not same(weights(flipped), weights(run(SalUn(max_steps=6, density=0.5, lr_scale=1 / 3))[0]))
    assert isinstance(SalUn(), PushingMethod)
    assert SalUn().stop == "held_out"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_what_is_not_salient_never_moves_whatever_the_optimizer_does(optimizer, density):
    model = Answering()
    with torch.no_grad():
        for one in model.net.parameters():  # no zeros, which decay would leave where they are
            one.add_(0.01 * torch.sign(one) + 0.003)
    masks = salient(model, density)
    method = SalUn(max_steps=8, density=density, optimizer=OPTIMIZERS[optimizer])
    _, seen = run(method, model)
    start, end = seen.weights[0], seen.weights[-1]
    assert sum(int(mask.sum()) for mask in masks.values()) == int(density * sum(one.numel() for one in start.values()))
    for after in seen.weights[1:]:
        for name, one in after.items():
            assert torch.equal(one[~masks[name]], start[name][~masks[name]]), name
    for name, one in end.items():
        assert bool((one != start[name])[masks[name]].all()), name
    assert method._masks == {}


def test_batches_are_summed_before_their_magnitude_is_taken():
    model = Answering()
    found = slopes(model)
    assert len(found) == 2
    wrong = mask_of({name: sum(one[name].abs() for one in found) for name in found[0]}, 0.3)
    right = salient(model, 0.3)
    assert any(not torch.equal(wrong[name], right[name]) for name in right)
    _, seen = run(SalUn(max_steps=2, density=0.3, optimizer=OPTIMIZERS["adamw"]), model)
    for name, mask in right.items():
        assert torch.equal(seen.weights[-1][name] != seen.weights[0][name], mask), name


def test_the_pass_is_a_plain_loop():
    model, drawn = Answering(), Drawn()
    module, seen = run(SalUn(max_steps=9, density=0.4, retain_weight=2.0), model, adapter=drawn)
    masks = salient(model, 0.4)
    twin = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(twin.net.parameters(), lr=model.hparams.lr * 0.1, momentum=0.9)
    for batch, labels in zip(seen.batches, drawn.drawn, strict=True):
        optimizer.zero_grad()
        kept = cross_entropy(twin, batch["retain"])
        taught = functional.cross_entropy(answers_without_statistics(twin, batch["forget"][0]), labels)
        (2.0 * kept + taught).backward()
        for name, one in twin.named_parameters():  # without decay, masked gradients mask the step
            one.grad.mul_(masks[name])
        optimizer.step()
    assert_close(module, twin)
    true = torch.cat(drawn.true)
    assert 0 < int((torch.cat(drawn.drawn) == true).sum()) < len(true)


def test_partial_updates_are_those_of_salient_entries():
    model = Answering()
    masks = salient(model, 0.5)
    method = SalUn(max_steps=1, density=0.5).with_updates(PartialUpdates(0.3, "fixed", seed=1))
    _, seen = run(method, model)
    moved = {name: one != seen.weights[0][name] for name, one in seen.weights[1].items()}
    _, alone = run(CEFineTune(max_steps=1, labels="any").with_updates(PartialUpdates(0.3, "fixed", seed=1)), model)
    for name, one in moved.items():
        assert torch.equal(one, (alone.weights[1][name] != alone.weights[0][name]) & masks[name])


def changed_entries(processes):
    """Which weights a pass has changed, flat."""
    warnings.simplefilter("ignore")
    seed_everything(0, verbose=False)
    model = Answering(norm=False)
    trainer = {"accelerator": "cpu"} | ({"strategy": "ddp", "devices": processes} if processes > 1 else {"devices": 1})
    method = SalUn(max_steps=3, density=0.3, optimizer=OPTIMIZERS["adamw"])
    data = DataLoader(dataset(), 8 // processes)
    new = unlearn(model, list(FORGET), method=method, data=data, trainer=trainer, probe_samples=0, force=True).model
    pairs = zip(new.net.parameters(), model.net.parameters(), strict=True)
    return torch.cat([(a != b).flatten() for a, b in pairs]).tolist()


def test_processes_agree_on_the_mask_of_all_the_data(gloo_pool):
    shared = gloo_pool.run(changed_entries, 2)
    assert shared[0] == shared[1]
    found = slopes(Answering(norm=False), size=4)  # the batches of one process
    masks = mask_of({name: sum(one[name] for one in found) for name in found[0]}, 0.3)
    assert shared[0] == torch.cat([mask.flatten() for mask in masks.values()]).tolist()


def test_bad_settings():
    for density in (0.0, 1.5):
        with pytest.raises(ValueError, match="density"):
            SalUn(density=density)
