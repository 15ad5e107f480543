"""Data that can only be learnt by heart, and networks that do."""

import torch
from sklearn.datasets import load_digits


def noisy_digits(seed=0):
    """Images (1797, 64), labels of which three in ten are drawn, and an order of the samples.

    What can only be learnt by heart is what tells a member.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    drawn = torch.rand(len(images), generator=generator) < 0.3
    labels = torch.where(drawn, torch.randint(10, (len(images),), generator=generator), torch.tensor(digits.target))
    return images, labels, order


def overfitted(images, labels, seed):
    """A network that knows its few hundred training images by heart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net
