"""Distributions over classes made of labels, and the divergence of a model's answer from one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lightning_unlearn.utilities.checks import expected

__all__ = ["answer_divergence", "label_distribution", "yes_no_divergence"]


def label_distribution(targets: Tensor, n_classes: int, smoothing: float) -> Tensor:
    r"""Label-smoothed one-hot distributions: :math:`(1 - s) e_y + s / C`; with s = 1 they are uniform.

    Args:
        targets: Class numbers of shape (N, ...); negative ones, which losses ignore, give the distribution of class 0.
        n_classes: C.
        smoothing: s, from 0 to 1.

    Returns:
        float32 of shape (N, C, ...).

    >>> label_distribution(torch.tensor([1]), 2, 0.5)
    tensor([[0.2500, 0.7500]])
    """
    chosen = functional.one_hot(targets.clamp(min=0), n_classes).movedim(-1, 1).float()
    return (1.0 - smoothing) * chosen + smoothing / n_classes


def _cross(p: Tensor, log_q: Tensor) -> Tensor:
    """The product of p and log q, and nothing where p is zero."""
    return torch.where(p > 0, p * torch.where(p > 0, log_q, torch.zeros_like(log_q)), torch.zeros_like(p))


def answer_divergence(logits: Tensor, target: Tensor, *, reverse: bool = False) -> Tensor:
    r"""Kullback-Leibler divergence between the model's answer p = softmax(logits) and a target distribution t, in nats.

    Args:
        logits: Shape (N, C, ...).
        target: Distributions over dimension 1, same shape; a constant, no gradient flows into it.
        reverse: KL(p || t) in place of KL(t || p); infinite where the target excludes a class.

    Returns:
        Shape (N, ...), differentiable in the logits.

    Raises:
        ValueError: the shapes differ.

    >>> answer_divergence(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
    tensor([0.6931])
    """
    if logits.shape != target.shape:
        raise ValueError(expected("target", f"of the logits' shape {tuple(logits.shape)}", tuple(target.shape)))
    log_p, target = logits.log_softmax(1), target.detach().to(logits.dtype)
    log_t = target.log()
    if reverse:
        return (log_p.exp() * (log_p - log_t)).sum(1)
    return (_cross(target, log_t) - _cross(target, log_p)).sum(1)


def yes_no_divergence(logits: Tensor, target: Tensor, *, reverse: bool = False) -> Tensor:
    r"""The same for independent yes/no questions: p = sigmoid(logits), entry by entry.

    Args:
        logits: Any shape.
        target: Probabilities of yes, same shape; a constant.
        reverse: As in `answer_divergence`.

    Returns:
        The same shape, differentiable in the logits.

    Raises:
        ValueError: the shapes differ.

    >>> yes_no_divergence(torch.zeros(2), torch.tensor([1.0, 0.5]))
    tensor([0.6931, 0.0000])
    """
    if logits.shape != target.shape:
        raise ValueError(expected("target", f"of the logits' shape {tuple(logits.shape)}", tuple(target.shape)))
    target = target.detach().to(logits.dtype)
    both = torch.stack((logits, torch.zeros_like(logits)), 1)  # softmax over (z, 0) is (sigmoid, 1 - sigmoid)
    return answer_divergence(both, torch.stack((target, 1 - target), 1), reverse=reverse)
