"""What tuning minimises: how far a goal of forgetting is missed, and what that costs, weighed against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_unlearn.utilities.checks import check_choice, expected

__all__ = ["ErrorRates", "Goal", "Objective", "Utility"]

Goal: TypeAlias = Literal["privacy", "bias_removal"]
"""`"privacy"`: the forgotten samples are answered as well as held-out ones, neither better nor worse. `"bias_removal"`:
the labels that the forgotten samples were trained with, which were wrong, are answered no more."""

Utility: TypeAlias = Literal["absolute", "relative"]


@dataclass(frozen=True, slots=True)
class ErrorRates:
    """Shares of wrong answers, in [0, 1].

    Attributes:
        forget: On the samples to forget, against the labels they were trained with.
        validation: On validation data.
        original_validation: Of the original model on the same validation data.
    """

    forget: float
    validation: float
    original_validation: float


@dataclass(frozen=True, slots=True)
class Objective:
    r"""A goal, and its price: :math:`J = \lambda G + (1 - \lambda) U`, to be minimised.

    G is :math:`|e_f - e_v|` for privacy and :math:`1 - e_f` for bias removal, U the error on validation data; e are
    shares of wrong answers. So **with a larger lambda the goal counts more**, with a smaller one the utility.

    What is the paper's and what is ours: to tune on validation data, for these two goals, weighed by a lambda, is
    Alon and Dar 2025 (arXiv 2503.08633). Their criterion was not at hand; the formula and the direction of lambda are
    our reading (inferred).

    Attributes:
        goal: See `Goal`.
        lambda_: Weight of the goal, in [0, 1].
        utility: `"absolute"` takes the validation error as it is, `"relative"` what it is above the original's. That is
            the same for all trials, so the choice is the same; but values of different models can be compared.

    Raises:
        ValueError: an unknown goal or utility, or a weight out of range.

    >>> objective = Objective("privacy", lambda_=0.5)
    >>> objective.value(ErrorRates(forget=0.0, validation=0.25, original_validation=0.25))
    0.25
    >>> Objective("bias_removal", 1.0).value(ErrorRates(forget=0.75, validation=0.5, original_validation=0.25))
    0.25
    """

    goal: Goal
    lambda_: float = 0.5
    utility: Utility = "absolute"

    def __post_init__(self) -> None:
        check_choice("goal", self.goal, ("privacy", "bias_removal"))
        check_choice("utility", self.utility, ("absolute", "relative"))
        if not 0 <= self.lambda_ <= 1:
            raise ValueError(expected("lambda_", "a weight from 0 (utility alone) to 1 (goal alone)", self.lambda_))

    def goal_error(self, rates: ErrorRates) -> float:
        """How far the goal is missed, in [0, 1]; 0 is right."""
        return abs(rates.forget - rates.validation) if self.goal == "privacy" else 1.0 - rates.forget

    def utility_error(self, rates: ErrorRates) -> float:
        """What the model has lost, or lacks; smaller is better, and below 0 where it is better than the original."""
        return rates.validation - (rates.original_validation if self.utility == "relative" else 0.0)

    def value(self, rates: ErrorRates) -> float:
        """What is minimised."""
        return self.lambda_ * self.goal_error(rates) + (1.0 - self.lambda_) * self.utility_error(rates)
