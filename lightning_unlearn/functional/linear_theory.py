r"""The overparameterised linear model in which Ding et al. (arXiv 2410.03833) ask what fine-tuning forgets: solutions.

Columns are samples: labels are :math:`y = X^T w_*` without noise, and the original model is the interpolant of minimum
norm. Everything is in float64, and each identity is computed in two ways: solutions by QR decompositions of the data,
:func:`predicted_losses` by Gram matrices of the feature blocks. :mod:`lightning_unlearn.functional.linear_masking` has
the remedies.

The set-up is recalled from the paper and consistent with its public reviews; the algebra was derived anew here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_unlearn.functional.linear_problem import LinearProblem
from lightning_unlearn.utilities.checks import check_choice, expected

__all__ = [
    "LinearModel",
    "Losses",
    "fine_tuned_solution",
    "golden_solution",
    "losses_of",
    "nearest_interpolant",
    "original_solution",
    "predicted_losses",
    "projector",
]

LinearModel: TypeAlias = Literal["original", "fine_tuned", "golden"]


class Losses(NamedTuple):
    """Mean squared errors of one model.

    Attributes:
        retain: RL, of the data to keep.
        forget: UL, of the data to forget: high where they are forgotten.
    """

    retain: float
    forget: float


def projector(columns: Tensor) -> Tensor:
    r"""The orthogonal projector on the span of linearly independent columns, :math:`A (A^T A)^{-1} A^T`, by QR.

    Args:
        columns: A, floating (d, n) with n of at most d; n = 0 gives zero.

    Returns:
        (d, d).

    >>> projector(torch.tensor([[2.0], [2.0]], dtype=torch.float64)).mul(2).round().tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    basis, _ = torch.linalg.qr(columns)
    product: Tensor = basis @ basis.T
    return product


def nearest_interpolant(columns: Tensor, labels: Tensor, start: Tensor) -> Tensor:
    r""":math:`\arg\min_w \|w - start\|_2` with :math:`A^T w = y`: where gradient descent from `start` ends.

    Args:
        columns: A, float64 (d, n), linearly independent columns.
        labels: y, (n,).
        start: (d,).

    Returns:
        (d,); `start` itself where there is no column.

    >>> columns, labels = torch.tensor([[2.0], [0.0]]).double(), torch.tensor([4.0]).double()
    >>> nearest_interpolant(columns, labels, torch.tensor([1.0, 7.0]).double()).tolist()
    [2.0, 7.0]
    """
    basis, triangle = torch.linalg.qr(columns)
    residual = labels - columns.T @ start
    nearest: Tensor = start + basis @ torch.linalg.solve_triangular(triangle.T, residual[:, None], upper=False)[:, 0]
    return nearest


def original_solution(problem: LinearProblem) -> Tensor:
    """The interpolant of all data of minimum norm, (d,): what gradient descent from zero learns.

    >>> from lightning_unlearn.functional.linear_problem import draw_linear_problem
    >>> problem = draw_linear_problem(3, 2, d_retain=6, d_forget=4)
    >>> max(losses_of(original_solution(problem), problem)) < 1e-20
    True
    """
    columns = torch.cat([problem.x_retain, problem.x_forget], 1)
    labels = torch.cat([problem.y_retain, problem.y_forget])
    return nearest_interpolant(columns, labels, torch.zeros_like(problem.true_weights))


def fine_tuned_solution(
    problem: LinearProblem, rows: Sequence[int] | None = None, start: Tensor | None = None
) -> Tensor:
    r"""What fine-tuning on data to keep ends at: their interpolant nearest to the start.

    :math:`w_t = (I - P_t) w_{start} + P_t w_*`, with the projector on the fine-tuning samples. The original
    interpolates them already, so from there nothing moves: :math:`w_t = w_o` for distinct and overlapping features.

    Args:
        problem: The data.
        rows: Which of the samples to keep, without repeats; all by default, none leaves the start as it is.
        start: (d,); the original by default.

    Raises:
        ValueError: a row is repeated or out of range.

    >>> from lightning_unlearn.functional.linear_problem import draw_linear_problem
    >>> problem = draw_linear_problem(3, 2, d_retain=6, d_forget=4)
    >>> torch.allclose(fine_tuned_solution(problem, [0, 2]), original_solution(problem))
    True
    """
    chosen = checked_rows(problem, rows)
    begin = original_solution(problem) if start is None else start
    return nearest_interpolant(problem.x_retain[:, chosen], problem.y_retain[chosen], begin)


def checked_rows(problem: LinearProblem, rows: Sequence[int] | None) -> list[int]:
    """The fine-tuning samples as a list.

    Raises:
        ValueError: a row is repeated or out of range.
    """
    count = problem.retain_only.shape[1]
    chosen = list(range(count)) if rows is None else list(rows)
    if len(set(chosen)) < len(chosen) or not all(0 <= row < count for row in chosen):
        raise ValueError(expected("rows", f"positions below {count}, each once", chosen))
    return chosen


def golden_solution(problem: LinearProblem) -> Tensor:
    """The interpolant of the data to keep of minimum norm, (d,): retraining from zero without the others.

    >>> from lightning_unlearn.functional.linear_problem import draw_linear_problem
    >>> problem = draw_linear_problem(3, 2, d_retain=6, d_forget=4)
    >>> losses = losses_of(golden_solution(problem), problem)
    >>> losses.retain < 1e-20, losses.forget > 0.1
    (True, True)
    """
    return nearest_interpolant(problem.x_retain, problem.y_retain, torch.zeros_like(problem.true_weights))


def losses_of(weights: Tensor, problem: LinearProblem) -> Losses:
    """RL and UL of any weights.

    Args:
        weights: (d,).
        problem: The data.

    >>> from lightning_unlearn.functional.linear_problem import draw_linear_problem
    >>> problem = draw_linear_problem(3, 2, d_retain=6, d_forget=4)
    >>> losses_of(problem.true_weights, problem)
    Losses(retain=0.0, forget=0.0)
    """
    retain = problem.x_retain.T @ weights - problem.y_retain
    forget = problem.x_forget.T @ weights - problem.y_forget
    return Losses(float(retain.square().mean()), float(forget.square().mean()))


def predicted_losses(problem: LinearProblem, model: LinearModel) -> Losses:
    r"""RL and UL in closed form, without solving for the weights.

    Original, and fine-tuned on any of the data to keep: both 0. Golden: RL is 0, and UL is
    :math:`\|w_f\|^2_{F F^T / n_f}` for distinct features, else
    :math:`\frac{1}{n_f} \|X_f^T (P_r (w_r + w_{lap}) - (w_{lap} + w_f))\|^2`. The paper's theorems say the first;
    both golden values were derived here.

    Args:
        problem: The data.
        model: `"original"`, `"fine_tuned"` or `"golden"`.

    Raises:
        ValueError: the model is another.

    Source:
        Ding et al. 2024, arXiv 2410.03833.

    >>> from lightning_unlearn.functional.linear_problem import draw_linear_problem
    >>> problem = draw_linear_problem(3, 2, d_retain=6, d_forget=4, d_overlap=2)
    >>> predicted_losses(problem, "fine_tuned")
    Losses(retain=0.0, forget=0.0)
    >>> predicted, measured = predicted_losses(problem, "golden"), losses_of(golden_solution(problem), problem)
    >>> abs(predicted.forget - measured.forget) < 1e-10 * measured.forget
    True
    """
    check_choice("model", model, ("original", "fine_tuned", "golden"))
    if model != "golden":
        return Losses(0.0, 0.0)
    if problem.is_distinct:
        return Losses(0.0, float((problem.forget_only.T @ problem.w_forget).square().mean()))
    return Losses(0.0, float(golden_residual(problem).square().mean()))


def golden_residual(problem: LinearProblem) -> Tensor:
    r"""What the golden model gets wrong on the data to forget, :math:`y_f - X_f^T w_g`, (n_f,), by Gram matrices.

    :math:`y_f - C^T G_r^{-1} y_r` with :math:`G_r = R^T R + L_1^T L_1` and :math:`C = L_1^T L_2`.
    """
    shared = problem.overlap_retain
    gram = problem.retain_only.T @ problem.retain_only + shared.T @ shared
    y_retain = problem.retain_only.T @ problem.w_retain + shared.T @ problem.w_overlap
    y_forget = problem.overlap_forget.T @ problem.w_overlap + problem.forget_only.T @ problem.w_forget
    learnt: Tensor = shared @ torch.linalg.solve(gram, y_retain)
    return y_forget - problem.overlap_forget.T @ learnt
