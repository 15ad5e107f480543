"""Influence unlearning: one Newton step from the data with the forgotten samples to the data without them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unlearn.data.drawn import drawn_loader
from lightning_unlearn.exceptions import LightningUnlearnError, MissingRequirementError
from lightning_unlearn.functional.curvature import RankOneInverse, conjugate_gradients, fisher_product, hessian_product
from lightning_unlearn.methods.base import EditContext, Guarantee, Requirement, WeightEdit, hyperparameters
from lightning_unlearn.methods.batch_gradients import (
    as_change,
    batch_gradients,
    gradient_sum,
    size_of,
    split_data,
    trainable,
)
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.search_space import FloatRange, SearchSpace
from lightning_unlearn.types import WeightChange
from lightning_unlearn.utilities.checks import check_choice, check_positive, check_positive_int, expected

__all__ = ["InfluenceUnlearning"]


@register
@hyperparameters
class InfluenceUnlearning(WeightEdit):
    r"""Add what the forgotten samples' influence on the weights was, to first order (also called IU, WoodFisher).

    Rule: :math:`\theta_u = \theta + \alpha (F_r + \lambda I)^{-1} v` with
    :math:`v = \frac1n \sum_{D_f} g - \frac{n_f}{n\,n_r} \sum_{D_r} g`, the gradient of the mean loss over all data
    minus that over the data to keep, and :math:`F_r` a curvature matrix of the retain loss.

    Guarantee: approximate. For a convex loss that is close to quadratic, at its minimum and with `alpha=1`, it is the
    retrained model up to the damping; for deep networks a step of unknown quality in a good direction.

    Cost: one backward pass over all data, then three (`"cg"`) for each iteration over `max_samples` retain samples, or
    one backward pass for each of these samples (`"woodfisher"`). Memory of `"woodfisher"`: one vector as long as the
    trainable weights for each of the m samples, :math:`4 m P` bytes for P weights in float32 (1000 samples of a
    model with a million weights: 4 GB). More than `memory_bytes` is refused. Its work grows with :math:`m^2 P`.

    Fails: where the model moves far when it is retrained, and with too little damping: along directions that the
    curvature does not see, the step is :math:`v / \lambda`.

    Differs from code in use: the published WoodFisher recursion never leaves the direction of the first gradient, so it
    returns :math:`v` but for one direction; here it is the inverse (Sherman and Morrison, tested against matrices). The
    gradients are those of the user's own loss, taken for a mean over the batch.

    Args:
        alpha: Length of the step. 1 is the Newton step; code in use searches 1 to 20, of a matrix with damping 1.
        solver: `"cg"`: conjugate gradients on products with the matrix. `"woodfisher"`: the exact inverse of the
            empirical Fisher matrix (gradients with the true labels) of the samples; for any loss, as in the papers.
        curvature: For `"cg"`: `"fisher"`, the Fisher matrix of the model's own answers, needs logits (of classes, or
            multi-label) and is never negative; `"hessian"` of the user's loss is for any twice differentiable loss.
        damping: :math:`\lambda`. 0.1 is ours, a careful step: on a small CNN it took 40 of 60 points of accuracy off 20
            wrong labels and none off the test data; 0.01 took 55 and half a point.
        max_iterations: Of `"cg"`; fewer shorten the step where the curvature is small. With 20 the step of a small CNN
            was as long as with 50, to a part in a thousand.
        tolerance: Relative residual that ends `"cg"`; from 1e-5 to 1e-2 the step changed by a part in a thousand, at
            half the cost.
        max_samples: Retain samples behind the curvature, drawn at random and kept in memory; `None` for all. 1000 as in
            the published code.
        seed: Of the draw.
        memory_bytes: Bound on the vectors of `"woodfisher"`, `None` for none; 8 GiB (ours).

    Raises:
        ValueError: before anything is computed, the vectors of `"woodfisher"` would exceed `memory_bytes`.

    Source: Koh & Liang 2017, arXiv 1703.04730; Izzo et al. 2021, arXiv 2002.10077; as a baseline Jia et al. 2023, arXiv
    2304.04934.

    >>> InfluenceUnlearning().solver
    'cg'
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.FORGET_DATA, Requirement.RETAIN_DATA})
    guarantee: ClassVar[Guarantee] = "approximate"
    source: ClassVar[str] = "Koh & Liang 2017, arXiv 1703.04730; Izzo et al. 2021, arXiv 2002.10077"
    # Published for alpha: 1 to 20 (recalled), of a matrix with damping 1.
    search_space: ClassVar[SearchSpace] = {
        "alpha": FloatRange(0.3, 20, log=True),
        "damping": FloatRange(0.01, 1, log=True),
    }

    alpha: float = 1.0
    solver: Literal["cg", "woodfisher"] = "cg"
    curvature: Literal["fisher", "hessian"] = "fisher"
    damping: float = 0.1
    max_iterations: int = 20
    tolerance: float = 1e-2
    max_samples: int | None = 1000
    seed: int = 0
    memory_bytes: int | None = 8 * 2**30

    def __post_init__(self) -> None:
        self.alpha = check_positive("alpha", self.alpha)
        self.solver = check_choice("solver", self.solver, ("cg", "woodfisher"))
        self.curvature = check_choice("curvature", self.curvature, ("fisher", "hessian"))
        self.damping = check_positive("damping", self.damping)
        self.max_iterations = check_positive_int("max_iterations", self.max_iterations)
        self.tolerance = check_positive("tolerance", self.tolerance)
        self.max_samples = None if self.max_samples is None else check_positive_int("max_samples", self.max_samples)
        self.seed = check_positive_int("seed", self.seed, zero=True)
        self.memory_bytes = None if self.memory_bytes is None else check_positive_int("memory_bytes", self.memory_bytes)

    def compute_edit(self, context: EditContext) -> WeightChange:
        """The step.

        Raises:
            MissingRequirementError: no data, or no batch has a loss.
            ValueError: `"woodfisher"` would need more than `memory_bytes`.
            LightningUnlearnError: the damped Hessian is not positive along a direction that was searched.
        """
        data, parameters = split_data(self, context), trainable(context.module)
        if self.solver == "woodfisher":
            self._check_memory(self._samples(context), parameters.values())
        forget, n_forget = gradient_sum(context.loss, data.forget_loader(), parameters)
        retain, n_retain = gradient_sum(context.loss, data.retain_loader(), parameters)
        n = n_forget + n_retain
        # float64 from here on: a solver loses digits at every step, and two flat vectors cost little.
        difference = forget.double() / n - retain.double() * (n_forget / (n * n_retain))
        solve = self._rank_ones if self.solver == "woodfisher" else self._conjugate
        return as_change(self.alpha * solve(context, difference), parameters)

    def _samples(self, context: EditContext) -> DataLoader[Any]:
        """The retain samples behind the curvature, one by one."""
        retain = split_data(self, context).retain_loader()
        return drawn_loader(retain, self.max_samples, seed=self.seed, single=True)

    def _check_memory(self, samples: DataLoader[Any], parameters: Collection[Tensor]) -> None:
        itemsize = max((one.dtype.itemsize for one in parameters), default=0)
        vector = max(itemsize, torch.float32.itemsize) * sum(one.numel() for one in parameters)
        n = len(samples.dataset)  # type: ignore[arg-type]
        if self.memory_bytes is not None and n * vector > self.memory_bytes:
            rule = f"at most {self.memory_bytes // vector} for {vector:,} bytes a sample within `memory_bytes`"
            remedy = f'Use solver="cg", or memory_bytes={n * vector}.'
            raise ValueError(expected("max_samples", rule, f"{n:,} samples", remedy))

    def _rank_ones(self, context: EditContext, right: Tensor) -> Tensor:
        samples = self._samples(context)
        inverse = RankOneInverse(self.damping, len(samples.dataset))  # type: ignore[arg-type]
        dtype = right.dtype
        for _, gradient in batch_gradients(context.loss, samples, trainable(context.module)):
            dtype = gradient.dtype  # float64 would double the memory that all the samples take
            inverse.add(gradient)
        return inverse.times(right.to(dtype)).to(right)

    def _conjugate(self, context: EditContext, right: Tensor) -> Tensor:
        retain = split_data(self, context).retain_loader()
        # Kept, because a random transform would make every product one with another matrix.
        batches = list(drawn_loader(retain, self.max_samples, seed=self.seed))
        sizes = [size_of(batch) for batch in batches]

        def product(vector: Tensor) -> Tensor:
            total = self.damping * vector
            for batch, size in zip(batches, sizes, strict=True):
                total = total + self._product(context, batch, vector).double() * (size / sum(sizes))
            return total

        found = conjugate_gradients(product, right, max_iterations=self.max_iterations, tolerance=self.tolerance)
        if not found.curvature > 0:
            rule = "larger than the most negative curvature of the loss"
            remedy = 'Use a larger one, or curvature="fisher".'
            raise LightningUnlearnError(expected("damping", rule, self.damping, remedy))
        return found.vector

    def _product(self, context: EditContext, batch: Any, vector: Tensor) -> Tensor:
        parameters = list(trainable(context.module).values())
        if self.curvature == "hessian":
            loss = context.loss(batch)
            if loss is None:
                return torch.zeros_like(vector)
            return hessian_product(loss, parameters, vector.to(loss.dtype))
        logits, targets = context.outputs(batch)
        binary = targets.is_floating_point()
        if binary and (targets.shape != logits.shape or bool(((targets < 0) | (targets > 1)).any())):
            rule = 'class numbers or multi-label targets for curvature="fisher"'
            raise MissingRequirementError(expected("targets", rule, tuple(targets.shape), 'Use curvature="hessian".'))
        return fisher_product(logits, parameters, vector.to(logits.dtype), binary=binary)
