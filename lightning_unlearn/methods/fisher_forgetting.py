"""Fisher forgetting: noise on every weight, the more the less the data to keep need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_unlearn.data.drawn import drawn_loader
from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.functional.curvature import label_fisher, unflatten
from lightning_unlearn.methods.base import EditContext, Guarantee, Requirement, WeightEdit, hyperparameters
from lightning_unlearn.methods.batch_gradients import split_data, trainable
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.search_space import FloatRange, SearchSpace
from lightning_unlearn.types import WeightChange
from lightning_unlearn.utilities.checks import check_positive, check_positive_int, expected

__all__ = ["FisherForgetting"]


@register
@hyperparameters
class FisherForgetting(WeightEdit):
    r"""Add Gaussian noise whose variance is the inverse of the diagonal Fisher information of the data to keep.

    Rule: :math:`\theta \leftarrow \theta + \sqrt{v} \cdot N(0, 1)` with :math:`v = \alpha \min(1 / F, cap)` and
    :math:`F_i = \frac{1}{N_r} \sum_x \sum_y p(y|x) (\partial CE(x, y) / \partial \theta_i)^2` over retain samples
    one by one, the expectation over labels exact; rows, the last layer and vectors are treated apart (see below).

    Guarantee: heuristic here. The paper bounds what can be read out of the weights for a quadratic loss and its own
    covariance; capped, averaged variances have no bound.

    Cost: one backward pass for each class of each sample (`max_samples` times the number of classes); no training.

    Fails: on data that the rest of the model shares (random samples): the noise that hides them harms all else, and a
    little less hides nothing. Forgets no sample in particular: the data to forget are only left out of F.

    Differs from the official code: the paper states a covariance of :math:`F^{-1/2}`, the code (and this) draws from
    :math:`\alpha F^{-1}`. The code takes every tensor whose first dimension is the number of classes for the last
    layer; `head` says it by name. It uses all samples; here at most `max_samples`.

    Args:
        alpha: Scale of the variance. 1e-6, for random samples in a port of the code; 3e-6 is the code's default.
        cap: Largest 1 / F; the code's.
        head_cap: The same in the last layer; the code's.
        average_rows: Whether variances are averaged over the second dimension, as in the code.
        head_factor: Factor on the variances of the last layer; the code's.
        vector_factor: Factor on those of other one-dimensional parameters (normalisation, biases); the code's.
        head: Patterns (`fnmatch`) of the names of the last layer's parameters; by default the code's rule.
        forget_class: Number of a class to forget: its row of the last layer is drawn anew around zero.
        class_variance: Variance of that row, before `head_factor`; the code's.
        max_samples: Retain samples that F is computed from, drawn at random; `None` for all, as in the paper. 1000 is
            ours: F is a mean, and the caps hide what more samples would add.
        seed: Of the noise and the draw; by default the pass's, else drawn from torch's global state.

    Source: Golatkar, Achille, Soatto 2020, arXiv 1911.04933.

    >>> FisherForgetting().alpha
    1e-06
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.RETAIN_DATA})
    guarantee: ClassVar[Guarantee] = "heuristic"
    source: ClassVar[str] = "Golatkar, Achille, Soatto 2020, arXiv 1911.04933"
    # A library of methods searches 1e-9 to 1e-6 for alpha; the code's own default lies above that.
    search_space: ClassVar[SearchSpace] = {
        "alpha": FloatRange(1e-9, 1e-5, log=True),
        "head_factor": FloatRange(1, 30, log=True),
        "vector_factor": FloatRange(1, 30, log=True),
    }

    alpha: float = 1e-6
    cap: float = 1e3
    head_cap: float = 1e2
    average_rows: bool = True
    head_factor: float = 10.0
    vector_factor: float = 10.0
    head: Sequence[str] | None = None
    forget_class: int | None = None
    class_variance: float = 1e-4
    max_samples: int | None = 1000
    seed: int | None = None

    def __post_init__(self) -> None:
        self.alpha = check_positive("alpha", self.alpha, zero=True)
        self.cap = check_positive("cap", self.cap)
        self.head_cap = check_positive("head_cap", self.head_cap)
        self.average_rows = bool(self.average_rows)
        self.head_factor = check_positive("head_factor", self.head_factor, zero=True)
        self.vector_factor = check_positive("vector_factor", self.vector_factor, zero=True)
        if isinstance(self.head, str):
            raise ValueError(expected("head", "a list of patterns", self.head, "Put a single one in a list."))
        self.head = None if self.head is None else tuple(self.head)
        self.forget_class = (
            None if self.forget_class is None else check_positive_int("forget_class", self.forget_class, zero=True)
        )
        self.class_variance = check_positive("class_variance", self.class_variance, zero=True)
        self.max_samples = None if self.max_samples is None else check_positive_int("max_samples", self.max_samples)
        self.seed = None if self.seed is None else check_positive_int("seed", self.seed, zero=True)

    def compute_edit(self, context: EditContext) -> WeightChange:
        """The noise, and minus the row of a forgotten class.

        Raises:
            MissingRequirementError: no data, logits that are not (N, C), or no parameter that `head` names.
        """
        parameters = trainable(context.module)
        given = self.seed if self.seed is not None else context.seed
        seed = int(torch.randint(2**31, ())) if given is None else given
        fisher, n_classes = self._fisher(context, parameters, seed)
        heads = self._heads(parameters, n_classes)
        generator = torch.Generator().manual_seed(seed)
        change = {}
        for (name, parameter), information in zip(
            parameters.items(), unflatten(fisher, list(parameters.values())), strict=True
        ):
            variance = self.variance(information, head=name in heads)
            # Drawn on the CPU, so that the same seed is the same noise on every device.
            noise = torch.randn(parameter.shape, generator=generator).to(variance)
            change[name] = variance.sqrt() * noise
            if name in heads and self.forget_class is not None:
                change[name][self.forget_class] -= parameter.detach()[self.forget_class]
        return change

    def variance(self, information: Tensor, *, head: bool) -> Tensor:
        """Variance of the noise on one parameter.

        Args:
            information: Diagonal Fisher information of it, in its shape.
            head: Whether it belongs to the last layer.
        """
        variance = (1 / (information + 1e-8)).clamp(max=min(self.cap, self.head_cap) if head else self.cap)
        variance = self.alpha * variance
        if self.average_rows and variance.ndim > 1:
            variance = variance.mean(dim=1, keepdim=True).expand_as(variance).clone()
        if head and self.forget_class is not None:
            variance[self.forget_class] = self.class_variance
        if head:
            return variance * self.head_factor
        return variance * self.vector_factor if variance.ndim == 1 else variance

    def _fisher(self, context: EditContext, parameters: Mapping[str, Parameter], seed: int) -> tuple[Tensor, int]:
        samples = drawn_loader(split_data(self, context).retain_loader(), self.max_samples, seed=seed, single=True)
        held = list(parameters.values())
        total, count, n_classes = torch.zeros(()), 0, 0
        for batch in samples:
            logits, targets = context.outputs(batch)
            if logits.ndim != 2 or logits.shape[0] != 1:
                rule, got = "giving logits of shape (1, C) for one sample", tuple(logits.shape)
                raise MissingRequirementError(expected("adapter", rule, got, "Use another method for such answers."))
            n_classes = logits.shape[1]
            if self.forget_class is not None and self.forget_class >= n_classes:
                rule = f"None, or below the {n_classes} classes of the model"
                raise MissingRequirementError(expected("forget_class", rule, self.forget_class))
            one = label_fisher(logits, held, binary=targets.is_floating_point())
            total, count = total.to(one.device) + one.to(torch.promote_types(one.dtype, torch.float32)), count + 1
        return total / count, n_classes

    def _heads(self, parameters: Mapping[str, Parameter], n_classes: int) -> set[str]:
        if self.head is None:
            return {name for name, one in parameters.items() if one.ndim and one.shape[0] == n_classes}
        found = {name for name in parameters if any(fnmatchcase(name, pattern) for pattern in self.head)}
        rows = {name: tuple(one.shape) for name, one in parameters.items() if name in found}
        wrong = {name: shape for name, shape in rows.items() if shape[:1] != (n_classes,)}
        if not found or (self.forget_class is not None and wrong):
            rule = f"patterns of parameters whose first dimension is the {n_classes} classes"
            raise MissingRequirementError(expected("head", rule, wrong or self.head, f"There are {list(parameters)}."))
        return found
