r"""Masks as a remedy of fine-tuning, in the linear model of :mod:`lightning_unlearn.functional.linear_theory`.

The pretrained weights are masked by features, then fine-tuned: option A discards the features that both kinds of data
share, option B keeps them. Both are the paper's (Ding et al., arXiv 2410.03833, confirmed by its public reviews). The
closed forms were derived anew here, and masks made from importances are a reading of the paper's idea (inferred).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_unlearn.functional.linear_problem import LinearProblem
from lightning_unlearn.functional.linear_theory import (
    Losses,
    checked_rows,
    fine_tuned_solution,
    golden_residual,
    original_solution,
)
from lightning_unlearn.functional.retention import kept_masks
from lightning_unlearn.types import Part
from lightning_unlearn.utilities.checks import check_choice, expected

__all__ = [
    "KeptFeatures",
    "feature_importance",
    "feature_mask",
    "importance_mask",
    "mask_features",
    "masked_solution",
    "predicted_masked_losses",
]

KeptFeatures: TypeAlias = Literal["retain", "retain_and_overlap"]
"""Option A, `"retain"`, keeps what only the data to keep have; option B, `"retain_and_overlap"`, what is shared too."""

_FITTED = 1e-9
"""Residuals below this share of the labels are round-off, and a gradient made of them is noise."""


def feature_mask(problem: LinearProblem, keep: KeptFeatures) -> Tensor:
    """Which features an option keeps, bool (d,).

    Raises:
        ValueError: the option is unknown.

    >>> from lightning_unlearn.functional.linear_problem import draw_linear_problem
    >>> problem = draw_linear_problem(1, 1, d_retain=2, d_overlap=1, d_forget=1)
    >>> feature_mask(problem, "retain_and_overlap").tolist()
    [True, True, True, False]
    """
    check_choice("keep", keep, ("retain", "retain_and_overlap"))
    d_retain, d_overlap, d_forget = problem.sizes
    kept = d_retain + (d_overlap if keep == "retain_and_overlap" else 0)
    return torch.arange(d_retain + d_overlap + d_forget) < kept


def mask_features(weights: Tensor, problem: LinearProblem, keep: KeptFeatures) -> Tensor:
    """The weights, zero for the features that an option discards.

    Args:
        weights: (d,).
        problem: Says which feature is whose.
        keep: `"retain"` (option A) or `"retain_and_overlap"` (option B).

    Raises:
        ValueError: the option is unknown.

    >>> from lightning_unlearn.functional.linear_problem import draw_linear_problem
    >>> problem = draw_linear_problem(1, 1, d_retain=2, d_overlap=1, d_forget=1)
    >>> mask_features(torch.ones(4), problem, "retain").tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    return weights * feature_mask(problem, keep)


def masked_solution(problem: LinearProblem, mask: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    r"""The original, masked and fine-tuned: :math:`(I - P_t) (m \odot w_o) + P_t w_*`.

    Args:
        problem: The data.
        mask: Bool (d,), such as `feature_mask(problem, "retain")`.
        rows: Fine-tuning samples among the data to keep; all by default.

    Returns:
        (d,).

    Raises:
        ValueError: a row is repeated or out of range.

    >>> from lightning_unlearn.functional.linear_problem import draw_linear_problem
    >>> from lightning_unlearn.functional.linear_theory import golden_solution
    >>> problem = draw_linear_problem(3, 2, d_retain=6, d_forget=4)
    >>> torch.allclose(masked_solution(problem, feature_mask(problem, "retain"), [0]), golden_solution(problem))
    True
    """
    return fine_tuned_solution(problem, rows, start=original_solution(problem) * mask)


def predicted_masked_losses(problem: LinearProblem, keep: KeptFeatures, rows: Sequence[int] | None = None) -> Losses:
    r"""RL and UL of the masked and fine-tuned original in closed form, by Gram matrices of the feature blocks.

    The original interpolates everything, so the residuals on samples s of any mask m are
    :math:`-X_s^T (I - P_t) (1 - m) \odot w_o`. With :math:`M = F^T F`, the golden model's residual e on the data to
    forget, and the Schur complement :math:`S = X_f^T (I - P_r) X_f`, the original has :math:`u = F S^{-1} e` on the
    forget-only features, and v on the shared ones.

    - Option B discards u alone, which no sample to keep sees: RL is 0 and fine-tuning moves nothing, whatever its
      samples; UL is :math:`\frac{1}{n_f} \|M S^{-1} e\|^2`. As S exceeds M by what is shared, this is less
      forgetting than the golden model's :math:`\frac{1}{n_f} \|e\|^2` (always in the norm of :math:`S^{-1}`, in
      this one in 1,950 of 2,000 small random problems), and none where everything is shared.
    - Option A discards v as well: RL is :math:`\frac{1}{n_r} \|(L_1 - L_{1t} G_t^{-1} X_t^T X_r)^T v\|^2`, which is 0
      for samples that are fine-tuned on and not for others; UL is
      :math:`\frac{1}{n_f} \|L_2^T v + F^T u - X_f^T X_t G_t^{-1} L_{1t}^T v\|^2`.
    - Distinct features: no v, S = M. Both options give the golden *weights*, for any fine-tuning samples or none.

    Args:
        problem: The data.
        keep: `"retain"` (option A) or `"retain_and_overlap"` (option B).
        rows: Fine-tuning samples among the data to keep; all by default.

    Raises:
        ValueError: the option is unknown, or a row is repeated or out of range.

    >>> from lightning_unlearn.functional.linear_problem import draw_linear_problem
    >>> from lightning_unlearn.functional.linear_theory import losses_of
    >>> problem = draw_linear_problem(6, 3, d_retain=12, d_forget=8, d_overlap=4)
    >>> predicted_masked_losses(problem, "retain_and_overlap", [0, 1]).retain
    0.0
    >>> discarded = predicted_masked_losses(problem, "retain", [0, 1])
    >>> measured = losses_of(masked_solution(problem, feature_mask(problem, "retain"), [0, 1]), problem)
    >>> abs(discarded.retain - measured.retain) < 1e-10 * measured.retain
    True
    """
    check_choice("keep", keep, ("retain", "retain_and_overlap"))
    chosen = checked_rows(problem, rows)
    retain_only, shared, other, forget_only = (
        problem.retain_only, problem.overlap_retain, problem.overlap_forget, problem.forget_only,
    )  # fmt: skip
    cross = shared.T @ other
    gram = retain_only.T @ retain_only + shared.T @ shared
    own = forget_only.T @ forget_only
    schur = own + other.T @ other - cross.T @ torch.linalg.solve(gram, cross)
    multipliers = torch.linalg.solve(schur, golden_residual(problem))
    dropped = own @ multipliers  # F^T u
    if keep == "retain_and_overlap":
        return Losses(0.0, float(dropped.square().mean()))
    y_retain = retain_only.T @ problem.w_retain + shared.T @ problem.w_overlap
    lost = shared @ torch.linalg.solve(gram, y_retain - cross @ multipliers) + other @ multipliers  # v
    seen = shared[:, chosen].T @ lost
    learnt = torch.linalg.solve(gram[chosen][:, chosen], seen)
    retain = shared.T @ lost - gram[:, chosen] @ learnt
    retain[chosen] = 0.0  # in exact arithmetic
    forget = other.T @ lost + dropped - cross[chosen].T @ learnt
    return Losses(float(retain.square().mean()), float(forget.square().mean()))


def feature_importance(problem: LinearProblem, of: Part, weights: Tensor | None = None) -> Tensor:
    r"""How much each coefficient matters to the data to keep, or to those to forget, float64 (d,).

    Without `weights`, the gradient of the model's answer, :math:`\frac{1}{n} \sum_i |x_{ij}|`, which is the same at
    every w. With them, the gradient of the loss sample by sample, :math:`\frac{2}{n} \sum_i |x_{ij} (x_i^T w - y_i)|`,
    as :class:`lightning_unlearn.methods.RetentionMasking` takes it (with batches of one): where a model interpolates,
    every one of these gradients is zero, so at the original solution they cannot make a mask.

    The paper's formula was not at hand: both are readings of "built from the gradient on the data" (inferred).

    Args:
        problem: The data.
        of: `"retain"` or `"forget"`.
        weights: (d,), where the loss is differentiated.

    Raises:
        ValueError: `of` is unknown, or the weights fit the data so well that the gradients are round-off.

    >>> from lightning_unlearn.functional.linear_problem import draw_linear_problem
    >>> problem = draw_linear_problem(1, 1, d_retain=2, d_overlap=1, d_forget=1)
    >>> (feature_importance(problem, "forget") > 0).tolist()
    [False, False, True, True]
    """
    check_choice("of", of, ("retain", "forget"))
    columns, labels = (problem.x_retain, problem.y_retain) if of == "retain" else (problem.x_forget, problem.y_forget)
    if weights is None:
        return columns.abs().mean(1)
    residual = columns.T @ weights - labels
    if float(residual.abs().max()) <= _FITTED * float(labels.abs().max()):
        remedy = "Where the model interpolates, the loss has no gradient: leave `weights` out."
        raise ValueError(expected("weights", f"weights with an error on the {of} data", "an interpolant", remedy))
    return 2 * (columns * residual).abs().mean(1)


def importance_mask(problem: LinearProblem, keep: float, *, of: Part, weights: Tensor | None = None) -> Tensor:
    r"""A mask of :math:`\lceil keep \cdot d \rceil` coefficients, from importances instead of known features.

    The retention-based mask (`of="retain"`) keeps what matters most to the data to keep; the forget-based one, the
    paper's baseline, what matters least to the data to forget. With importances of the answer the first is option B at
    `keep` = (d_retain + d_overlap) / d, and the second option A at `keep` = d_retain / d, exactly.

    Args:
        problem: The data.
        keep: Share of the coefficients, in (0, 1].
        of: `"retain"` or `"forget"`.
        weights: See `feature_importance`.

    Returns:
        Bool (d,).

    Raises:
        ValueError: as `feature_importance`, or `keep` is out of range.

    >>> from lightning_unlearn.functional.linear_problem import draw_linear_problem
    >>> problem = draw_linear_problem(1, 1, d_retain=2, d_overlap=1, d_forget=1)
    >>> importance_mask(problem, 0.75, of="retain").tolist(), importance_mask(problem, 0.5, of="forget").tolist()
    ([True, True, True, False], [True, True, False, False])
    """
    scores = feature_importance(problem, of, weights)
    return kept_masks([scores], keep, of="largest" if of == "retain" else "smallest")[0]
