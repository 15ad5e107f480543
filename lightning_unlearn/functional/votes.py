"""One answer out of several classifiers' logits: the mean of their probabilities, or the majority of their votes."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from lightning_unlearn.utilities.checks import check_choice, expected

__all__ = ["VOTES", "Vote", "aggregate_votes"]

Vote: TypeAlias = Literal["softmax", "majority", "mean"]
VOTES: tuple[Vote, ...] = ("softmax", "majority", "mean")


def aggregate_votes(answers: Tensor, vote: Vote = "softmax") -> Tensor:
    r"""One answer for each sample; but for `"mean"` it is the logarithm of probabilities, so it serves as logits.

    With S members and probabilities p_s = softmax(z_s):

    - `"softmax"`: log(1/S sum_s p_s).
    - `"majority"`: log((v_c + 1/S sum_s p_s,c) / (S + 1)) with v_c the number of members whose largest logit is class
      c. The class with most votes wins; the mean probability is below one vote, so it only decides between equal ones.
    - `"mean"`: 1/S sum_s z_s, for answers that are no logits of one class in several.

    Args:
        answers: Of the members, (S, N, C, ...): classes in dimension 2.
        vote: See above.

    Raises:
        ValueError: no member, an unknown vote, or fewer than two classes to vote for.

    >>> a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> [round(float(p), 3) for p in aggregate_votes(torch.stack([a, b])).exp()[0]]
    [0.69, 0.31]
    >>> aggregate_votes(torch.stack([a, -a, -a]), "majority").argmax(1).tolist()
    [1]
    """
    check_choice("vote", vote, VOTES)
    if not answers.ndim or not len(answers):
        raise ValueError(expected("answers", "those of at least one member", tuple(answers.shape)))
    if vote == "mean":
        return answers.mean(dim=0)
    if answers.ndim < 3 or answers.shape[2] < 2:
        rule = "logits (S, N, C, ...) of at least two classes"
        raise ValueError(expected("answers", rule, tuple(answers.shape), "Use vote='mean' for other answers."))
    log_mean = torch.logsumexp(functional.log_softmax(answers.float(), dim=2), dim=0) - math.log(len(answers))
    if vote == "softmax":
        return log_mean
    classes = answers.shape[2]
    chosen = functional.one_hot(answers.argmax(dim=2), classes).movedim(-1, 2).sum(dim=0)
    share = (chosen + log_mean.exp()) / (len(answers) + 1)
    return share.clamp_min(torch.finfo(share.dtype).tiny).log()
