"""`ZeroRetrainForgetting`: the ZRF score of Chundawat et al., as a torchmetrics metric."""

from __future__ import annotations

from typing import Any, ClassVar, get_args

from torch import Tensor

from lightning_unlearn.functional.divergences import ZRFForm, zero_retrain_forgetting
from lightning_unlearn.metrics.sample_means import MeanOverSamples
from lightning_unlearn.results import Target
from lightning_unlearn.utilities.checks import check_choice

__all__ = ["ZeroRetrainForgetting"]


class ZeroRetrainForgetting(MeanOverSamples):
    """Mean over the forget set of one minus the divergence from a model with random weights (arXiv 2205.08096).

    The right value is that of the retrained model against the same random weights, and not 1, which a model reaches
    that answers at random. See :func:`lightning_unlearn.functional.divergences.zero_retrain_forgetting`. Computed in
    float64 whatever comes in.

    Measured (docs/metrics.md): on clean random samples of small networks it already differs from retraining by
    somewhat more than retrainings differ; small differences are no finding.

    Args:
        form: `"textbook"` (nats, between 1 - ln 2 and 1), or `"official"` for the numbers of the authors' code.
        kwargs: See :class:`torchmetrics.Metric`.

    Raises:
        ValueError: the form is neither.

    >>> import torch
    >>> metric = ZeroRetrainForgetting()
    >>> metric.update(torch.tensor([[0.0, -torch.inf]]), incompetent_logits=torch.tensor([[0.0, 0.0]]))
    >>> metric.compute()
    tensor(0.7842, dtype=torch.float64)
    """

    higher_is_better: bool = True
    target: ClassVar[Target] = "retrained"

    def __init__(self, *, form: ZRFForm = "textbook", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.form: ZRFForm = check_choice("form", form, get_args(ZRFForm))

    def update(self, logits: Tensor, incompetent_logits: Tensor) -> None:
        """Add the outputs of the model and of the untrained one, each (N, C), for the same samples."""
        self.add(zero_retrain_forgetting(logits, incompetent_logits, form=self.form))
