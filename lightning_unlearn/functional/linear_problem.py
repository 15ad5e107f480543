r"""Data of the overparameterised linear model of Ding et al. (arXiv 2410.03833): features shared or of one side."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_unlearn.utilities.checks import check_positive_int, expected

__all__ = ["LinearProblem", "draw_linear_problem"]


@dataclass(frozen=True, eq=False)
class LinearProblem:
    r"""Data to keep and to forget, as blocks of features that one of them has alone or both share.

    :math:`X_r = [R; L_1; 0]` and :math:`X_f = [0; L_2; F]`. Without shared features (`overlap_retain` of no row) they
    are the paper's *distinct* features, else *overlapping*.

    Args:
        retain_only: R, float64 (d_retain, n_retain): features that only the data to keep have.
        overlap_retain: L_1, (d_overlap, n_retain): shared features of the data to keep.
        overlap_forget: L_2, (d_overlap, n_forget): shared features of the data to forget.
        forget_only: F, (d_forget, n_forget): features that only the data to forget have.
        w_retain: True coefficients of `retain_only`, (d_retain,).
        w_overlap: True coefficients of the shared features, (d_overlap,).
        w_forget: True coefficients of `forget_only`, (d_forget,).

    Raises:
        ValueError: dtypes or shapes do not fit, or the problem is not overparameterised: each part needs fewer samples
            than it has features, so do both together, and all columns must be linearly independent.

    >>> problem = draw_linear_problem(2, 1, d_retain=3, d_forget=4, d_overlap=2, seed=0)
    >>> problem.x_retain.shape, problem.x_forget.shape, problem.is_distinct
    (torch.Size([9, 2]), torch.Size([9, 1]), False)
    """

    retain_only: Tensor
    overlap_retain: Tensor
    overlap_forget: Tensor
    forget_only: Tensor
    w_retain: Tensor
    w_overlap: Tensor
    w_forget: Tensor

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            ndim = 1 if item.name.startswith("w_") else 2
            if value.dtype != torch.float64 or value.ndim != ndim:
                rule = f"float64 with {ndim} dimension{'s' if ndim > 1 else ''}"
                raise ValueError(expected(item.name, rule, (value.dtype, tuple(value.shape))))
        n_retain, n_forget = self.retain_only.shape[1], self.forget_only.shape[1]
        shapes = {
            "overlap_retain": (len(self.w_overlap), n_retain),
            "overlap_forget": (len(self.w_overlap), n_forget),
            "w_retain": (len(self.retain_only),),
            "w_forget": (len(self.forget_only),),
        }
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(expected(name, f"of shape {shape}", tuple(getattr(self, name).shape)))
        _check_sizes(n_retain, n_forget, *self.sizes)
        columns = torch.cat([self.x_retain, self.x_forget], 1)
        rank = int(torch.linalg.matrix_rank(columns))
        if rank < columns.shape[1]:
            rule = f"{columns.shape[1]} linearly independent columns"
            raise ValueError(expected("x_retain and x_forget", rule, f"rank {rank}"))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Features that only the data to keep have, that both have, and that only the data to forget have."""
        return len(self.w_retain), len(self.w_overlap), len(self.w_forget)

    @property
    def is_distinct(self) -> bool:
        """Whether no feature is shared."""
        return len(self.w_overlap) == 0

    @property
    def x_retain(self) -> Tensor:
        """Data to keep, (d, n_retain)."""
        zeros = self.retain_only.new_zeros(len(self.w_forget), self.retain_only.shape[1])
        return torch.cat([self.retain_only, self.overlap_retain, zeros])

    @property
    def x_forget(self) -> Tensor:
        """Data to forget, (d, n_forget)."""
        zeros = self.forget_only.new_zeros(len(self.w_retain), self.forget_only.shape[1])
        return torch.cat([zeros, self.overlap_forget, self.forget_only])

    @property
    def true_weights(self) -> Tensor:
        """w_*, (d,)."""
        return torch.cat([self.w_retain, self.w_overlap, self.w_forget])

    @property
    def y_retain(self) -> Tensor:
        """Labels of the data to keep, (n_retain,)."""
        return self.x_retain.T @ self.true_weights

    @property
    def y_forget(self) -> Tensor:
        """Labels of the data to forget, (n_forget,)."""
        return self.x_forget.T @ self.true_weights


def _check_sizes(n_retain: int, n_forget: int, d_retain: int, d_overlap: int, d_forget: int) -> None:
    """Refuse a problem in which generic data could not be interpolated."""
    for name, count, features in (
        ("n_retain", n_retain, d_retain + d_overlap),
        ("n_forget", n_forget, d_forget + d_overlap),
        ("n_retain + n_forget", n_retain + n_forget, d_retain + d_overlap + d_forget),
    ):
        if not 0 < count < features:
            rule = f"at least 1 and below {features}, the number of features of these samples"
            raise ValueError(expected(name, rule, count, "The theory is about overparameterised models."))


def draw_linear_problem(
    n_retain: int, n_forget: int, *, d_retain: int, d_forget: int, d_overlap: int = 0, seed: int = 0
) -> LinearProblem:
    """A problem whose features and true coefficients are independent standard normal.

    Args:
        n_retain: Samples to keep.
        n_forget: Samples to forget.
        d_retain: Features that only the data to keep have.
        d_forget: Features that only the data to forget have.
        d_overlap: Features that both have; 0 for distinct features.
        seed: Of the draw.

    Returns:
        The problem, on the CPU.

    Raises:
        ValueError: a size is negative, or the problem would not be overparameterised.

    >>> draw_linear_problem(3, 2, d_retain=6, d_forget=4).is_distinct
    True
    """
    for name, size in {"d_retain": d_retain, "d_forget": d_forget, "d_overlap": d_overlap, "seed": seed}.items():
        check_positive_int(name, size, zero=True)
    _check_sizes(n_retain, n_forget, d_retain, d_overlap, d_forget)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return LinearProblem(
        retain_only=normal(d_retain, n_retain),
        overlap_retain=normal(d_overlap, n_retain),
        overlap_forget=normal(d_overlap, n_forget),
        forget_only=normal(d_forget, n_forget),
        w_retain=normal(d_retain),
        w_overlap=normal(d_overlap),
        w_forget=normal(d_forget),
    )
