"""The margin of a sample under a model, and what comparing two groups of models by it takes.

The same number has three names: margin (KLOM), logit-scaled confidence (LiRA, the NeurIPS 2023 competition) and
log-odds of the target.
"""

from __future__ import annotations

import math

from torch import Tensor

from lightning_unlearn.utilities.checks import check_positive, expected

__all__ = ["MARGIN_LIMIT", "checked_groups", "margins"]

MARGIN_LIMIT = 100.0
"""Bound that margins are clipped to before groups are compared: a probability nearer to 0 or 1 than e^-100 is noise."""


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Margin of every sample, :math:`z_y - \log \sum_{k \ne y} e^{z_k}`: the log-odds of its target.

    Args:
        logits: (N, C), any floating dtype; log-probabilities will do.
        targets: (N,), integer class numbers.

    Returns:
        float64 of shape (N,); infinite where the target, or everything else, is excluded.

    Raises:
        ValueError: the shapes are not (N, C) and (N,), or there are fewer than two classes.

    >>> import torch
    >>> margins(torch.tensor([[2.0, 0.0], [2.0, -torch.inf]]), torch.tensor([1, 0])).tolist()
    [-2.0, inf]
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or targets.shape != logits.shape[:1]:
        got = (tuple(logits.shape), tuple(targets.shape))
        raise ValueError(expected("logits and targets", "of shapes (N, C), C > 1, and (N,)", got))
    chosen = targets.long().unsqueeze(1)
    logits = logits.double()
    # p_y / (1 - p_y) in probabilities loses all digits of a confident sample; the logits of the others keep them.
    others = logits.scatter(1, chosen, -math.inf).logsumexp(dim=1)
    return logits.gather(1, chosen).squeeze(1) - others


def checked_groups(unlearned: Tensor, retrained: Tensor, *, clip: float, fewest: int) -> tuple[Tensor, Tensor]:
    """Both groups in float64 on one device, clipped to [-clip, clip].

    Args:
        unlearned: (models, samples).
        retrained: (models, samples), of the same samples in the same order.
        clip: Bound.
        fewest: Number of models that each group needs.

    Raises:
        ValueError: shapes do not fit, a group is too small, a margin is NaN, or the bound is not positive.
    """
    check_positive("clip", clip)
    for name, group in (("unlearned", unlearned), ("retrained", retrained)):
        if group.ndim != 2 or group.shape[0] < fewest or not group.shape[1]:
            rule = f"of shape (models, samples), with at least {fewest} models and a sample"
            raise ValueError(expected(name, rule, tuple(group.shape), "Train more models; `train_many` does."))
        if group.isnan().any():
            raise ValueError(expected(name, "margins without NaN", f"{int(group.isnan().sum())} NaN"))
    if unlearned.shape[1] != retrained.shape[1]:
        rule = f"of the {unlearned.shape[1]} samples of `unlearned`"
        raise ValueError(expected("retrained", rule, f"{retrained.shape[1]} samples", "Use one order for all models."))
    return unlearned.double().clamp(-clip, clip), retrained.to(unlearned.device).double().clamp(-clip, clip)
