"""Selective Synaptic Dampening: shrink the weights that matter far more to the forget data than to all data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_unlearn.functional.saliency import alpha_of_share, dampening_factors
from lightning_unlearn.methods.base import EditContext, Guarantee, Requirement, WeightEdit, hyperparameters
from lightning_unlearn.methods.batch_gradients import as_change, batch_gradients, split_data, trainable
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.search_space import Choices, FloatRange, SearchSpace
from lightning_unlearn.types import WeightChange
from lightning_unlearn.utilities.checks import check_fraction, check_positive, expected

__all__ = ["SelectiveSynapticDampening"]


@register
@hyperparameters
class SelectiveSynapticDampening(WeightEdit):
    r"""Dampen, without any training, the weights that are specific to the data to forget (SSD).

    Rule: :math:`\theta_i \leftarrow \beta_i \theta_i` with :math:`\beta_i = \min(\lambda I_D[i] / I_{D_f}[i], 1)` where
    :math:`I_{D_f}[i] > \alpha I_D[i]`; other weights stay. The importance :math:`I[i]` is the mean over batches of the
    squared gradient of the batch's mean loss, in eval mode; D is retain and forget data together.

    Guarantee: heuristic. No weight ever grows, and with :math:`\alpha \to \infty` nothing changes.

    Cost: one backward pass over all data; no training, no labels with `label_free`.

    Fails: where forget and retain data rest on the same weights (random samples of all classes): what is selected is
    needed elsewhere. A fixed `alpha` is brittle: as D holds the forget data, no ratio of importances exceeds the number
    of all batches per forget batch, so 10 selects nothing where a tenth is to be forgotten; and where the forget data
    were hardly learnt (wrong labels) it selects nearly every weight, which destroyed a small CNN (test accuracy 7 %).
    Importances of batch means depend on the *batch size*, and on how the forget samples fall into batches.

    Differs from the official code: there the batches of D are shuffled and mix both kinds of samples; here those of the
    retain data and those of the forget data are averaged, every batch counting the same. The loss is the user's own.
    The default threshold is a share of the weights, not a number.

    Args:
        alpha: How many times more important a weight must be to the forget data. The paper has 10 for ResNet-18, and 5
            to 25 for a ViT. By default it is set by `share`.
        share: Share of all weights that is dampened, those with the largest ratio, where `alpha` is not given; by
            default ln(1 + 100 n_f / n) percent. Setting the threshold by a percentile is the idea of adaptive SSD
            (Schoepf, Foster, Brintrup 2024, arXiv 2402.10098); the formula is a reconstruction (inferred). On a small
            CNN it kept test accuracy within one to four points for wrong labels, clean samples and a class.
        lambda_: Strength: the smaller, the nearer to zero. 1 is the paper's.
        label_free: Importances are mean absolute gradients of the squared length of the logits instead (LFSSD); labels
            are not used, though the adapter reads them out of the batch.

    Source: Foster, Schoepf, Brintrup 2024, arXiv 2308.07707; `label_free` after the authors' published code.

    >>> SelectiveSynapticDampening(alpha=5.0)
    SelectiveSynapticDampening(alpha=5.0, share=None, lambda_=1.0, label_free=False)
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.FORGET_DATA, Requirement.RETAIN_DATA})
    guarantee: ClassVar[Guarantee] = "heuristic"
    source: ClassVar[str] = "Foster, Schoepf, Brintrup 2024, arXiv 2308.07707"
    # The share and not `alpha`: the two exclude each other, and which alpha is of use depends on the network (5 to 50
    # are published). The paper has 1, and once 0.1, for lambda.
    search_space: ClassVar[SearchSpace] = {
        "share": Choices((None, 0.001, 0.003, 0.01, 0.03, 0.1)),
        "lambda_": FloatRange(0.1, 10, log=True),
    }

    alpha: float | None = None
    share: float | None = None
    lambda_: float = 1.0
    label_free: bool = False

    def __post_init__(self) -> None:
        if self.alpha is not None and self.share is not None:
            raise ValueError(
                expected("share", "left out where `alpha` is given", self.share, "Both set the threshold.")
            )
        self.alpha = None if self.alpha is None else check_positive("alpha", self.alpha, zero=True)
        self.share = None if self.share is None else check_fraction("share", self.share)
        self.lambda_ = check_positive("lambda_", self.lambda_, zero=True)
        self.label_free = bool(self.label_free)

    def compute_edit(self, context: EditContext) -> WeightChange:
        """What dampening takes away: never more than the weight itself.

        Raises:
            MissingRequirementError: no data, or no batch has a loss.
        """
        data, parameters = split_data(self, context), trainable(context.module)
        loss = self._output_length(context) if self.label_free else context.loss

        def total(batches: Iterable[Any]) -> tuple[Tensor, int]:
            summed, count = torch.zeros(()), 0
            for _, gradient in batch_gradients(loss, batches, parameters):
                one = gradient.abs() if self.label_free else gradient.square()
                summed, count = summed.to(one.device) + one, count + 1
            return summed, count

        forget, n_forget = total(data.forget_loader())
        retain, n_retain = total(data.retain_loader())
        own, whole = forget / n_forget, (forget + retain) / (n_forget + n_retain)
        alpha = self.alpha
        if alpha is None:
            n = len(data.forget_positions)
            part = n / (n + len(data.retain_positions))
            alpha = alpha_of_share(own, whole, math.log1p(100 * part) / 100 if self.share is None else self.share)
        factors = dampening_factors(own, whole, alpha=alpha, strength=self.lambda_)
        weights = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
        return as_change((factors - 1) * weights, parameters)

    @staticmethod
    def _output_length(context: EditContext) -> Callable[[Any], Tensor]:
        def loss(batch: Any) -> Tensor:
            return context.outputs(batch)[0].square().sum(dim=1).mean()

        return loss
