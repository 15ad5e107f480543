"""The models of all shards as one module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from lightning import LightningModule
from torch import Tensor, nn

from lightning_unlearn.exceptions import MissingRequirementError, UnsupportedStrategyError
from lightning_unlearn.functional.votes import VOTES, Vote, aggregate_votes
from lightning_unlearn.utilities.checks import check_choice, expected

__all__ = ["SisaEnsemble"]


class SisaEnsemble(LightningModule):
    """Modules of the user's class, each trained on a shard of its own, that answer together.

    `forward` takes what theirs takes. By default it returns the logarithm of their mean probabilities: `softmax` of it
    is that mean, cross-entropy with it the ensemble's log-likelihood, and `argmax` its prediction. It goes wherever a
    classifier's logits go (`evaluate`, `compare_models`, torchmetrics).

    Args:
        members: The modules, at least one; or shard -> module, so that a shard keeps its name when another is gone.
        vote: `"softmax"`; `"majority"` as the paper has it (ties are decided by the mean probabilities, which is ours);
            or `"mean"` of the answers as they are, for regression and several labels. See `aggregate_votes`.
        origin: The training the members come from; `Sisa` forgets in its own only.

    >>> class Linear(LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = nn.Linear(3, 2)
    ...     def forward(self, x):
    ...         return self.layer(x)
    >>> ensemble = SisaEnsemble([Linear(), Linear()])
    >>> bool(torch.isclose(ensemble(torch.ones(1, 3)).exp().sum(), torch.ones(())))
    True
    """

    def __init__(
        self,
        members: Sequence[LightningModule] | Mapping[int, LightningModule],
        *,
        vote: Vote = "softmax",
        origin: str | None = None,
    ) -> None:
        super().__init__()
        if not members:
            raise ValueError(expected("members", "at least one module", members))
        named = members if isinstance(members, Mapping) else dict(enumerate(members))
        self.members = nn.ModuleDict({str(shard): member for shard, member in named.items()})
        self.vote: Vote = check_choice("vote", vote, VOTES)
        self.origin = origin
        # No optimizer trains the members together; so nobody asks for the loss of a step either.
        self.automatic_optimization = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The members' common answer.

        Raises:
            MissingRequirementError: a member answers with no tensor, and none under `logits`.
            ValueError: there are no classes to vote for.
        """
        answers = [_tensor(member(*args, **kwargs)) for member in self.members.values()]
        return aggregate_votes(torch.stack(answers), self.vote)

    def training_step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the members are trained one by one.

        Raises:
            UnsupportedStrategyError: always.
        """
        rule, remedy = "a single module for a method that trains", "Forget with `Sisa`, which trains shards again."
        raise UnsupportedStrategyError(expected("model", rule, "a SisaEnsemble", remedy))


def _tensor(answer: Any) -> Tensor:
    if isinstance(answer, Mapping):
        answer = answer.get("logits")
    answer = getattr(answer, "logits", answer)
    if not isinstance(answer, Tensor):
        rule, remedy = "returning a tensor, or something with one as `logits`", "Give the module such a `forward`."
        raise MissingRequirementError(expected("forward", rule, type(answer).__name__, remedy))
    return answer
